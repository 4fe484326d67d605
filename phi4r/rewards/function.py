"""A reward is a function of a graded response: the paper's, or another by import path (`reward.function`)."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from phi4r.configs.sections import RewardConfig
from phi4r.core.errors import UserError
from phi4r.core.problem import Problem
from phi4r.core.registry import resolve
from phi4r.rewards.length_aware import RewardParts, compute_reward
from phi4r.verify.strict import Verdict


@dataclass(frozen=True, kw_only=True)
class GradedResponse:
    """What a reward may look at.

    problem: the question, with its gold answer. text: the response, think block included, without its end
    token. tokens: its ids, int32 [num_tokens], end token included. finished: whether it ended by itself.
    think_valid: whether it has exactly one think block, at its beginning. verdict: the outcome of grading
    ("correct", "wrong", "no_answer", "timeout", "error") and the answer that was found.
    """

    problem: Problem
    text: str
    tokens: npt.NDArray[np.int32]
    finished: bool
    think_valid: bool
    verdict: Verdict

    @property
    def correct(self) -> bool:
        """Whether the answer was graded as right."""
        return self.verdict.correct

    @property
    def num_tokens(self) -> int:
        """Length of the response, the end token included."""
        return len(self.tokens)


RewardFunction = Callable[[GradedResponse, RewardConfig], float | RewardParts]
"""reward(response, settings) -> the reward. `settings` is section `reward` with its lengths filled in."""


def length_aware(response: GradedResponse, settings: RewardConfig) -> RewardParts:
    """The paper's reward (`rewards.length_aware`)."""
    return compute_reward(
        correct=response.correct,
        think_valid=response.think_valid,
        finished=response.finished,
        tokens=response.tokens,
        settings=settings,
    )


REWARDS: dict[str, RewardFunction] = {"length_aware": length_aware}
"""Registered name -> function."""


@functools.cache
def get_reward(name: str) -> RewardFunction:
    """The reward function of that registered name or import path. ConfigError where there is none, or it does
    not take (response, settings)."""
    return resolve("reward", name, REWARDS, key="reward.function", fit=_fit)


def _fit(found: Any) -> RewardFunction:
    if not callable(found):
        raise TypeError(f"expected a function of (response, settings), got {type(found).__name__}")
    try:
        inspect.signature(found).bind(object(), object())
    except TypeError as error:
        raise TypeError(f"expected a function of (response, settings): {error}") from None
    return found  # type: ignore[no-any-return]


def reward_of(response: GradedResponse, settings: RewardConfig) -> RewardParts:
    """The reward of a response by `settings.function`, as parts. UserError where a function returns no finite
    number."""
    value = get_reward(settings.function)(response, settings)
    if isinstance(value, RewardParts):
        return value
    is_number = isinstance(value, int | float | np.number) and math.isfinite(value)
    if not is_number:
        raise UserError(
            f"reward.function: {settings.function} returned {value!r} for problem {response.problem.id};"
            " expected a finite number"
        )
    return RewardParts(
        total=float(value),
        accuracy=float(value),
        accuracy_source="function",
        rho=0.0,
        repetition=0.0,
        num_ngrams=0,
        num_repeated_ngrams=0,
        max_ngram_count=0,
        overlong=0.0,
        correct=response.correct,
        think_valid=response.think_valid,
        finished=response.finished,
        num_tokens=response.num_tokens,
    )
