"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from phi4r.configs.sections import OptimizerConfig

NUM_STEPS = 100


def rates(**settings: object) -> list[float]:
    config = OptimizerConfig(**{"lr": 2.0, "warmup_steps": 10, "min_lr_ratio": 0.1, **settings})  # type: ignore[arg-type]
    return [config.learning_rate(step, NUM_STEPS) for step in range(NUM_STEPS + 5)]


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear"])
def test_warm_up_is_linear_never_zero_and_meets_the_peak(decay: str) -> None:
    found = rates(decay=decay)
    assert found[:10] == pytest.approx([2.0 * (step + 1) / 10 for step in range(10)])
    assert found[9] == found[10] == 2.0, "the last step of the warm-up and the first after it are at the peak"


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear"])
def test_without_warm_up_the_first_step_is_at_the_peak(decay: str) -> None:
    assert rates(decay=decay, warmup_steps=0)[0] == 2.0


def test_constant_stays() -> None:
    assert set(rates(decay="constant")[10:]) == {2.0}


def test_linear_falls_by_the_same_amount_every_step_to_its_floor() -> None:
    found = rates(decay="linear")
    falls = [before - after for before, after in pairwise(found[10 : NUM_STEPS + 1])]
    assert falls == pytest.approx([2.0 * 0.9 / 90] * 90)
    assert found[NUM_STEPS:] == pytest.approx([0.2] * 5)


def test_cosine_is_half_way_at_half_time_and_flat_at_its_ends() -> None:
    found = rates(decay="cosine")
    assert found[55] == pytest.approx(0.2 + 1.8 / 2)
    assert found[40] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert found[NUM_STEPS:] == pytest.approx([0.2] * 5), "beyond the last step it stays at its floor"
    falls = [before - after for before, after in pairwise(found[10 : NUM_STEPS + 1])]
    assert all(fall > 0 for fall in falls)
    assert max(falls[:2] + falls[-2:]) < 0.1 * max(falls)


def test_a_run_that_ends_within_its_warm_up_never_decays() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=10)
    assert [config.learning_rate(step, 5) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert config.learning_rate(10, 10) == 1.0


def test_the_rate_depends_on_the_step_alone() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=3)
    forward = [config.learning_rate(step, 20) for step in range(20)]
    assert [config.learning_rate(step, 20) for step in reversed(range(20))] == forward[::-1]
