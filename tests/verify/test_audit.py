"""The second check: independent of the first, never part of a reward, and as unable to hang."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4r.configs.sections import RewardConfig
from phi4r.core.problem import Problem
from phi4r.tasks import get_task, grade_responses
from phi4r.verify.audit import audit_counts, disagrees, drawn, with_second
from phi4r.verify.numeric import compare_numerically
from phi4r.verify.pool import VerifierPool
from phi4r.verify.strict import SymbolicQuestion, Verdict
from tests.verify.test_pool import HANGS


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(2, timeout_s=5.0) as pool:
        yield pool


def math(answer: str) -> Problem:
    return Problem(id=f"gold {answer}", problem="?", answer=answer, task="math")


def boxed(answer: str) -> str:
    return rf"<think>hm</think>So \boxed{{{answer}}}."


AGREED = [
    ("7", "7"), ("7", "8"), ("1/2", "0.5"), ("1,000", "1000"), ("x+1", "1+x"), ("x+1", "x+2"), ("8", "2^3"),
    (r"\frac{\sqrt3}{2}", r"\sin(\pi/3)"), ("[0,1]", "(0,1)"), ("(1,2)", "(2,1)"), ("5", "x=5"),
    (r"\{1,2\}", r"\{2,1\}"), ("1/3", "0.333333"), ("blue", "red"),
]  # fmt: skip


def test_two_methods_agree_on_ordinary_answers_and_the_verdicts_stay(pool: VerifierPool) -> None:
    graded = [(math(gold), boxed(answer)) for gold, answer in AGREED]
    alone = grade_responses(graded, pool)
    audited = grade_responses(graded, pool, RewardConfig())
    assert [dataclasses.replace(v, second="", second_method="", seconds=0) for v in audited] == [
        dataclasses.replace(v, seconds=0) for v in alone
    ]
    assert [(g, a, v) for (g, a), v in zip(AGREED, audited, strict=True) if v.second != v.outcome] == []
    by_text = {"string", "rational", "rounded", "grammar"}
    assert all((v.second_method == "math_verify") == (v.method in by_text) for v in audited)
    assert {v.second_method for v in audited} == {"math_verify", "numeric"}
    assert audit_counts(audited) == {
        "audit_checked": len(AGREED), "audit_only_first": 0, "audit_only_second": 0, "audit_undecided": 0
    }  # fmt: skip


def test_a_planted_wrong_verdict_is_found_by_the_other_method(pool: VerifierPool) -> None:
    """As if a tier had a bug: its verdicts are turned round, the second check says what is right."""
    planted = {
        ("7", Verdict("correct", "8", "rational")): "wrong",
        ("1000", Verdict("wrong", "1,000", "string")): "correct",
        ("x+1", Verdict("wrong", "1+x", "symbolic")): "correct",
        ("x+1", Verdict("correct", "x+2", "symbolic")): "wrong",
        ("2", Verdict("wrong", r"\sqrt[3]{8}", "unparsed")): "correct",
    }
    found = with_second([gold for gold, _ in planted], [verdict for _, verdict in planted], pool)
    assert [verdict.second for verdict in found] == list(planted.values())
    assert all(disagrees(verdict) for verdict in found)
    assert [verdict.outcome for verdict in found] == [verdict.outcome for _, verdict in planted]
    assert audit_counts(found) == {
        "audit_checked": 5, "audit_only_first": 2, "audit_only_second": 3, "audit_undecided": 0
    }  # fmt: skip


def test_a_second_check_that_hangs_is_no_opinion_and_bounded_as_a_whole() -> None:
    verdicts = [Verdict("correct", HANGS + f"+{k}", "string") for k in range(20)] + [
        Verdict("correct", "7", "string")
    ]
    golds = ["1"] * 20 + ["7"]
    with VerifierPool(2, timeout_s=1.0) as pool:
        pool.warm()
        found = with_second(golds, verdicts, pool)  # four deadlines for the batch: the rest is skipped
        assert [verdict.outcome for verdict in found] == ["correct"] * 21
        assert {verdict.second for verdict in found[:20]} <= {"timeout", "error"}
        assert "timeout" in {verdict.second for verdict in found}
        assert "skipped" in {verdict.second_method for verdict in found}
        assert not any(disagrees(verdict) for verdict in found)
        assert audit_counts(found)["audit_undecided"] >= 20
        assert pool.grade("x+1", boxed("1+x")).correct  # the pool goes on


def test_equal_answers_are_asked_once_and_a_share_is_the_same_every_time(pool: VerifierPool) -> None:
    graded = [(math(str(number)), boxed(str(number + 1))) for number in range(60)]
    asked = pool._next_id
    found = grade_responses(graded * 3, pool, RewardConfig(audit_share=0.3))
    assert 5 < pool._next_id - asked < 40
    assert found[:60] == found[60:120]
    assert 5 < sum(bool(verdict.second) for verdict in found[:60]) < 40
    checked = [bool(verdict.second) for verdict in found[:60]]
    again = grade_responses(graded[::-1], pool, RewardConfig(audit_share=0.3))
    assert [bool(verdict.second) for verdict in again[::-1]] == checked
    assert not any(v.second for v in grade_responses(graded, pool, RewardConfig(audit_share=0.0)))


def test_only_answers_to_mathematics_that_were_decided_are_checked(pool: VerifierPool) -> None:
    addition = get_task("addition").generate(1, 0)
    undecided = ["no box here", boxed("9^{9^9}"), boxed("")]
    graded = [(addition, boxed(addition.answer)), *((math("7"), text) for text in undecided)]
    with VerifierPool(1) as idle:
        found = grade_responses(graded, idle, RewardConfig())
        assert [verdict.second for verdict in found] == [""] * 4
        assert idle.num_started == 0
        assert audit_counts(found) == {}


@pytest.mark.parametrize(
    ("gold", "answer", "outcome"),
    [
        ("(x+1)^2", "x^2+2x+1", "correct"),
        (r"3\frac17", r"\frac{22}{7}", "correct"),
        (r"\log_2 8", "3", "correct"),
        (r"\sqrt[3]{8}", "2", "correct"),
        (r"\sin^2 x+\cos^2 x", "1", "correct"),
        (r"\binom{5}{2}", "10", "correct"),
        ("5!", "120", "correct"),
        (r"5 \text{ cm}", "5", "correct"),
        ("-2^2", "-4", "correct"),
        ("a_{1}+a_2", "a_2+a_1", "correct"),
        ("x^{1/2}", r"\sqrt{x}", "correct"),
        (r"|x|", "x", "wrong"),
        (r"\sqrt{x^2}", "x", "wrong"),
        ("7,7", "7,8", "wrong"),
        ("x=5", "y=5", "wrong"),
        ("7", "7x", "wrong"),
        ("x+y", "x+z", "wrong"),
        ("1/2^{99}", "1/2^{98}", "error"),
        ("1/2x", "x/2", "error"),
        (r"50\%", "0.5", "error"),
        ("[0,1)", r"0\le x<1", "error"),
        (r"(-8)^{1/3}", "-2", "error"),
        ("171!", "172!", "error"),
        ("9^9^9", "8", "error"),
        ("7^", "7", "error"),
        ("", "7", "error"),
    ],
)
def test_answers_are_compared_by_their_numbers(gold: str, answer: str, outcome: str) -> None:
    assert compare_numerically(SymbolicQuestion(gold, answer))[0] == outcome
    assert compare_numerically(SymbolicQuestion(answer, gold))[0] == outcome


@given(st.text("01x+-*/^!(){}[]|,.=_ \\fracsqtin", max_size=40), st.sampled_from(["7", "x", "(1,2)"]))
def test_the_reader_of_numbers_raises_nothing_and_equals_itself(text: str, other: str) -> None:
    assert compare_numerically(SymbolicQuestion(text, text))[0] in ("correct", "error")
    assert compare_numerically(SymbolicQuestion(text, other))[0] in ("correct", "wrong", "error")


def test_cases_are_drawn_by_the_seed_in_their_order() -> None:
    rows = list(range(50))
    assert drawn(rows, 0, 1) == drawn(rows, 50, 1) == rows
    picked = drawn(rows, 9, 1)
    assert picked == sorted(set(picked)) == drawn(rows, 9, 1)
    assert len(picked) == 9
    assert picked != drawn(rows, 9, 2) != drawn(rows, 9, 2, step=1)
