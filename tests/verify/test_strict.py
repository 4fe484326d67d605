"""What text and exact rationals settle by themselves, and what they refuse to hand on."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4r.verify.strict import (
    SymbolicQuestion,
    Verdict,
    compare_quickly,
    decide_quickly,
    exact_rational,
    is_too_complex,
)


@pytest.mark.parametrize(
    ("gold", "answer", "method"),
    [
        ("7", "7", "string"),
        ("7", " $7$. ", "string"),
        ("7", "**7**", "string"),
        ("7", "= 7", "string"),
        ("10000", r"10\,000", "string"),
        ("10,000", "10000", "grammar"),
        ("10000", "10{,}000", "string"),
        (r"\frac{1}{2}", r"\dfrac{1}{2}", "string"),
        ("10", r"\$10", "grammar"),
        (r"\text{Blue}", "blue", "string"),
        ("7", "seven", "grammar"),
        ("-3", "−3", "string"),
        (r"\left( 1, 2 \right)", "(1,2)", "grammar"),
        ("0.5", r"\frac12", "rational"),
        ("1/2", "2/4", "rational"),
        ("7", "7.0", "rational"),
        ("7", "007", "rational"),
        ("-1/2", r"\frac{-1}{2}", "rational"),
        (r"\frac{1}{3}", "0.333333", "rounded"),
        ("0.6666667", "2/3", "rounded"),
        ("-3", r"-3\%", "grammar"),
        (r"50\%", "0.5", "grammar"),
        ("12.5%", r"\frac{25}{2}\%", "grammar"),
    ],
)
def test_right_answers(gold: str, answer: str, method: str) -> None:
    assert compare_quickly(gold, answer) == ("correct", method)


@pytest.mark.parametrize(
    ("gold", "answer", "method"),
    [
        ("7", "8", "rational"),
        ("1000000", "1000001", "rational"),
        ("1/3", "0.33333", "rational"),
        ("1/3", "0.333334", "rational"),
        ("0.333333", "0.333334", "rational"),
        (f"1/{2**99}", f"1/{2**98}", "rational"),
        (f"1/{2**99}", "0.000000", "rational"),
        ("7", "-7", "rational"),
        ("7", r"8\%", "grammar"),
        (r"50\%", "5", "grammar"),
        ("7%", r"-7\%", "grammar"),
        ("blue", "red", "grammar"),
        ("1010_2", "1010_3", "grammar"),
    ],
)
def test_wrong_answers(gold: str, answer: str, method: str) -> None:
    assert compare_quickly(gold, answer) == ("wrong", method)


@given(st.fractions(max_denominator=10**30))
@pytest.mark.proves("Rational answers are compared exactly", how="random fractions in every notation")
def test_every_rational_is_read_exactly_in_every_notation(value: Fraction) -> None:
    sign = "-" if value < 0 else ""
    for text in (
        f"{value.numerator}/{value.denominator}",
        rf"\frac{{{value.numerator}}}{{{value.denominator}}}",
        rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}",
    ):
        assert exact_rational(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1e5",
        "1/0",
        r"\frac{1}{0}",
        "--1",
        "1..2",
        "²",
        "１２",
        "1_000",
        "9" * 401,
        "inf",
        "nan",
        "0x10",
    ],
)
def test_what_is_no_plain_rational_is_left_alone(text: str) -> None:
    assert exact_rational(text) is None


EXPLOSIVE = [
    "9^{9^9}",
    "9^{9^{9}}",
    "9^9^9",
    "9**9**9",
    "5^{5^{5^{5^5}}}",
    "x^{x^{x^x}}",
    "(10^8)!",
    "99999!",
    "((9!)!)!",
    "99!!",
    "9^{9!}",
    "2^{99999}",
    r"\binom{10^9}{3}",
    r"\sum_{k=1}^{10^9} k",
    r"\prod_{k=1}^{10000000} k",
    "(" * 3000 + "1" + ")" * 3000,
    r"\frac{" * 400 + "1" + "}{2}" * 400,
    "1" * 200_000,
    "x+" * 2000 + "x",
    "9^{9^{9}}+" * 30 + "1",
]


@pytest.mark.parametrize("answer", EXPLOSIVE, ids=lambda answer: answer[:24])
def test_explosive_answers_never_reach_a_worker_and_are_not_called_wrong(answer: str) -> None:
    assert compare_quickly("9", answer) == ("error", "too_complex")
    assert compare_quickly(answer, "9") == ("error", "too_complex")
    # Text that is the same is right, whatever it would take to evaluate.
    assert compare_quickly(answer, f" {answer} ") == ("correct", "string")


@pytest.mark.parametrize(
    "answer",
    [
        "e^{x^2}",
        "x^3+y^3+z^3+w^3",
        "2^{2004}",
        "(n+1)!",
        "10^{-6}",
        "2^{3^2}",
        r"\frac{2004!}{2003!}",
        r"\binom{2n}{n}",
        r"\sum_{k=1}^{n} k^2",
    ],
)
def test_ordinary_mathematics_is_not_too_complex(answer: str) -> None:
    assert not is_too_complex(answer)
    assert compare_quickly("9+y", answer) != ("error", "too_complex")
    assert isinstance(compare_quickly(f"({answer})+0", answer), SymbolicQuestion)


@given(st.text(max_size=200))
def test_no_text_raises(text: str) -> None:
    found, decided = decide_quickly("7", text)
    assert isinstance(decided, Verdict | SymbolicQuestion)
    assert (found.answer is None) == (
        isinstance(decided, Verdict) and decided.outcome == "no_answer"
    ) or found.answer


@pytest.mark.timeout(200)  # milliseconds when linear; any quadratic step takes minutes
@pytest.mark.parametrize(
    "unit",
    ["_a", "9,", "{", "$", "**", "-", "^", "x^", "!", r"\frac", r"\text{", "( ", ".", "٣", "💥"]
    # ways to split a text that would multiply: names, words, units, joined boxes
    + [
        r"\abcdefgh",
        r"\text{a} ",
        "^2 ",
        r"(\text{a} ",
        "and   ",
        r"\boxed{1}  and   ",
        "x=",
        "A. ",
        "[",
        r"\pm 1,",
    ],
)
def test_huge_answers_are_settled_in_linear_time(unit: str) -> None:
    text = unit * (100_000 // len(unit)) + "?"
    texts = [text, text[:3900], text[:990]]
    decided = [
        compare_quickly(*pair) for text in texts for pair in (("7", text), (text, "7"), (text, text + "!"))
    ]
    decide_quickly("7", text)
    assert all(isinstance(each, SymbolicQuestion) or each[0] != "correct" for each in decided)


def test_an_empty_gold_answer_is_an_error_of_the_data() -> None:
    assert compare_quickly("$$", "7") == ("error", "empty_gold")
