"""Rewards by registered name or import path."""

from __future__ import annotations

import math

import numpy as np
import pytest

from phi4r.configs.sections import RewardConfig
from phi4r.core.errors import ConfigError, UserError
from phi4r.core.problem import Problem
from phi4r.rewards.function import GradedResponse, get_reward, reward_of
from phi4r.rewards.length_aware import compute_reward
from phi4r.verify.strict import Verdict

SETTINGS = RewardConfig().resolved(64)
HERE = __name__


def response(outcome: str = "correct", text: str = "<think>2+2=4</think>4") -> GradedResponse:
    return GradedResponse(
        problem=Problem("p1", "2+2?", "4"),
        text=text,
        tokens=np.arange(7, dtype=np.int32),
        finished=True,
        think_valid=True,
        verdict=Verdict(outcome, "4", "text"),  # type: ignore[arg-type]
    )


def short_and_right(response: GradedResponse, settings: RewardConfig) -> float:
    return response.correct - response.num_tokens / settings.max_tokens


def no_number(response: GradedResponse, settings: RewardConfig) -> float:
    return math.nan


def one_argument(response: GradedResponse) -> float:
    return 1.0


def of(name: str) -> RewardConfig:
    return RewardConfig(function=f"{HERE}:{name}").resolved(64)


@pytest.mark.parametrize("outcome", ["correct", "wrong", "no_answer", "timeout"])
def test_the_registered_reward_is_the_paper_s(outcome: str) -> None:
    given = response(outcome)
    assert reward_of(given, SETTINGS) == compute_reward(
        correct=given.correct, think_valid=True, finished=True, tokens=given.tokens, settings=SETTINGS
    )


def test_a_function_by_import_path_sees_the_response_and_the_settings() -> None:
    parts = reward_of(response(), of("short_and_right"))
    assert parts.total == parts.accuracy == 1 - 7 / 64
    assert parts.accuracy_source == "function"
    assert parts.correct
    assert parts.num_tokens == 7


def test_what_is_no_reward_function_is_refused_before_it_is_called() -> None:
    with pytest.raises(ConfigError, match=r"reward\.function: unknown reward 'lenght_aware', did you mean"):
        get_reward("lenght_aware")
    with pytest.raises(ConfigError, match=r"one_argument is not a reward: expected a function of \(resp"):
        get_reward(f"{HERE}:one_argument")
    with pytest.raises(ConfigError, match="HERE is not a reward: expected a function"):
        get_reward(f"{HERE}:HERE")


def test_a_reward_that_is_no_finite_number_names_its_problem() -> None:
    with pytest.raises(UserError, match="no_number returned nan for problem p1; expected a finite number"):
        reward_of(response(), of("no_number"))
