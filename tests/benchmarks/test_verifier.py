"""The labelled cases, what is made of GSM8K's answers, and the table that is made of the rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import pytest

from benchmarks.rows import RESULTS, read_rows
from benchmarks.verifier import (
    DOCS,
    GSM8K,
    STRANGERS,
    count,
    gsm8k_cases,
    long_cases,
    near_misses,
    newest,
    read_cases,
    same_answers,
    strangers_cases,
    table_lines,
)
from phi4r.verify.pool import VerifierPool


def test_the_table_of_the_docs_is_what_the_rows_say() -> None:
    found = re.search(r"<!-- verifier -->\n(.*?)<!-- /verifier -->", DOCS.read_text(), flags=re.DOTALL)
    assert found is not None
    assert found[1].splitlines() == table_lines(newest(read_rows(RESULTS / "verifier.csv")))


def test_cases_are_distinct_and_every_category_has_both_labels() -> None:
    cases = read_cases()
    texts = Counter((case["gold"], case["response"]) for case in cases)
    assert [text for text, count in texts.items() if count > 1] == []
    labels = {(case["category"], case["correct"]) for case in cases}
    assert labels == {(c, label) for c, _ in labels for label in (True, False)} - {("adversarial", True)}


@pytest.mark.parametrize("value", [7, -3, 0, 100, 1234, -65_432, 1_000_000])
def test_renderings_of_a_number_are_right_and_near_misses_are_not(value: int, pool: VerifierPool) -> None:
    right = pool.map([(str(value), response) for response in same_answers(value)])
    assert [v for v in right if v.outcome != "correct"] == []
    spoilt = pool.map([(str(value), response) for response in near_misses(value)])
    assert [v for v in spoilt if v.outcome not in ("wrong", "no_answer")] == []


def test_every_labelled_case_is_graded_as_its_label_says(pool: VerifierPool) -> None:
    cases = [case for case in read_cases() if case["category"] != "adversarial"]
    verdicts = pool.map([(case["gold"], case["response"]) for case in cases])
    wrong = [
        (case["category"], case["gold"], case["response"][-60:], verdict.outcome, verdict.method)
        for case, verdict in zip(cases, verdicts, strict=True)
        if verdict.correct != case["correct"]
    ]
    assert wrong == []


@pytest.mark.skipif(
    not STRANGERS.is_file(), reason=f"strangers' answers are not on this machine ({STRANGERS})"
)
def test_strangers_answers_stay_within_the_stated_rates(pool: VerifierPool) -> None:
    """At most 1% of the wrong ones pass, 4% of the right ones fail."""
    cases = strangers_cases(STRANGERS)
    verdicts = pool.map([(case["gold"], case["response"]) for case in cases])
    found = count(cases, verdicts)
    num_right = sum(case["correct"] for case in cases)
    assert found["false_positives"] <= 0.01 * (len(cases) - num_right)
    assert found["false_negatives"] + found["undecided"] <= 0.04 * num_right


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(1) as pool:
        yield pool


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"GSM8K is not on this machine ({GSM8K})")
def test_gsm8k_gives_thousands_of_cases() -> None:
    cases = gsm8k_cases(GSM8K)
    assert len(cases) > 10_000
    assert Counter(case["correct"] for case in cases).keys() == {True, False}


def test_long_responses_are_as_long_as_asked() -> None:
    cases = long_cases(read_cases(), 300, 14_000)
    assert len(cases) == 300
    assert all(0.9 < len(case["response"]) / (14_000 * 4) < 1.5 for case in cases)
