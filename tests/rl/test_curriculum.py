"""Prompts by running pass rates: reproducible, without replacement, and nothing is forgotten."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from phi4r.configs.sections import RolloutConfig
from phi4r.core.errors import ConfigError, UserError
from phi4r.core.problem import Problem
from phi4r.core.seeds import Stream, items_of_step
from phi4r.rl.curriculum import PassRateOrder, epoch_items, pass_rate, with_results
from phi4r.rl.queue import EpochOrder, PromptOrder, open_order

NUM, SEED, SAMPLES = 30, 7, 8
BY_RATE = RolloutConfig(curriculum="pass_rate", prompts_per_step=4, group_size=SAMPLES, curriculum_rest=3)
PROBLEMS = [Problem(id=str(i), problem="?", answer="1") for i in range(NUM)]


def ability(item: int) -> int:
    """Right samples of 8: a third is hopeless, a third can be taught, a third is easy."""
    return (0, 4, SAMPLES)[item % 3]


def run(draws: PromptOrder, first: int, until: int, right: Callable[[int], int] = ability) -> list[list[int]]:
    found = []
    for draw in range(first, until):
        items = draws.items(draw)
        assert draws.items(draw) == items
        draws.record(draw, [right(item) for item in items], SAMPLES)
        found.append(items)
    return found


def test_off_draws_what_was_drawn_before_there_was_a_curriculum() -> None:
    draws = open_order(RolloutConfig(prompts_per_step=7), SEED, PROBLEMS, 3)
    assert isinstance(draws, EpochOrder)
    expected = [items_of_step(NUM, SEED, Stream.PROMPTS, draw, 7) for draw in range(3, 20)]
    assert run(draws, 3, 20) == expected
    assert draws.state() == {}


def test_rates_are_running_means_that_forget() -> None:
    counts = with_results({}, [(0, 0, 8), (1, 8, 8), (2, 4, 8)])
    assert [pass_rate(counts, item) for item in range(4)] == [0.5 / 9, 8.5 / 9, 0.5, None]
    for _ in range(9):
        counts = with_results(counts, [(0, 8, 8)])
    rate = pass_rate(counts, 0)
    assert rate is not None
    assert rate > 0.9
    before = dict(counts)
    with_results(counts, [(0, 0, 8)])
    assert counts == before


@pytest.mark.proves(
    "A curriculum forgets no problem: those that teach come once an epoch, the others once in several",
    how="counts over epochs",
)
def test_an_epoch_holds_what_teaches_once_and_the_rest_by_turns() -> None:
    counts = with_results({}, [(item, ability(item), SAMPLES) for item in range(NUM)])
    epochs = [epoch_items(NUM, counts, (0.1, 0.9), 3, SEED, epoch) for epoch in range(6)]
    assert all(len(set(order)) == len(order) for order in epochs)
    times = Counter(item for order in epochs for item in order)
    assert {times[item] for item in range(NUM) if item % 3 == 1} == {6}
    assert {times[item] for item in range(NUM) if item % 3 != 1} == {2}
    for start in range(4):  # any three epochs in a row hold every problem
        assert {item for order in epochs[start : start + 3] for item in order} == set(range(NUM))
    assert epochs[0] == epoch_items(NUM, counts, (0.1, 0.9), 3, SEED, 0)
    assert epochs[0] != epoch_items(NUM, counts, (0.1, 0.9), 3, SEED + 1, 0)


def test_what_teaches_stands_before_the_rest_with_the_promised_odds() -> None:
    counts = with_results({}, [(0, 4, 8), (1, 0, 8)])
    epochs = (epoch_items(2, counts, (0.1, 0.9), 4, SEED, epoch) for epoch in range(8000))
    both = [order for order in epochs if len(order) == 2]
    assert len(both) == 2000
    share = np.mean([order[0] == 0 for order in both])
    assert abs(share - 4 / 5) < 5 * np.sqrt(0.16 / len(both))


def test_without_known_rates_the_first_epoch_holds_every_problem_once() -> None:
    draws = open_order(BY_RATE, SEED, PROBLEMS, 0)
    found = [item for items in run(draws, 0, 7) for item in items]
    assert len(found) == len(set(found)) == 28
    assert sorted(found + draws.items(7)[:2]) == list(range(NUM))


def test_later_epochs_leave_out_most_of_what_teaches_nothing() -> None:
    found = [item for items in run(open_order(BY_RATE, SEED, PROBLEMS, 0), 0, 60) for item in items][NUM:]
    kinds = Counter(item % 3 for item in found)
    assert kinds[1] > 1.2 * (kinds[0] + kinds[2])
    assert set(found) == set(range(NUM))


def test_a_pass_rate_from_curation_counts_from_the_first_epoch_on() -> None:
    problems = [
        Problem(id=str(i), problem="?", answer="1", meta={"pass_rate": (0.0, 0.5, None)[i % 3]})
        for i in range(NUM)
    ]
    draws = open_order(BY_RATE, SEED, problems, 0)
    draws.items(0)
    assert isinstance(draws, PassRateOrder)
    first = [*draws.items(0), *draws.left]
    assert {item for item in first if item % 3} == {item for item in range(NUM) if item % 3}
    assert 0 < sum(item % 3 == 0 for item in first) < NUM / 3


@pytest.mark.parametrize("stop", [1, 7, 8, 13, 29])
@pytest.mark.proves("A resumed curriculum draws what an uninterrupted one draws", how="the checkpoint's JSON")
def test_a_resumed_run_draws_the_same_prompts(stop: int) -> None:
    whole = run(open_order(BY_RATE, SEED, PROBLEMS, 0), 0, 40)
    first = open_order(BY_RATE, SEED, PROBLEMS, 0)
    assert run(first, 0, stop) == whole[:stop]
    state = json.loads(json.dumps(first.state()))
    first.items(stop)  # after the checkpoint the run goes on, and is killed
    assert run(open_order(BY_RATE, SEED, PROBLEMS, stop, state), stop, 40) == whole[stop:]
    with pytest.raises(UserError, match="curriculum is of 30 problems, this run has 29"):
        open_order(BY_RATE, SEED, PROBLEMS[1:], stop, state)


def test_batches_in_flight_change_only_when_results_are_used() -> None:
    """With a lag of 2, whether 0, 1 or 2 draws are open when the next begins, the prompts are the same."""
    rollout = RolloutConfig(
        curriculum="pass_rate",
        prompts_per_step=4,
        group_size=8,
        mode="one_step",
        max_prompt_batches=2,
        curriculum_rest=3,
    )
    found = []
    for ahead in range(3):
        draws = open_order(rollout, SEED, PROBLEMS, 0)
        orders = []
        for draw in range(40):
            draws.items(draw + ahead)
            orders.append(draws.items(draw))
            draws.record(draw, [ability(item) for item in orders[-1]], SAMPLES)
        found.append(orders)
    assert found[0] == found[1] == found[2]
    draws = open_order(rollout, SEED, PROBLEMS, 0)
    with pytest.raises(AssertionError, match="have no results yet"):
        draws.items(30)


def test_results_and_nothing_else_decide() -> None:
    easy = run(open_order(BY_RATE, SEED, PROBLEMS, 0), 0, 40, lambda item: SAMPLES)
    mixed = run(open_order(BY_RATE, SEED, PROBLEMS, 0), 0, 40)
    assert easy[:7] == mixed[:7]
    assert easy[8:] != mixed[8:]
    assert {item for items in easy for item in items} == set(range(NUM))


def test_the_band_is_checked() -> None:
    with pytest.raises(ConfigError, match="curriculum_high"):
        RolloutConfig(curriculum_low=0.9, curriculum_high=0.1)
    with pytest.raises(ConfigError, match="curriculum_rest"):
        RolloutConfig(curriculum_rest=0)
