"""Where an answer stands, and where it does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4r.verify.extract import (
    extract_answer,
    gold_answer,
    is_plain_answer,
    last_boxed,
    strip_outer_braces,
    think_block_is_valid,
)


@pytest.mark.parametrize(
    ("response", "answer", "source"),
    [
        (r"<think>hm</think>So \boxed{7}", "7", "boxed"),
        (r"<think>\boxed{9}</think>So \boxed{7}.<|im_end|>", "7", "boxed"),
        (r"<think></think>7<|im_end|>", "7", "plain"),
        (r"\boxed{7}", "7", "boxed"),
        ("7", "7", "plain"),
        (r"<think>a</think>\boxed{1} then \boxed{2}", "2", "boxed"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", "boxed"),
        (r"\boxed{\boxed{7}}", "7", "boxed"),
        (r"\boxed{3+\boxed{4}}", "3+{4}", "boxed"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}", "boxed"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right.", "boxed"),
        (r"\boxed {7}", "7", "boxed"),
        (r"\fbox{7}", "7", "boxed"),
        (r"late </think> and \boxed{5}", "5", "boxed"),
        (r"<think>a</think>\boxed{1}<think>b</think>\boxed{2}", "2", "boxed"),
        (r"a } stray \boxed{7} brace {", "7", "boxed"),
        (r"\\boxed{7}", "7", "boxed"),
        (r"<think>\boxed{7}</think>", None, "empty"),
        (r"<think>\boxed{7}</think>I cannot say.", None, "prose"),
        (r"<think>\boxed{7}", None, "unclosed_think"),
        (r"<think>a</think>\boxed{7}<think>wait", None, "unclosed_think"),
        (r"\boxed{7} no wait, \boxed{\frac{1}{2}", None, "unterminated_box"),
        (r"\boxed{7", None, "unterminated_box"),
        (r"\boxed{}", None, "empty"),
        ("", None, "empty"),
        ("42 ways to fail, I do not know", None, "prose"),
        ("The answer is 7", None, "prose"),
        ("#### 18", "18", "plain"),
        ("2+2=4\n#### 4", "4", "plain"),
        ("so #### 4", None, "prose"),
        (r"\boxedanswer{7} is it", None, "prose"),
    ],
)
def test_extraction(response: str, answer: str | None, source: str) -> None:
    found = extract_answer(response)
    assert (found.answer, found.source) == (answer, source)


@given(st.text(alphabet=r"\boxed{}<>/think7 $", max_size=80))
@pytest.mark.proves("Nothing inside the think block is taken for the answer", how="random text")
def test_nothing_inside_the_last_think_block_is_ever_the_answer(text: str) -> None:
    inside = text.replace("<think>", "").replace("</think>", "")
    assert extract_answer(f"<think>{inside}</think>").answer is None
    assert extract_answer(f"<think>{inside}").answer is None


BALANCED = st.recursive(
    st.sampled_from(["7", r"\frac", "x ", r"\{", r"\}"]),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"),
    max_leaves=12,
)


@given(BALANCED)
def test_a_balanced_box_is_found_whole(content: str) -> None:
    boxed, found = last_boxed(rf"before \boxed{{1}} {{ \boxed{{{content}}} after")
    assert found
    assert boxed == strip_outer_braces(content)


@pytest.mark.timeout(200)  # a fraction of a second when linear; any quadratic step takes minutes
@pytest.mark.parametrize(
    "unit",
    [r"\boxed{", r"\boxed{{", "{", "}", r"\{", "\\", "<think>", "</think>", "_a", "$", "1,", "**", "- "],
)
def test_extraction_takes_linear_time(unit: str) -> None:
    text = unit * (400_000 // len(unit))
    extract_answer(text)
    extract_answer(rf"\boxed{{{text}}}")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        *(
            (text, True)
            for text in ("7", "x^2+1", "blue", "sin(x)+ln(2)", "(3+5)*7", "x = 7", r"5\text{ cm}")
        ),
        *((text, False) for text in ("7 apples", "not enough", "7\n8", "", "7" * 401)),
    ],
)
def test_a_bare_answer_is_told_from_prose(text: str, plain: bool) -> None:
    assert is_plain_answer(text) is plain


@pytest.mark.parametrize(
    ("response", "valid"),
    [
        ("<think></think>7", True),
        ("<think>a\nb</think>7<|im_end|>", True),
        ("\n <think>a</think>", True),
        ("7", False),
        ("<think>7", False),
        ("a</think>7", False),
        ("First <think>a</think>7", False),
        ("<think>a</think>b<think>c</think>7", False),
        ("<think>a<think>b</think>7", False),
        ("<think>a</think>7</think>", False),
        ("</think><think>", False),
        ("", False),
    ],
)
def test_a_valid_think_block_is_one_block_at_the_start(response: str, valid: bool) -> None:
    assert think_block_is_valid(response) is valid


@pytest.mark.parametrize(
    ("gold", "answer"),
    [("7", "7"), (r"It is \boxed{7}", "7"), ("2+2=4\n#### 1,004", "1,004"), (r"\boxed{7", r"\boxed{7")],
)
def test_gold_answers_come_bare_boxed_or_after_worked_steps(gold: str, answer: str) -> None:
    assert gold_answer(gold) == answer
