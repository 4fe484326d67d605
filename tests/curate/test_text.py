"""What counts as the same text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4r.curate.pool import respace
from phi4r.curate.text import analyse, masked, ngram_hashes
from phi4r.tasks.base import CounterStream

SAME = [
    ("3*7+5-9%10?", " 3 * 7+5 -9 % 10 ?"),
    ("3 × 7 ÷ 2 − 1", "3*7/2-1"),
    (r"Find $\frac{1}{2}+\dfrac12$.", "find 1/2 + 1/2"),
    (r"$x^{2}\cdot y$", "x^2 * y"),
    ("x² + 10⁻³", "x^2+10^(-3)"),
    ("It costs $1,000.50 in all", "it costs 1000.5 in all"),
    ("a 5-mile run (in the park)", "A 5 mile run in the park"),
    ("Tom has five apples", "tom has 5 apples"),
    ("about .5 litres", "about 0.50 litres"),
]
DIFFERENT = [
    ("3*7+5-9%10?", "3*7+5-8%10?"),
    ("3*7+5-9%10?", "3*7-5+9%10?"),
    ("12+3", "1+23"),
    ("1 2 3=6?", "12 3=6?"),
    ("(3+4)*5", "3+4*5"),
    ("the product of -3 and 5", "the product of 3 and 5"),
    (r"$x^{2y}$", r"$x^2 y$"),
    ("10² squared", "102 squared"),
    ("1½ hours", "11/2 hours"),
    ("what is 5!", "what is 5"),
    ("x - sin y", "x sin y"),
    ("half a cup of 0.5", "half a cup of 5"),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_spacing_case_and_latex_dress_do_not_make_another_text(a: str, b: str) -> None:
    assert analyse(a).tokens == analyse(b).tokens


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_what_changes_the_mathematics_changes_the_tokens(a: str, b: str) -> None:
    assert analyse(a).tokens != analyse(b).tokens


@given(
    st.lists(st.sampled_from(["3", "17", "+", "*", "apples", "and", "=", "?", "%", ","]), min_size=1),
    st.integers(),
)
def test_other_white_space_never_changes_the_tokens(words: list[str], key: int) -> None:
    text = " ".join(words)
    spaced = respace(text, CounterStream("test", key))
    assert spaced != text
    assert analyse(spaced).tokens == analyse(text).tokens


def test_pure_arithmetic_is_told_from_prose() -> None:
    assert analyse("3*7+5-9%10?").symbolic
    assert analyse("Compute the value of 3*7+5.").symbolic
    assert not analyse("Tom buys 3 apples for 5 dollars each").symbolic
    assert analyse("Compute 3*7").core == analyse("What is 3 * 7?").core


def test_numbers_operators_and_comparisons_are_quantities_names_are_not() -> None:
    text = analyse("Tom has twice as many apples as Ann; Ann has 3 more than x.")
    assert text.quantities == ("twice", "3", "more", "x")


@given(st.text())
def test_any_text_can_be_analysed(text: str) -> None:
    assert analyse(text).num_words <= len(analyse(text).tokens)


def test_ngram_hashes_depend_on_order_and_content_only() -> None:
    hashes = ngram_hashes(("a", "b", "c", "a", "b"), 2)
    assert hashes[0] == hashes[3]
    assert len(set(hashes.tolist())) == 3
    assert ngram_hashes(("b", "a"), 2)[0] != hashes[0]
    assert ngram_hashes(("a",), 2).size == 0


def test_masking_replaces_numbers_only() -> None:
    assert masked(("tom", "has", "17", "x", "0.5")) == ("tom", "has", "#", "x", "#")
