"""Who was busy when in a GRPO run: the trainer and the rollout engines on one time axis.

Read from the column `timeline` of metrics.jsonl. The axis is the time during which the run was running: what
lies between two starts of it is left out, and steps that were done again after a kill count once, as the log
has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from phi4r.evaluate import plots
from phi4r.evaluate.findings import duration

TRAINER, ROLLOUTS = "trainer", "rollouts"
SHOWN_STEPS = 4
"""Steps at the end of the run whose phases are drawn as bars."""
BINS = 200
"""Means over time that a long run's shares are drawn as, at most."""
LABELS = {
    "train": ("training", plots.STAGE_COLOURS[0]),
    "sampling": ("sampling", plots.STAGE_COLOURS[2]),
    "sync": ("giving weights to the sampler", plots.STAGE_COLOURS[1]),
    "rollout": ("waiting for samples, grading them", "#d5dae1"),
    "start": ("starting", plots.STAGE_COLOURS[3]),
    "data": ("reading data", plots.STAGE_COLOURS[4]),
    "eval": ("evaluating", plots.STAGE_COLOURS[5]),
}


@dataclass(frozen=True)
class Span:
    """`what` was done from `start` to `end`, in seconds of the run."""

    what: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """lanes: the spans of `TRAINER` and `ROLLOUTS`, in order and without overlap; steps: (number, its begin),
    in order; end: of the last step; restarts: when the run was taken up again."""

    lanes: dict[str, list[Span]]
    steps: list[tuple[int, float]]
    end: float
    restarts: list[float]

    def shares(self, lane: str, what: str, edges: np.ndarray) -> np.ndarray:
        """Share of the time from each edge to the next in which `lane` did `what`; edges [N], seconds."""
        spans = [(span.start, span.end) for span in self.lanes[lane] if span.what == what]
        if not spans:
            return np.zeros(len(edges) - 1)
        busy = np.cumsum([(0.0, end - start) for start, end in spans])
        return np.diff(np.interp(edges, np.ravel(spans), busy)) / np.diff(edges)

    def share(self, lane: str, what: str) -> float:
        """Share of the whole run in which `lane` did `what`."""
        return float(self.shares(lane, what, np.array([0.0, self.end]))[0])


def read_timeline(metrics: plots.Metrics) -> Timeline | None:
    """The timeline of a run's rows; None where none of them has one."""
    rows = {row["step"]: row["timeline"] for row in metrics if row.get("timeline")}
    trainer, sampling = list[Span](), list[Span]()
    steps, restarts = list[tuple[int, float]](), list[float]()
    session = shift = end = 0.0
    for number in sorted(rows):
        spans = {lane: [s[1:] for s in rows[number] if s[0] == lane] for lane in (TRAINER, ROLLOUTS)}
        if not spans[TRAINER]:
            continue
        what, began, _ = spans[TRAINER][0]
        if what == "start" or not steps:  # this process's first step: nothing of it lies before
            session, shift = end, began - end
            if steps:
                restarts.append(end)
        own = [Span(what, start - shift, stop - shift) for what, start, stop in spans[TRAINER]]
        trainer += own
        steps.append((number, own[0].start))
        end = own[-1].end
        for _, start, stop in spans[ROLLOUTS]:
            sampling.append(Span("sampling", max(start - shift, session), stop - shift))
    if not steps or end <= 0:
        return None
    return Timeline({TRAINER: trainer, ROLLOUTS: _union(sampling)}, steps, end, restarts)


def _union(spans: Sequence[Span]) -> list[Span]:
    """The same times, with spans that touch or overlap made one: several draws may be sampled at once."""
    merged = list[Span]()
    for span in sorted(spans, key=lambda span: span.start):
        if merged and span.start <= merged[-1].end:
            merged[-1] = Span(span.what, merged[-1].start, max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return merged


def caption(timeline: Timeline) -> str:
    """The shares in a sentence."""
    train, sync, waited = (timeline.share(TRAINER, what) for what in ("train", "sync", "rollout"))
    text = (
        f"Over {len(timeline.steps):,} steps and {duration(timeline.end)} the trainer trained for"
        f" {train:.0%} of the time, gave weights to the sampler for {sync:.0%} and waited for samples or"
        f" graded them for {waited:.0%}; the rollout engines sampled for"
        f" {timeline.share(ROLLOUTS, 'sampling'):.0%}. Below: the last steps. White: idle, or logging and"
        " checkpoints."
    )
    if timeline.restarts:
        text += " Dashed: the run was taken up again; the time between is left out."
    return text


def figure(timeline: Timeline) -> Figure:
    """Above, how busy trainer and rollout engines were over the run; below, what they did in its last
    steps."""
    with matplotlib.rc_context(plots.STYLE):
        made = Figure(figsize=(plots.WIDTH, 4.4))
        top, bottom = made.subplots(2, 1, height_ratios=[3, 2])
        top.set_title("Share of the time that each side is busy")
        _shares(top, timeline)
        shown = timeline.steps[-SHOWN_STEPS:]
        first, last = shown[0][0], shown[-1][0]
        name = f"Steps {first} to {last}" if last > first else f"Step {last}"
        bottom.set_title(f"{name}, second by second")
        _bars(bottom, timeline, shown[0][1])
        used = {span.what for lane in timeline.lanes.values() for span in lane if span.end > shown[0][1]}
        kinds = [kind for what, kind in LABELS.items() if what in used]
        patches = [Patch(color=colour, label=label) for label, colour in kinds]
        made.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return made


def _unit(seconds: float) -> tuple[float, str]:
    for size, name in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return size, name
    return 1.0, "seconds"


def _shares(axes: Axes, timeline: Timeline) -> None:
    """A line each: a mean per step, or per bin of several steps where there are many; the label says, and
    stands at, the mean of the run."""
    begins = [begin for _, begin in timeline.steps]
    every = -(-len(begins) // BINS)
    edges = np.array([0.0, *begins[every::every], timeline.end])
    size, unit = _unit(timeline.end)
    axes.set_xlabel(f"{unit} of the run")
    labels = []
    for lane, what, text in ((TRAINER, "train", "trainer"), (ROLLOUTS, "sampling", "rollouts")):
        shares = timeline.shares(lane, what, edges)
        colour, mean = LABELS[what][1], timeline.share(lane, what)
        axes.stairs(shares, edges / size, baseline=None, color=colour, linewidth=1.6)
        labels.append((timeline.end / size, mean, f"{text} {mean:.0%}", colour))
    for restart in timeline.restarts:
        axes.axvline(restart / size, color=plots.MUTED, linestyle="--", linewidth=1.0)
    axes.set_ylim(0, 1.03)
    plots.percent_axis(axes, "y")
    axes.margins(x=0)
    plots.spread_labels(axes, labels)


def _bars(axes: Axes, timeline: Timeline, start: float) -> None:
    """The lanes from `start` on, one above the other."""
    size, unit = _unit(timeline.end - start)
    axes.set_xlabel(f"{unit} of the run")
    for row, (lane, spans) in enumerate(timeline.lanes.items()):
        for span in spans:
            if span.end > start:
                left = max(span.start, start) / size
                axes.barh(-row, span.end / size - left, 0.62, left, color=LABELS[span.what][1], linewidth=0)
        across = axes.get_yaxis_transform()
        axes.text(-0.01, -row, lane, transform=across, ha="right", va="center", fontsize=9)
    for number, begin in timeline.steps:
        if begin >= start:
            axes.axvline(begin / size, color=plots.INK, linewidth=0.8)
            axes.annotate(
                str(number), (begin / size, 0.4), xytext=(2, 0), textcoords="offset points", fontsize=8,
                color=plots.MUTED, va="bottom",
            )  # fmt: skip
    for restart in timeline.restarts:
        if restart >= start:
            axes.axvline(restart / size, color=plots.MUTED, linestyle="--", linewidth=1.0)
    axes.set_xlim(start / size, timeline.end / size)
    axes.set_ylim(-1.5, 0.75)
    axes.set_yticks([])
    plots.grid_only(axes, "x")
