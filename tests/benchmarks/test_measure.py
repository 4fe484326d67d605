"""What is made of measured times, on times that are known."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter

import pytest
import torch

from benchmarks.measure import (
    Ceilings,
    Timing,
    WrongResultError,
    ceilings,
    checked_error,
    interleave,
    orders,
    peak_bytes,
    ratio,
    relative_error,
    rotations,
)


def test_quantiles_of_known_times() -> None:
    timing = Timing((5.0, 1.0, 4.0, 2.0, 3.0))
    assert timing.p50 == 3.0
    assert timing.quantile(0.0) == 1.0
    assert timing.quantile(1.0) == 5.0
    assert timing.quantile(0.2) == pytest.approx(1.8)
    assert timing.quantile(0.8) == pytest.approx(4.2)
    assert Timing((7.0,)).quantile(0.8) == 7.0


def test_a_clock_that_drifts_does_not_move_a_ratio() -> None:
    # The machine slows down fourfold on the way; one implementation always takes twice the other's time.
    slowing = [1.0, 1.0, 2.0, 4.0, 4.0]
    slow = Timing(tuple(2 * t for t in slowing))
    fast = Timing(tuple(slowing))
    assert ratio(slow, fast) == 2.0
    # One disturbed round of the fast one does not move it either.
    assert ratio(slow, Timing((1.0, 9.0, 2.0, 4.0, 4.0))) == 2.0


def test_a_ratio_pairs_rounds_instead_of_medians() -> None:
    a, b = Timing((1.0, 10.0, 100.0)), Timing((1.0, 1.0, 200.0))
    assert a.p50 / b.p50 == 10.0
    assert ratio(a, b) == 1.0


def test_every_name_comes_first_and_before_each_other_equally_often() -> None:
    names = ["a", "b", "c"]
    seen = [orders(names, i) for i in range(6)]
    assert Counter(order[0] for order in seen) == {"a": 2, "b": 2, "c": 2}
    for x, y in itertools.permutations(names, 2):
        assert sum(order.index(x) < order.index(y) for order in seen) == 3
    assert all(sorted(order) == names for order in seen)


def test_interleaving_gives_everyone_the_same_number_of_samples() -> None:
    timings, failed = interleave(
        {"short": lambda i: time.sleep(0.001), "long": lambda i: time.sleep(0.02)}, 0.0, "cpu", min_rounds=4
    )
    assert failed == {}
    assert {name: len(timing.times_ms) for name, timing in timings.items()} == {"short": 4, "long": 4}
    # Sleeping takes at least as long as it says: times are per call, in ms.
    assert min(timings["long"].times_ms) >= 20
    assert min(timings["short"].times_ms) >= 1


def test_a_call_that_fails_falls_out_with_its_reason_and_the_others_stay() -> None:
    def broken(i: int) -> None:
        raise RuntimeError(f"cannot do\n  {i}")

    timings, failed = interleave({"broken": broken, "fine": lambda i: None}, 0.0, "cpu", min_rounds=3)
    assert list(timings) == ["fine"]
    assert failed == {"broken": "RuntimeError: cannot do 0"}
    assert interleave({"broken": broken}, 0.0, "cpu") == ({}, {"broken": "RuntimeError: cannot do 0"})


def test_calls_count_up_so_that_inputs_rotate() -> None:
    seen: list[int] = []

    def call(i: int) -> None:
        seen.append(i)
        time.sleep(0.004)

    interleave({"call": call}, 0.0, "cpu", min_rounds=5)
    assert seen[2:] == [0, 1, 2, 3, 4]
    assert rotations(1e12, "cpu") == 2


def test_errors_are_relative_to_the_reference_and_the_worst_output_counts() -> None:
    ref = torch.tensor([3.0, 4.0], dtype=torch.float64)
    off = ref + torch.tensor([0.0, 0.05], dtype=torch.float64)
    assert relative_error([off.to(torch.float32)], [ref]) == pytest.approx(0.01, rel=1e-5)
    assert relative_error([ref, off], [ref, ref]) == pytest.approx(0.01, rel=1e-9)
    assert relative_error([ref], [ref]) == 0.0


@pytest.mark.parametrize("wrong", [[3.0, math.nan], [3.0, math.inf], [3.0, 4.5]])
def test_a_wrong_result_is_no_result(wrong: list[float]) -> None:
    with pytest.raises(WrongResultError):
        checked_error([torch.tensor(wrong)], [torch.tensor([3.0, 4.0])])


def test_an_output_of_another_shape_is_wrong() -> None:
    with pytest.raises(WrongResultError):
        relative_error([torch.ones(3)], [torch.ones(1, 3)])


def test_the_least_time_is_that_of_the_binding_ceiling() -> None:
    limits = Ceilings(gemm_tflops=800, copy_gb_s=4000)
    assert limits.best_ms(flops=800e9, num_bytes=0) == pytest.approx(1.0)
    assert limits.best_ms(flops=0, num_bytes=4e6) == pytest.approx(0.001)
    assert limits.best_ms(flops=800e9, num_bytes=8e9) == pytest.approx(2.0)


def test_ceilings_are_measured_here_and_a_cpu_has_no_peak_memory() -> None:
    found = ceilings("cpu", 0.0)
    assert found.gemm_tflops > 0
    assert found.copy_gb_s > 0
    assert ceilings("cpu", 0.0) is found
    assert peak_bytes(lambda i: torch.ones(10), "cpu") is None
