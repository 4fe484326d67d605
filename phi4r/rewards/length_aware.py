r"""The reward of Phi-4-reasoning-plus (technical report, section 4.1): length-aware accuracy, format,
repetition.

With L the response length in tokens (the EOS counts), L_max = 31,744, L_pos = 25,600, L_neg = 3,702:

    rho+ = min(1, max(L - L_pos, 0) / (L_max - L_pos))          rho- = min(1, L / L_neg)
    correct:                          R_acc =  0.5 + 0.25 (1 + cos(pi rho+))      in [ 0.5,  1  ]
    incorrect:                        R_acc = -0.5 - 0.25 (1 + cos(pi rho-))      in [-1,   -0.5]
    no <|im_end|> (incomplete):       R_acc = -0.5
    missing or invalid think block:   R_acc = -1       (takes precedence over "incomplete")

    R_rep = -max(#distinct 5-grams with frequency > 5 / #5-grams,  max 5-gram frequency / (n / 5)),
            0 where no 5-gram occurs more than 5 times          in (-5, 0]
    R = 8/13 R_acc + 1/13 R_rep                                 in (-1, 8/13]

`overlong_weight` adds DAPO's soft punishment of overlong responses (arXiv 2503.14476, section 3.4), right or
wrong, with L_cache the `overlong_tokens` below the limit:

    R_long = 0 for L <= L_max - L_cache,  -1 for L > L_max,  (L_max - L_cache - L) / L_cache between

A right answer loses reward only near the length limit; a wrong answer loses less the longer it thought. The
report leaves open the precedence of the two overrides, the unit of the n-grams (tokens here) and whether L
counts the EOS. n in R_rep is the number of tokens whose n-grams are counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from phi4r.data.native import ngram_repetition

AccuracySource = Literal["correct", "incorrect", "incomplete", "think_block", "function"]
IntArray = npt.NDArray[np.integer[Any]]


class RewardSettings(Protocol):
    """What the reward needs to know: `phi4r.configs.sections.RewardConfig` with its lengths filled in
    (`resolved`).
    """

    @property
    def max_tokens(self) -> int:
        """L_max."""

    @property
    def positive_tokens(self) -> int:
        """L_pos, from where on a right answer loses reward."""

    @property
    def negative_tokens(self) -> int:
        """L_neg, up to where a wrong answer gains reward."""

    @property
    def accuracy_weight(self) -> float:
        """8/13 in the report."""

    @property
    def repetition_weight(self) -> float:
        """1/13 in the report."""

    @property
    def repetition_ngram(self) -> int:
        """5 in the report."""

    @property
    def repetition_threshold(self) -> int:
        """5 in the report: an n-gram is repeated when it occurs more often than this."""

    @property
    def overlong_weight(self) -> float:
        """0 in the report."""

    @property
    def overlong_tokens(self) -> int:
        """L_cache."""


@dataclass(frozen=True, kw_only=True)
class RewardParts:
    """Every part of one response's reward, for logs, audits and rollout files.

    `accuracy` is R_acc, `accuracy_source` the branch it came from (the number that another `reward.function`
    gives is both `total` and `accuracy`, from "function"); `rho` is rho+ or rho- (0 under an override).
    `repetition` is R_rep, from `num_ngrams` n-grams of which `num_repeated_ngrams` distinct ones occur more
    often than the threshold and the commonest occurs `max_ngram_count` times. `overlong` is R_long
    (0 while its weight is 0). `total` is R.
    """

    total: float
    accuracy: float
    accuracy_source: AccuracySource
    rho: float
    repetition: float
    num_ngrams: int
    num_repeated_ngrams: int
    max_ngram_count: int
    overlong: float
    correct: bool
    think_valid: bool
    finished: bool
    num_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def check_lengths(settings: RewardSettings) -> None:
    """Raise ValueError unless 0 < L_neg and 0 < L_pos <= L_max: lengths of 0 ("by default") must be filled
    in first.
    """
    lengths = (settings.max_tokens, settings.positive_tokens, settings.negative_tokens)
    if min(lengths) <= 0 or settings.positive_tokens > settings.max_tokens:
        raise ValueError(
            "the reward needs 0 < positive_tokens <= max_tokens and 0 < negative_tokens, found max_tokens = "
            f"{lengths[0]}, positive_tokens = {lengths[1]}, negative_tokens = {lengths[2]}"
        )


def rho_positive(num_tokens: int, settings: RewardSettings) -> float:
    """rho+ in [0, 1]: how far a right answer's length has gone from L_pos to L_max (0 up to L_pos)."""
    excess = num_tokens - settings.positive_tokens
    span = settings.max_tokens - settings.positive_tokens
    if excess <= 0:
        return 0.0
    return min(1.0, excess / span) if span > 0 else 1.0


def rho_negative(num_tokens: int, settings: RewardSettings) -> float:
    """rho- in [0, 1]: how far a wrong answer's length has gone from 0 to L_neg."""
    return min(1.0, num_tokens / settings.negative_tokens)


def overlong_reward(num_tokens: int, settings: RewardSettings) -> float:
    """R_long in [-1, 0]."""
    if num_tokens > settings.max_tokens:
        return -1.0
    return min(0.0, (settings.max_tokens - num_tokens) / settings.overlong_tokens - 1.0)


def accuracy_reward(
    *, correct: bool, think_valid: bool, finished: bool, num_tokens: int, settings: RewardSettings
) -> tuple[float, AccuracySource, float]:
    """(R_acc, the branch that gave it, rho). Report, section 4.1; an invalid think block comes first."""
    if not think_valid:
        return -1.0, "think_block", 0.0
    if not finished:
        return -0.5, "incomplete", 0.0
    if correct:
        rho = rho_positive(num_tokens, settings)
        return 0.5 + 0.25 * (1.0 + math.cos(math.pi * rho)), "correct", rho
    rho = rho_negative(num_tokens, settings)
    return -0.5 - 0.25 * (1.0 + math.cos(math.pi * rho)), "incorrect", rho


def repetition_reward(
    tokens: Sequence[int] | IntArray, ngram: int = 5, threshold: int = 5
) -> tuple[float, int, int, int]:
    """(R_rep, number of n-grams, distinct n-grams occurring more than `threshold` times, highest count).

    `tokens`: ids of the whole response. The divisor of the second term is n / `ngram`, as printed for
    5-grams, so one token repeated for ever tends to -`ngram`.
    """
    array = np.ascontiguousarray(tokens, dtype=np.int32)
    num_ngrams, num_repeated, max_count = ngram_repetition(array, ngram, threshold)
    if num_repeated == 0:
        return 0.0, num_ngrams, 0, max_count
    return (
        -max(num_repeated / num_ngrams, max_count * ngram / len(array)),
        num_ngrams,
        num_repeated,
        max_count,
    )


def compute_reward(
    *,
    correct: bool,
    think_valid: bool,
    finished: bool,
    tokens: Sequence[int] | IntArray,
    settings: RewardSettings,
    num_tokens: int | None = None,
) -> RewardParts:
    """The reward of one response.

    `tokens`: the ids whose n-grams are counted, the response with its EOS. `num_tokens`: L, if it is not
    len(tokens). `correct` is read only where `think_valid` and `finished` are true. A time-out or error of
    the verifier is not `correct`; the outcome is kept elsewhere, so that it can be told from a wrong
    answer.
    """
    length = len(tokens) if num_tokens is None else num_tokens
    check_lengths(settings)
    if length < 0:
        raise ValueError(f"num_tokens must be 0 or more, found {length}")
    accuracy, source, rho = accuracy_reward(
        correct=correct, think_valid=think_valid, finished=finished, num_tokens=length, settings=settings
    )
    repetition, num_ngrams, num_repeated, max_count = repetition_reward(
        tokens, settings.repetition_ngram, settings.repetition_threshold
    )
    overlong = overlong_reward(length, settings) if settings.overlong_weight else 0.0
    return RewardParts(
        total=settings.accuracy_weight * accuracy
        + settings.repetition_weight * repetition
        + settings.overlong_weight * overlong,
        accuracy=accuracy,
        accuracy_source=source,
        rho=rho,
        repetition=repetition,
        num_ngrams=num_ngrams,
        num_repeated_ngrams=num_repeated,
        max_ngram_count=max_count,
        overlong=overlong,
        correct=correct,
        think_valid=think_valid,
        finished=finished,
        num_tokens=length,
    )
