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
    gsm8k_cases,
    long_cases,
    near_misses,
    newest,
    read_cases,
    same_answers,
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
