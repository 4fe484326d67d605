"""The picture of `phi4r plan --simulate --plot FILE`: step time by split and mode, and what is in flight over
time. The only part of the plan that needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from phi4r.core.errors import UserError
from phi4r.plan.simulate import Simulated
from phi4r.plan.split import COUNTED_STEPS, Plan

COLOURS = ("#0072B2", "#E69F00", "#009E73")
MUTED = "#5f6b7a"


def draw(plan: Plan, path: Path) -> None:
    """Write the picture; the ending of `path` says which format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    names = [mode.name for mode in plan.modes]
    splits = sorted(plan.splits, key=lambda split: split.trainer_nodes)
    width = 0.8 / len(names)
    for index, (name, colour) in enumerate(zip(names, COLOURS, strict=True)):
        places = [row + (index - 1) * width for row in range(len(splits))]
        heights = [split.results[name].mean_step_s for split in splits]
        bars = left.bar(places, heights, width * 0.92, color=colour, label=name)
        left.bar_label(bars, [f"{height:.0f}" for height in heights], fontsize=7.5, color=MUTED)
    left.set_xticks(range(len(splits)), [split.name for split in splits])
    left.set_xlabel("nodes: trainer + servers")
    left.set_title(f"Seconds per step, answers of {plan.tokens:,} tokens", loc="left", fontsize=10.5)
    first = plan.splits[0]
    for mode, colour in zip(plan.modes, COLOURS, strict=True):
        found = plan.runs.run(mode, first.servers, first.candidate, plan.tokens, record=True)
        times, values = in_flight(found)
        right.step([time / 60 for time in times], values, where="post", color=colour, label=mode.name)
        right.plot([times[-1] / 60], [values[-1]], marker="o", color=colour, clip_on=False)
    right.set_xlabel("minutes")
    title = f"Answers in flight over {COUNTED_STEPS} steps, {first.name} nodes"
    right.set_title(title, loc="left", fontsize=10.5)
    right.margins(x=0)
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(True, axis="y", color="#e6e9ee")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    try:
        figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {error}") from None


def in_flight(found: Simulated) -> tuple[list[float], list[int]]:
    """(seconds since the first counted step began, sequences being sampled from each on)."""
    first, last = found.begins[0], found.begins[-1]
    before = [count for time, count in found.samples if time < first]
    shown = [(time - first, count) for time, count in found.samples if first <= time <= last]
    points = [(0.0, before[-1] if before else 0), *shown]
    return [time for time, _ in points] + [last - first], [count for _, count in points] + [points[-1][1]]
