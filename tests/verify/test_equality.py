"""One equality: of answers with each other, with several gold answers, and wherever the answer stands."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4r.configs.sections import RewardConfig
from phi4r.core.problem import Problem
from phi4r.tasks import grade_responses
from phi4r.verify.notation import normalise
from phi4r.verify.pool import VerifierPool
from phi4r.verify.reading import readings
from phi4r.verify.strict import classes, compare_quickly, same_answer

TEXTS = st.text("0123456789 ,.:;=<>+-*/^_!|(){}[]\\\\abcxABC'$%\"", max_size=60)
PIECES = st.lists(
    st.sampled_from([
        "1", "23", "456", "7.5", " ", ",", r"\,", ";", "=", "<", r"\le ", "x", "A", ")", "(", "[", "]",
        r"\{", r"\}", "{", "}", r"\frac", r"\text{and}", r"\text{ cm}", r"\text{(A) }", r"\pm ", r"\cup ",
        r"\in ", r"\mathbb{R}", "^", "_2", "!", r"\sqrt", r"\overline{3}", "%", r"^\circ", r"\$", ":",
        r"\infty", "pm", "or", "no solution", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\\\", "&", "...",
        "million", r"\approx ", "√", "½", "²",
    ]),
    max_size=14,
).map("".join)  # fmt: skip


@settings(deadline=None)
@given(st.one_of(TEXTS, PIECES))
def test_every_text_equals_itself_and_none_raises(text: str) -> None:
    normal = normalise(text)
    readings(normal)
    decided = compare_quickly(text, text)
    assert isinstance(decided, tuple)
    if normal:
        assert decided[0] == "correct"


@settings(deadline=None)
@given(PIECES, PIECES)
def test_comparing_two_texts_never_raises(one: str, other: str) -> None:
    assert same_answer(one, other) in (True, False, None)


def test_equal_answers_are_one_class() -> None:
    assert classes(["2", "2", "0.5", r"\frac12", "1/2", "x=2"]) == [0, 0, 2, 2, 2, 0]
    assert classes(["a", "b", "a"]) == [0, 1, 0]
    assert classes([]) == []


def test_one_of_several_gold_answers_is_enough() -> None:
    with VerifierPool(1) as pool:
        jobs = [(["3", "x+1"], text) for text in (r"\boxed{3}", r"\boxed{1+x}", r"\boxed{x+2}", r"\boxed{4}")]
        assert [v.outcome for v in pool.map(jobs)] == ["correct", "correct", "wrong", "wrong"]


@pytest.mark.parametrize(
    ("style", "response", "outcome"),
    [
        ("line", "<think>Answer: 8</think>So.\n**Answer:** 7\n", "correct"),
        ("line", "<think>x</think>Answer: 7\nAnswer: 8", "wrong"),
        ("line", "<think>x</think>The final answer is: $7$.", "correct"),
        ("line", r"<think>x</think>\boxed{7}", "no_answer"),
        ("line", "<think>Answer: 7", "no_answer"),
        ("tag", "<think>x</think>It is <answer>\n7\n</answer>", "correct"),
        ("tag", "<think>x</think><answer>7</answer> or <answer>8</answer>", "wrong"),
        ("tag", r"<think>x</think>\boxed{7} <answer>", "no_answer"),
        ("tag", "<think><answer>7</answer></think>It is 7, I think.", "no_answer"),
        ("boxed", r"<think>x</think><answer>8</answer> \boxed{7}", "correct"),
    ],
)
def test_the_answer_stands_where_the_style_says(style: str, response: str, outcome: str) -> None:
    problem = Problem(id="p", problem="?", answer="7")
    addition = Problem(id="a", problem="3+4?", answer="7", task="addition")
    reward = RewardConfig(answer_style=style, audit_share=0.0)  # type: ignore[arg-type]
    with VerifierPool(1) as pool:
        found = grade_responses([(problem, response), (addition, response)], pool, reward)
    assert [verdict.outcome for verdict in found] == [outcome] * 2
