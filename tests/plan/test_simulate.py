"""The simulated GRPO loop against what can be reckoned by hand, and laws that every run obeys."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import pytest

from phi4r.plan.simulate import (
    ONE_STEP_OFF,
    SYNCHRONOUS,
    Fleet,
    Lengths,
    Loop,
    Mode,
    Request,
    ServerCost,
    Servers,
    Simulated,
    over_sampled,
    simulate,
)

SECOND = ServerCost(fixed_s=1.0)
MODES = (SYNCHRONOUS, ONE_STEP_OFF, over_sampled(1), over_sampled(3))


def servers(count: int = 1, slots: int = 64, cost: ServerCost = SECOND, kv: float = math.inf) -> Servers:
    return Servers(count=count, costs=(cost,), slots=slots, kv_tokens=kv)


def loop(mode: Mode, lengths: Sequence[int], spec: Servers, **changes: object) -> Loop:
    """Every draw has the same lengths; training takes 5 s, weights 2 s."""
    plain = Loop(
        mode=mode, servers=spec, lengths=lambda draw: lengths, prompt_tokens=0,
        train_s=lambda tokens: 5.0, sync_s=2.0,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def sampled(spec: Servers, lengths: Sequence[int], prompt: int = 0) -> float:
    """Seconds for one draw."""
    fleet = Fleet(spec)
    fleet.submit([Request(0, prompt, length) for length in lengths])
    return fleet.finish(0)


def test_equal_answers_take_a_prefill_and_a_step_for_each_further_token() -> None:
    assert sampled(servers(), [10] * 8) == pytest.approx(9)  # the prefill samples the first token
    cost = ServerCost(fixed_s=0.1, sequence_s=0.01, context_s=0.001, prefill_s=0.002, request_s=0.05)
    # 4 prompts of 20 tokens: 4 x (0.05 + 0.04); then 9 steps, the first with 4 x 21 tokens, each with 4 more
    steps = sum(0.1 + 0.04 + 0.001 * (84 + 4 * step) for step in range(9))
    assert sampled(servers(cost=cost), [10] * 4, prompt=20) == pytest.approx(0.36 + steps)
    bound = ServerCost(fixed_s=0.1, compute_s=0.02)
    assert sampled(servers(cost=bound), [11] * 5) == pytest.approx(10 * 0.1)
    assert sampled(servers(cost=bound), [11] * 8) == pytest.approx(10 * 0.16)


def test_a_batch_of_two_waves_takes_twice_as_long() -> None:
    assert sampled(servers(slots=4), [10] * 8) == pytest.approx(18)
    assert sampled(servers(count=2, slots=4), [10] * 8) == pytest.approx(9)


def test_a_free_place_is_taken_at_once_by_the_next_of_the_queue() -> None:
    # two places: 5 and 9 begin, 5 is followed by 7 after 4 steps, 9 by 3 after 8; the end is at 4 + 6
    assert sampled(servers(slots=2), [5, 9, 7, 3]) == pytest.approx(10)


def test_the_formula_for_many_steps_is_the_sum_over_single_ones() -> None:
    cost = ServerCost(fixed_s=0.02, compute_s=0.003, sequence_s=0.001, context_s=1e-4, prefill_s=2e-4)
    stream = random.Random(5)
    lengths = [stream.randint(1, 80) for _ in range(12)]
    clock, done, prompt = 12 * 7 * cost.prefill_s, [1] * 12, 7
    while left := [i for i in range(12) if done[i] < lengths[i]]:
        clock += cost.step_s(len(left)) + cost.context_s * sum(prompt + done[i] for i in left)
        for i in left:
            done[i] += 1
    assert sampled(servers(cost=cost), lengths, prompt) == pytest.approx(clock)
    # stopping anywhere on the way changes nothing
    fleet = Fleet(servers(cost=cost))
    fleet.submit([Request(0, prompt, length) for length in lengths])
    for part in range(1, 40):
        fleet.run_to(clock * part / 41)
    assert fleet.finish(0) == pytest.approx(clock)


def test_a_full_cache_sends_the_newest_back_to_be_prefilled_again() -> None:
    # room for 30 tokens: two of prompt 5 hold 2 x (5 + 10) after the 9th step; the newest, with 10 tokens,
    # waits until the other is whole after 19 steps, and then needs 9 more
    cost = ServerCost(fixed_s=1.0, prefill_s=0.1)
    assert sampled(servers(kv=30, cost=cost), [20, 20], prompt=5) == pytest.approx(1 + 19 + 1.5 + 9)
    assert sampled(servers(kv=1000, cost=cost), [20, 20], prompt=5) == pytest.approx(1 + 19)


def test_new_weights_interrupt_answers_which_are_sent_and_prefilled_anew() -> None:
    cost = ServerCost(fixed_s=1.0, prefill_s=0.1, request_s=0.5)
    fleet = Fleet(servers(cost=cost))
    fleet.submit([Request(0, 5, 21)])
    fleet.run_to(10.0)  # 0.5 + 0.5, then 9 steps: 10 tokens
    fleet.update(3.0)
    # 0.5 + 0.1 x (5 + 10) sample the 11th token, and 10 are left
    assert fleet.finish(0) == pytest.approx(10 + 3 + 2 + 10)


def test_servers_on_the_same_hardware_slow_each_other_down() -> None:
    spec = Servers(count=2, costs=(ServerCost(fixed_s=1.0), ServerCost(fixed_s=2.0)), slots=1)
    # one has 4 tokens to go, the other 10: 4 steps of 2 s together, then 6 alone
    assert sampled(spec, [5, 11]) == pytest.approx(8 + 6)


def test_the_steps_of_each_mode_by_hand() -> None:
    lengths = [11] * 4  # 10 s of sampling, 5 s of training, 2 s for weights
    found = {mode.name: simulate(loop(mode, lengths, servers(count=4), warmup=4)) for mode in MODES}
    assert found["synchronous"].step_s == pytest.approx([17] * 4)
    assert found["one step off"].step_s == pytest.approx([12] * 4)  # training lies in the sampling
    synchronous = found["synchronous"]
    assert synchronous.trainer_busy == pytest.approx(5 / 17)
    assert synchronous.rollouts_busy == pytest.approx(10 / 17)
    assert synchronous.tokens_per_s == pytest.approx(44 / 17)
    assert (synchronous.mean_age, synchronous.max_age) == (0, 0)
    assert (found["one step off"].mean_age, found["one step off"].max_age) == (1, 1)
    assert [what for what, _, _ in synchronous.spans[:3]] == ["sync", "wait", "train"]
    assert [end - start for _, start, end in synchronous.spans[:3]] == pytest.approx([2, 10, 5])


def test_a_trainer_slower_than_sampling_sets_the_pace_of_every_mode() -> None:
    for mode in MODES[1:]:
        found = simulate(loop(mode, [4] * 4, servers(count=4), warmup=5, num_steps=12))
        assert found.step_s == pytest.approx([7] * 7)
        assert found.trainer_busy == pytest.approx(5 / 7)
        assert found.max_age == mode.staleness


def test_one_long_answer_idles_the_others_unless_later_draws_are_open() -> None:
    lengths = [101] + [11] * 7
    spec = servers(count=8, slots=1)
    found = {mode.name: simulate(loop(mode, lengths, spec, num_steps=20, warmup=8)) for mode in MODES}
    assert found["synchronous"].mean_step_s == pytest.approx(107)
    assert found["one step off"].mean_step_s == pytest.approx(102)
    # 180 tokens a step for eight places would take 22 s; four long answers are sampled at once
    assert found["over-sampled, 3 ahead"].mean_step_s < 45
    assert found["over-sampled, 1 ahead"].mean_step_s < 80


def heavy(draw: int) -> list[int]:
    return Lengths(400, 1.0, 4000).draw(64, 3, draw)


def heavy_loop(mode: Mode, spec: Servers) -> Loop:
    return Loop(
        mode=mode, servers=spec, lengths=heavy, prompt_tokens=30,
        train_s=lambda tokens: 2e-3 * tokens, sync_s=3.0, num_steps=19, warmup=7,
    )  # fmt: skip


COST = ServerCost(fixed_s=0.02, sequence_s=1e-3, context_s=1e-6, prefill_s=1e-4, request_s=1e-3)


def test_on_a_heavy_tail_each_mode_is_faster_and_its_tokens_older() -> None:
    found = [simulate(heavy_loop(mode, servers(4, 16, COST))) for mode in MODES]
    steps, ages = [one.mean_step_s for one in found], [one.mean_age for one in found]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 1.5 * steps[-1]
    assert ages[0] == 0
    assert ages[1] == 1
    assert ages[2] < 1 < ages[3]
    for one, mode in zip(found, MODES, strict=True):
        assert one.max_age == mode.staleness
        assert 0 < one.trainer_busy < 1
        assert 0 < one.rollouts_busy <= 1
        assert 0 < one.occupancy <= 16


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("kv", [math.inf, 9000.0])
def test_every_token_is_sampled_once_and_by_weights_that_were_there(mode: Mode, kv: float) -> None:
    spec, made = servers(3, 12, COST, kv), list[list[Request]]()
    fleet = Fleet(spec)
    for step in range(6):
        for draw in range(len(made), step + mode.staleness + 1):
            made.append([Request(draw, 30, length) for length in heavy(draw)])
            fleet.submit(made[draw])
        fleet.finish(step)
        fleet.run_to(fleet.now + 7.3)
        fleet.update(1.0)
    for draw in made[:6]:
        for request in draw:
            assert sum(count for _, count in request.versions) == pytest.approx(request.length)
            numbers = [version for version, _ in request.versions]
            assert numbers == sorted(numbers)
            assert max(request.batch - mode.staleness, 0) <= numbers[0] <= numbers[-1] <= request.batch
    assert {fleet.left[draw] for draw in range(6)} == {0}
    in_fleet = sum(server.load for server in fleet.servers) + len(fleet.queue)
    assert in_fleet == sum(fleet.left.values())


def test_more_servers_finish_a_draw_earlier() -> None:
    """True where the batch is not spread over more than it has: a step costs less with fewer sequences."""
    seconds = [sampled(servers(count, 64, COST), heavy(0)) for count in (1, 2, 4, 8)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 1.5 * seconds[-1]


def test_the_same_arguments_give_the_same_answer_and_another_seed_another() -> None:
    def run() -> Simulated:
        return simulate(heavy_loop(over_sampled(2), servers(4, 16, COST)), record=True)

    assert run() == run()
    assert Lengths(400, 1.0, 4000).draw(8, 3, 1) != Lengths(400, 1.0, 4000).draw(8, 4, 1)


@pytest.mark.parametrize("mean", [4000, 9000, 14_000])
def test_lengths_have_the_mean_that_was_asked_for_after_the_cut(mean: int) -> None:
    drawn = Lengths(mean, 0.8, 31_744).draw(20_000, 0)
    error = 3 * 31_744 / 2 / math.sqrt(len(drawn))  # a standard deviation is at most half the range
    assert sum(drawn) / len(drawn) == pytest.approx(mean, abs=error)
    assert max(drawn) == 31_744
    assert Lengths(50, 0.0, 100).draw(3, 0) == [50, 50, 50]


def test_the_occupancy_over_time_adds_up_to_its_mean() -> None:
    found = simulate(heavy_loop(over_sampled(2), servers(4, 16, COST)), record=True)
    first, last = found.begins[0], found.begins[-1]
    times = [*(time for time, _ in found.samples), last]
    area = sum(
        count * max(0.0, min(end, last) - max(start, first))
        for (start, count), end in zip(found.samples, times[1:], strict=True)
    )
    assert area / (last - first) / 4 == pytest.approx(found.occupancy)
