"""The reward against the report's formula, its printed vectors, and its bounds."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4r.configs.sections import RewardConfig
from phi4r.rewards.length_aware import accuracy_reward, compute_reward, repetition_reward

PAPER = RewardConfig(max_tokens=31_744).resolved(0)
ONE_EACH = range(10_000, 10_300)

# (L, (8/13) R_acc if correct, if incorrect), printed to five decimals.
VECTORS = [
    (0, 0.61538, -0.61538),
    (1000, 0.61538, -0.56323),
    (1851, 0.61538, -0.46154),
    (3702, 0.61538, -0.30769),
    (27136, 0.57032, -0.30769),
    (28672, 0.46154, -0.30769),
    (30208, 0.35275, -0.30769),
    (31744, 0.30769, -0.30769),
]


def reward(correct: bool, length: int, think: bool = True, finished: bool = True, tokens: object = ONE_EACH):
    return compute_reward(
        correct=correct,
        think_valid=think,
        finished=finished,
        tokens=list(tokens),
        settings=PAPER,
        num_tokens=length,
    )


def test_the_papers_lengths_come_out_of_its_limit() -> None:
    assert (PAPER.max_tokens, PAPER.positive_tokens, PAPER.negative_tokens) == (31_744, 25_600, 3_702)


@pytest.mark.parametrize(("length", "correct", "incorrect"), VECTORS)
@pytest.mark.proves(
    "The reward gives the report's values", how="right and wrong answers of every length in its tables"
)
def test_the_reports_vectors(length: int, correct: float, incorrect: float) -> None:
    assert round(reward(True, length).total, 5) == correct
    assert round(reward(False, length).total, 5) == incorrect


@pytest.mark.parametrize("length", [0, 1, 3702, 25_600, 31_744, 40_000])
@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.proves(
    "Unfinished and malformed answers get the report's fixed rewards", how="its rules, at six lengths"
)
def test_overrides_ignore_length_and_correctness_think_block_first(length: int, correct: bool) -> None:
    incomplete = reward(correct, length, finished=False)
    assert (incomplete.accuracy, incomplete.accuracy_source) == (-0.5, "incomplete")
    no_think = reward(correct, length, think=False)
    assert (no_think.accuracy, no_think.accuracy_source) == (-1.0, "think_block")
    both = reward(correct, length, think=False, finished=False)
    assert (both.accuracy, both.accuracy_source) == (-1.0, "think_block")
    assert both.total == pytest.approx(-8 / 13, abs=1e-15)


@given(st.integers(0, 100_000))
def test_accuracy_stays_in_its_bounds_and_never_falls_the_wrong_way(length: int) -> None:
    def accuracy(correct: bool, tokens: int) -> float:
        return accuracy_reward(
            correct=correct, think_valid=True, finished=True, num_tokens=tokens, settings=PAPER
        )[0]

    assert 0.5 <= accuracy(True, length + 1) <= accuracy(True, length) <= 1.0
    assert -1.0 <= accuracy(False, length) <= accuracy(False, length + 1) <= -0.5


def test_a_right_answer_within_the_first_limit_is_worth_exactly_one() -> None:
    assert reward(True, 25_600).accuracy == 1.0
    assert reward(True, 25_601).accuracy < 1.0
    assert reward(True, 25_601).rho == 1 / 6144


# --- repetition


def test_no_ngram_more_than_five_times_costs_nothing() -> None:
    block = [1, 2, 3, 4, 5]
    # Five copies apart from each other: the 5-gram occurs exactly five times.
    tokens = [token for copy in range(5) for token in [*block, 100 + copy]]
    assert repetition_reward(tokens) == (0.0, 26, 0, 5)


def test_the_repetition_penalty_by_hand() -> None:
    # Six copies of one 5-gram, each followed by a token of its own: 36 tokens, 32 5-grams.
    tokens = [token for copy in range(6) for token in [1, 2, 3, 4, 5, 100 + copy]]
    penalty, num_ngrams, num_repeated, max_count = repetition_reward(tokens)
    assert (num_ngrams, num_repeated, max_count) == (32, 1, 6)
    assert penalty == -max(1 / 32, 6 * 5 / 36)
    parts = reward(True, 36, tokens=tokens)
    assert parts.total == pytest.approx(8 / 13 - (6 / 7.2) / 13, abs=1e-15)


def test_the_share_of_repeated_ngrams_is_the_first_term() -> None:
    # A cycle of 300 tokens eight times: every 5-gram is repeated, none dominates.
    tokens = list(range(300)) * 8
    penalty, num_ngrams, num_repeated, max_count = repetition_reward(tokens)
    assert (num_ngrams, num_repeated, max_count) == (2396, 300, 8)
    assert penalty == -max(300 / 2396, 8 / 480)
    assert penalty == -300 / 2396


def test_one_token_for_ever_tends_to_the_lowest_reward_of_all() -> None:
    parts = reward(False, 0, tokens=[7] * 10_000)
    assert parts.repetition == -9996 / 2000
    assert -1.0 < parts.total < -0.999


@given(
    st.lists(st.integers(0, 3), max_size=400),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 40_000),
)
def test_the_reward_lies_between_minus_one_and_eight_thirteenths(
    tokens: list[int], correct: bool, think: bool, finished: bool, length: int
) -> None:
    parts = reward(correct, length, think, finished, tokens)
    assert -1.0 < parts.total <= 8 / 13
    grams = [tuple(tokens[i : i + 5]) for i in range(len(tokens) - 4)]
    counts = {gram: grams.count(gram) for gram in grams}
    repeated = [gram for gram, count in counts.items() if count > 5]
    expected = max(len(repeated) / len(grams), max(counts.values()) / (len(tokens) / 5)) if repeated else 0.0
    assert math.isclose(parts.repetition, -expected, rel_tol=1e-15)
    assert math.isclose(parts.total, 8 / 13 * parts.accuracy - expected / 13, rel_tol=1e-14)


def test_length_is_the_number_of_tokens_unless_told_otherwise() -> None:
    parts = compute_reward(
        correct=False, think_valid=True, finished=True, tokens=list(ONE_EACH), settings=PAPER
    )
    assert parts.num_tokens == 300
    assert parts.rho == 300 / 3702
    assert set(parts.as_dict()) >= {
        "total",
        "accuracy",
        "repetition",
        "rho",
        "accuracy_source",
        "max_ngram_count",
    }


def test_lengths_that_were_never_filled_in_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens = 0"):
        compute_reward(correct=True, think_valid=True, finished=True, tokens=[], settings=RewardConfig())
    with pytest.raises(ValueError, match="num_tokens"):
        reward(True, -1)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 0.0), (16_384, 0.0), (18_432, -0.5), (20_480, -1.0), (20_481, -1.0), (90_000, -1.0)],
)
def test_the_overlong_punishment_is_dapos(length: int, expected: float) -> None:
    dapo = RewardConfig(max_tokens=20_480, overlong_tokens=4_096, overlong_weight=2.0).resolved(0)
    for correct, finished in ((True, True), (False, True), (True, False)):
        without, parts = (
            compute_reward(
                correct=correct, think_valid=True, finished=finished, tokens=list(ONE_EACH),
                settings=dataclasses.replace(dapo, overlong_weight=weight), num_tokens=length,
            )
            for weight in (0.0, 2.0)
        )  # fmt: skip
        assert (without.overlong, parts.overlong) == (0.0, expected)
        assert parts.total == pytest.approx(without.total + 2.0 * expected, abs=1e-12)
    assert RewardConfig(max_tokens=20_480).resolved(0).overlong_tokens == 4_096
