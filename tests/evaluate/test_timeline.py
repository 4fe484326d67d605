"""The timeline of a GRPO run: what is drawn is what was logged, on one axis, each lane doing one thing at a
time."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from phi4r.evaluate import timeline as timelines
from phi4r.evaluate.timeline import Timeline, caption, figure, read_timeline

BEGAN = 1_795_000_000.0


def row(step: int, *spans: tuple[str, float, float]) -> dict[str, Any]:
    """A line of metrics: spans in seconds of the clock; "sampling" is the rollout engines'."""
    return {
        "step": step,
        "reward": 0.0,
        "timeline": [
            ["rollouts" if what == "sampling" else "trainer", what, BEGAN + start, BEGAN + end]
            for what, start, end in spans
        ],
    }


def synchronous(first: int, count: int, began: float) -> list[dict[str, Any]]:
    """Steps of 10 s after a start of 2 s: 1 s sync, 6 s of waiting with 5 s of sampling in it, 3 s of
    training; 0.5 s between steps."""
    rows = []
    for index in range(count):
        t = began + 2 + 10.5 * index
        start = [("start", t - 2, t)] if index == 0 else []
        rows.append(
            row(first + index, *start, ("sync", t, t + 1), ("rollout", t + 1, t + 7),
                ("train", t + 7, t + 10), ("sampling", t + 1, t + 6))
        )  # fmt: skip
    return rows


def ahead(count: int) -> list[dict[str, Any]]:
    """One step off: each draw is sampled from the 2nd second of the step before until its own has waited
    for it, 8.2 s."""
    rows = []
    for index in range(count):
        t, sampled = 2 + 10.0 * index, (0.5 if index == 0 else -8.0)
        start = [("start", 0, t)] if index == 0 else []
        rows.append(
            row(index + 1, *start, ("rollout", t, t + 0.2), ("sync", t + 0.2, t + 1),
                ("rollout", t + 1, t + 2), ("train", t + 2, t + 10),
                ("sampling", t + sampled, t + sampled + (1 if index == 0 else 8.2)))
        )  # fmt: skip
    return rows


def read(rows: list[dict[str, Any]]) -> Timeline:
    found = read_timeline(rows)
    assert found is not None
    for spans in found.lanes.values():
        assert all(span.start < span.end for span in spans)
        assert all(a.end <= b.start + 1e-6 for a, b in itertools.pairwise(spans))
    return found


def test_the_spans_are_those_of_the_log_from_the_start_of_the_run() -> None:
    found = read(synchronous(1, 3, began=0.0))
    assert found.steps == [(1, 0.0), (2, 12.5), (3, 23.0)]
    assert found.end == 33.0
    trainer = [(s.what, s.start, s.end) for s in found.lanes["trainer"]]
    assert trainer[:5] == [
        ("start", 0, 2), ("sync", 2, 3), ("rollout", 3, 9), ("train", 9, 12), ("sync", 12.5, 13.5),
    ]  # fmt: skip
    assert [(s.start, s.end) for s in found.lanes["rollouts"]] == [(3, 8), (13.5, 18.5), (24, 29)]
    assert found.share("trainer", "train") == pytest.approx(9 / 33)
    assert found.share("rollouts", "sampling") == pytest.approx(15 / 33)
    edges = np.array([0.0, 10.0, 12.0, 12.5])
    assert found.shares("trainer", "train", edges) == pytest.approx([0.1, 1.0, 0.0])
    assert found.shares("trainer", "eval", edges) == pytest.approx([0, 0, 0])


def test_a_draw_that_was_sampled_ahead_lies_in_the_step_before() -> None:
    found = read(ahead(4))
    assert [(s.start, s.end) for s in found.lanes["rollouts"]] == [
        (2.5, 3.5), pytest.approx((4, 12.2)), pytest.approx((14, 22.2)), pytest.approx((24, 32.2)),
    ]  # fmt: skip
    assert found.share("rollouts", "sampling") == pytest.approx(25.6 / 42)
    assert found.share("trainer", "train") == pytest.approx(32 / 42)


def test_draws_that_are_sampled_at_once_are_one_busy_time() -> None:
    rows = [row(1, ("start", 0, 1), ("train", 1, 9), ("sampling", 1, 5), ("sampling", 3, 8)),
            row(2, ("train", 9, 12), ("sampling", 2, 4), ("sampling", 10, 11))]  # fmt: skip
    found = read(rows)
    assert [(s.start, s.end) for s in found.lanes["rollouts"]] == [(1, 8), (10, 11)]


def test_the_time_between_two_starts_of_a_run_is_left_out() -> None:
    night = 40_000.0
    found = read(synchronous(1, 2, began=0.0) + synchronous(3, 2, began=night))
    assert found.restarts == [22.5]
    assert found.end == 45.0
    assert [step for step, _ in found.steps] == [1, 2, 3, 4]
    assert found.steps[2] == (3, 22.5)
    assert found.share("trainer", "train") == pytest.approx(12 / 45)
    assert "taken up again" in caption(found)
    # a draw of the step before the kill is not sampled anew, and one that was begun then is cut at the start
    rows = synchronous(1, 1, began=0.0) + [
        row(2, ("start", 100, 102), ("train", 102, 104), ("sampling", 90, 103))
    ]
    found = read(rows)
    assert [(s.start, s.end) for s in found.lanes["rollouts"]] == [(3, 8), (12, 15)]


def bars(axes: Any) -> dict[tuple[float, str], list[tuple[float, float]]]:
    """(row, colour) -> [(left, right)] of the bars that are drawn, in the axis's unit."""
    found: dict[tuple[float, str], list[tuple[float, float]]] = {}
    for patch in axes.patches:
        assert isinstance(patch, Rectangle)
        middle = round(patch.get_y() + patch.get_height() / 2, 6)
        key = (middle, "".join(f"{round(255 * part):02x}" for part in patch.get_facecolor()[:3]))
        found.setdefault(key, []).append((patch.get_x(), patch.get_x() + patch.get_width()))
    return found


@pytest.mark.parametrize("rows", [synchronous(1, 9, 0.0), ahead(9)], ids=["synchronous", "ahead"])
def test_the_bars_are_the_spans_of_the_last_steps(rows: list[dict[str, Any]]) -> None:
    found = read(rows)
    top, bottom = figure(found).axes
    begin = found.steps[-timelines.SHOWN_STEPS][1]
    drawn = bars(bottom)
    for height, lane in ((0.0, "trainer"), (-1.0, "rollouts")):
        for what in ("train", "sync", "rollout", "sampling"):
            spans = [
                (max(s.start, begin), s.end) for s in found.lanes[lane] if s.what == what and s.end > begin
            ]
            colour = timelines.LABELS[what][1].lower().removeprefix("#")
            found_bars = sorted(drawn.pop((height, colour), []))
            assert np.ravel(found_bars) == pytest.approx(np.ravel(spans))
    assert not drawn, "bars of something else"
    lines = [patch.get_data() for patch in top.patches]
    assert [line.edges[-1] for line in lines] == [found.end] * 2
    for line, (lane, what) in zip(lines, (("trainer", "train"), ("rollouts", "sampling")), strict=True):
        weights = np.diff(line.edges)
        assert (line.values * weights).sum() / found.end == pytest.approx(found.share(lane, what))


def test_a_long_run_is_drawn_as_means_over_several_steps() -> None:
    found = read(synchronous(1, 1000, 0.0))
    line = figure(found).axes[0].patches[0].get_data()
    assert len(line.values) == timelines.BINS
    assert line.values[1:-1] == pytest.approx(np.full(timelines.BINS - 2, 3 / 10.5))


def test_a_log_without_times_has_no_timeline() -> None:
    assert read_timeline([]) is None
    assert read_timeline([{"step": 1, "reward": 0.5}]) is None
