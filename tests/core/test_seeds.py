"""Which items a step gets: every item once an epoch, and a position that is a step number."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from phi4r.configs.sections import ProblemsConfig
from phi4r.core.seeds import Stream, epoch_order, items_of_step, problem_seed
from phi4r.rl.problems import get_problems

sizes = st.integers(1, 40)


def first_items(num_items: int, per_step: int, num_steps: int, seed: int = 0, stream: int = 1) -> list[int]:
    return [i for step in range(num_steps) for i in items_of_step(num_items, seed, stream, step, per_step)]


@given(num_items=sizes, per_step=sizes, seed=st.integers(0, 2**31))
@pytest.mark.proves("Every document comes once an epoch", how="counters, any batch size")
def test_every_item_comes_once_an_epoch_whatever_a_step_takes(
    num_items: int, per_step: int, seed: int
) -> None:
    num_steps = 3 * num_items // per_step + 1
    drawn = first_items(num_items, per_step, num_steps, seed)
    assert len(drawn) == num_steps * per_step
    for start in range(0, len(drawn) - num_items + 1, num_items):
        assert sorted(drawn[start : start + num_items]) == list(range(num_items))


@given(num_items=sizes, per_step=sizes, step=st.integers(0, 10**6), other=st.integers(1, 40))
def test_the_sequence_of_items_does_not_depend_on_how_it_is_cut_into_steps(
    num_items: int, per_step: int, step: int, other: int
) -> None:
    # Any step can be asked for by itself: the position in the data is step x per_step and nothing else.
    begin = step * per_step
    wanted = items_of_step(num_items, 7, 1, step, per_step)
    steps = range(begin // other, (begin + per_step - 1) // other + 1)
    recut = [i for s in steps for i in items_of_step(num_items, 7, 1, s, other)]
    skipped = begin - steps[0] * other
    assert recut[skipped : skipped + per_step] == wanted


def test_epochs_seeds_and_streams_have_orders_of_their_own() -> None:
    orders = [
        epoch_order(seed, stream, epoch, 50).tolist()
        for seed in (0, 1)
        for stream in (11, 21)
        for epoch in (0, 1, 2)
    ]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert list(range(50)) not in orders, "items are shuffled"


def test_first_places_are_even_over_epochs() -> None:
    firsts = [int(epoch_order(0, 11, epoch, 4)[0]) for epoch in range(2000)]
    # Four equally likely values: 500 each, standard deviation sqrt(2000 x 3/16) = 19; five of them.
    assert np.abs(np.bincount(firsts, minlength=4) - 500).max() < 5 * 19.4


seeds = st.integers(0, 2**63)


@given(train=seeds, evaluated=seeds)
@example(train=1_000_003, evaluated=0)
@example(train=2_000_006, evaluated=1_000_003)
def test_no_training_problems_are_evaluation_problems(train: int, evaluated: int) -> None:
    assert problem_seed(train, "train") != problem_seed(evaluated, "eval")


@given(one=seeds, other=seeds, use=st.sampled_from(["train", "eval"]))
@example(one=1_000_003, other=0, use="train")
def test_run_seeds_have_problems_of_their_own(one: int, other: int, use: Literal["train", "eval"]) -> None:
    assert (problem_seed(one, use) == problem_seed(other, use)) == (one == other)


@pytest.mark.parametrize("task", ["modchain", "addition", "countdown"])
def test_a_runs_problems_come_from_the_seed_of_their_use(task: str) -> None:
    config = ProblemsConfig(task=task, num_generated=3)
    train, evaluated = get_problems(config, 1_000_003), get_problems(config, 0, use="eval")
    assert not {p.id for p in train} & {p.id for p in evaluated}
    assert evaluated == get_problems(config, 0, use="eval", count=3)
    assert [p.id for p in get_problems(config, 7)] == [f"{task}-7-{i}" for i in range(3)]


def test_no_two_streams_share_a_generator() -> None:
    # numpy's SeedSequence pads a short key with zeros: (seed, stream) is the key (seed, stream, 0).
    states = {np.random.SeedSequence([5, stream, 0]).generate_state(2).tobytes() for stream in Stream}
    assert len(states) == len(Stream)
