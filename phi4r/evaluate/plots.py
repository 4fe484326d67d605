"""The report's figures: each function takes plain data and returns a matplotlib Figure; `png_bytes` renders
it.

No pyplot and no global state: figures are built with the object interface on the Agg canvas, so nothing needs
a display and two reports can be made at once. A stage keeps its colour in every figure (Okabe and Ito's
palette, distinct for colour-blind readers), lines are labelled where they end instead of in a legend, and
uncertainty is always drawn.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from phi4r.evaluate import statistics
from phi4r.evaluate.results import Results

Metrics = Sequence[Mapping[str, Any]]

STAGE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B8860B")
INK, MUTED, FAINT = "#1f2933", "#5f6b7a", "#e6e9ee"
RIGHT, WRONG = "#0072B2", "#b9c0ca"
WIDTH = 6.2  # inches of a full-width figure
DPI = 200  # twice the 100 dots per inch at which pages show them

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.edgecolor": "#c3cad3",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "svg.hashsalt": "phi4r",
}


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG at `DPI`. Figures built alike give equal bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one axes, in inches, built under the report's style."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        yield figure, figure.subplots()


def stage_colours(names: Sequence[str]) -> dict[str, str]:
    """Colour by stage name, the same in every figure: SFT and GRPO have their own, others take the rest in
    order.
    """
    known = {"SFT": STAGE_COLOURS[0], "GRPO": STAGE_COLOURS[1]}
    if not any(name in known for name in names):
        known = {}
    rest = [colour for colour in STAGE_COLOURS if colour not in known.values()]
    others = [name for name in names if name not in known]
    colours = {name: rest[index % len(rest)] for index, name in enumerate(others)}
    return {name: known.get(name) or colours[name] for name in names}


def percent_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))


def grid_only(axes: Axes, which: Literal["x", "y"]) -> None:
    axes.grid(False)
    axes.grid(True, axis=which)


# --- training curves


def series(metrics: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (float64) of one key: rows without it, or where it is not finite, are left out."""
    points = {}
    for row in metrics:
        value = row.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            points[row["step"]] = float(value)
    steps = sorted(points)
    return np.array(steps, dtype=np.float64), np.array([points[step] for step in steps])


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over about a twentieth of the curve: centred, so it starts at the first value; over what
    there is at the right end, so that the last point is a mean too.
    """
    half = len(values) // 40
    if half == 0:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low = index - np.minimum(index, half)
    high = np.minimum(np.minimum(2 * index, index + half) + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str = "") -> None:
    """Raw values faint, their running mean strong, an optional label at the right end."""
    mean = smooth(values)
    if mean is not values:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.9)
    axes.plot(steps, mean, color=colour, linewidth=1.9)
    if label:
        end_label(axes, steps[-1], float(mean[-1]), label, colour)


def end_label(axes: Axes, x: float, y: float, text: str, colour: str, dy: float = 0.0) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(6, dy),
        textcoords="offset points",
        color=colour,
        va="center",
        fontsize=9,
        fontweight="bold",
        annotation_clip=False,
    )


def spread_labels(axes: Axes, labels: Sequence[tuple[float, float, str, str]], gap: float = 13.0) -> None:
    """Labels (x, y, text, colour) to the right of their points, moved apart vertically to at least `gap`
    points.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    if len(labels) > 1:
        figure.draw_without_rendering()  # settles the layout, on which the distances depend
    ordered = sorted(labels, key=lambda label: label[1])
    points = [(x, y) for x, y, _, _ in ordered]
    heights = axes.transData.transform(points)[:, 1] * 72.0 / figure.dpi
    wanted = heights.copy()
    for _ in range(20):  # push neighbours apart from both sides until they fit
        for i in range(len(wanted) - 1):
            overlap = gap - (wanted[i + 1] - wanted[i])
            if overlap > 0:
                wanted[i] -= overlap / 2
                wanted[i + 1] += overlap / 2
    for (x, y, text, colour), height, place in zip(ordered, heights, wanted, strict=True):
        end_label(axes, x, y, text, colour, dy=float(place - height))


def sft_loss(metrics: Metrics) -> Figure | None:
    """Training and held-out loss of SFT (nats per target token) against the step; None without a `loss`."""
    steps, loss = series(metrics, "loss")
    if len(steps) == 0:
        return None
    with _figure(WIDTH, 3.4) as (figure, axes):
        axes.set_title("Loss (nats per target token)")
        axes.set_xlabel("step")
        _curve(axes, steps, loss, STAGE_COLOURS[0])
        labels = [(steps[-1], float(smooth(loss)[-1]), f"training {smooth(loss)[-1]:.3f}", STAGE_COLOURS[0])]
        held_steps, held = series(metrics, "heldout_loss")
        if len(held_steps):
            axes.plot(
                held_steps, held, color=INK, marker="o", markersize=4, linewidth=1.2, markerfacecolor="white"
            )
            labels.append((held_steps[-1], float(held[-1]), f"held out {held[-1]:.3f}", INK))
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        spread_labels(axes, labels)
    return figure


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small chart of training metrics: which keys it shows and how."""

    title: str
    keys: Mapping[str, str]
    """Metric key -> label at the line's end ("" for a single line)."""
    colour: str = STAGE_COLOURS[1]
    percent: bool = False
    log: bool = False
    note: str = ""
    """What a reader should look for, under the chart."""


SFT_PANELS: dict[str, Panel] = {
    "grad_norm": Panel(
        title="Gradient norm",
        keys={"grad_norm": ""},
        colour=STAGE_COLOURS[0],
        note="Before clipping. Spikes mean that one batch pulled hard.",
    ),
    "lr": Panel(title="Learning rate", keys={"lr": ""}, colour=STAGE_COLOURS[0]),
}
RL_PANELS: dict[str, Panel] = {
    "reward": Panel(
        title="Reward",
        keys={"reward": ""},
        note="Mean reward of the rollouts, in [-1, 8/13]. Should rise, then level off.",
    ),
    "accuracy": Panel(
        title="Accuracy of rollouts",
        keys={"accuracy": ""},
        percent=True,
        note="Share of sampled answers that are right, on fresh training problems.",
    ),
    "response_length": Panel(
        title="Response length (tokens)",
        keys={"response_length": ""},
        note="Longer means that the model learned to write its reasoning down.",
    ),
    "entropy": Panel(
        title="Entropy (nats per token)",
        keys={"entropy": ""},
        note="How much the policy still explores. A fall to zero ends learning.",
    ),
    "kl": Panel(
        title="KL divergence (nats per token)",
        keys={"kl_old": "old", "kl_ref": "ref"},
        note="Distance to the policy that sampled (old) and to the frozen start (ref). The first stays at 0 "
        "when every rollout is used once.",
    ),
    "zero_variance": Panel(
        title="Groups without signal",
        keys={"zero_variance_share": ""},
        percent=True,
        note="Share of groups whose answers all got the same reward: they teach nothing.",
    ),
    "logprob_gap": Panel(
        title="Sampler against trainer",
        keys={"logprob_gap": ""},
        log=True,
        note="|log-prob difference| between the rollout engine and the trainer. Should be rounding noise.",
    ),
    "grad_norm": Panel(
        title="Gradient norm",
        keys={"grad_norm": ""},
        note="Before clipping. Spikes mean that one batch pulled hard.",
    ),
}


def panel_figure(metrics: Metrics, panel: Panel) -> Figure | None:
    """One small chart of a run's metrics; None where the run logged none of its keys."""
    lines = [(label, *series(metrics, key)) for key, label in panel.keys.items()]
    lines = [line for line in lines if len(line[1])]
    if not lines:
        return None
    colours = [panel.colour] if len(lines) == 1 else [MUTED, panel.colour]
    with _figure(3.7, 2.4) as (figure, axes):
        axes.set_title(panel.title)
        axes.set_xlabel("step")
        log = panel.log and all((values > 0).all() for _, _, values in lines)
        if log:
            axes.set_yscale("log")
            every = np.concatenate([values for _, _, values in lines])
            axes.set_ylim(
                10 ** math.floor(math.log10(every.min())), 10 ** math.ceil(math.log10(every.max()) + 0.05)
            )
            axes.yaxis.set_minor_locator(NullLocator())
        labels = []
        for (label, steps, values), colour in zip(lines, colours, strict=True):
            _curve(axes, steps, values, colour)
            last = float(smooth(values)[-1])
            text = _short_percent(last) if panel.percent else _short_number(last)
            labels.append((float(steps[-1]), last, f"{label} {text}".strip(), colour))
        if panel.percent:
            percent_axis(axes, "y")
        elif not log:
            if min(values.min() for _, _, values in lines) >= 0:
                axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_number(value)))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.margins(x=0.02, y=0.12 if not log else 0)
        spread_labels(axes, labels)
    return figure


def _short_number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < 1e-4 or abs(value) >= 1e5 else f"{value:.3g}"


def _short_percent(value: float) -> str:
    return f"{100 * value:.0f}%" if 0.1 <= value <= 0.9 or value in (0, 1) else f"{100 * value:.1f}%"


# --- evaluation


def accuracy_by_stage(summaries: Mapping[str, Mapping[str, Any]]) -> Figure:
    """avg@k of every stage with its 95% interval, and a faint dot for every single run."""
    colours = stage_colours(list(summaries))
    with _figure(WIDTH, 1.25 + 0.55 * len(summaries)) as (figure, axes):
        axes.set_title("Accuracy: mean over all runs, 95% interval, single runs")
        for row, (name, summary) in enumerate(summaries.items()):
            low, high = summary["ci95"]
            runs = summary["accuracy_by_run"]
            axes.plot(
                runs,
                [row] * len(runs),
                "|",
                color=colours[name],
                alpha=0.45,
                markersize=15,
                markeredgewidth=1.4,
            )
            axes.plot([low, high], [row, row], color=colours[name], linewidth=3.4, solid_capstyle="round")
            axes.plot(
                summary["avg_at_k"], row, "o", color=colours[name], markersize=9, markeredgecolor="white"
            )
            axes.annotate(
                f"{100 * summary['avg_at_k']:.1f}%",
                (summary["avg_at_k"], row),
                xytext=(0, 11),
                textcoords="offset points",
                ha="center",
                color=colours[name],
                fontweight="bold",
            )
        axes.set_yticks(range(len(summaries)), list(summaries), color=INK, fontsize=10.5)
        axes.set_ylim(len(summaries) - 0.4, -0.75)
        axes.set_xlim(-0.01, 1.02)
        axes.spines["left"].set_visible(False)
        percent_axis(axes, "x")
        grid_only(axes, "x")
    return figure


def run_to_run(results: Mapping[str, Results]) -> Figure:
    """Kernel density of the accuracy of single runs, cut to [0, 1], with a rug of the runs; one row per
    stage, each scaled to its own peak.
    """
    colours = stage_colours(list(results))
    with _figure(WIDTH, 0.8 + 0.85 * len(results)) as (figure, axes):
        axes.set_title("Accuracy of a single run")
        everything = []
        for row, (name, result) in enumerate(results.items()):
            runs, colour, base = (
                statistics.run_distribution(result.correct),
                colours[name],
                len(results) - 1 - row,
            )
            everything += [*runs.accuracies, *runs.grid]
            if len(runs.grid):
                height = base + 0.72 * runs.density / runs.density.max()
                axes.fill_between(runs.grid, base, height, color=colour, alpha=0.18, linewidth=0)
                axes.plot(runs.grid, height, color=colour, linewidth=1.8)
            axes.axhline(base, color=FAINT, linewidth=0.8, zorder=0)
            axes.plot(
                runs.accuracies, np.full(len(runs.accuracies), base - 0.08), "|", color=colour, markersize=7
            )
            spread = "" if math.isnan(runs.std) else f" \u00b1 {100 * runs.std:.1f}"
            axes.annotate(
                f"{name}\n{100 * runs.mean:.1f}{spread}%",
                (0, base),
                xycoords=("axes fraction", "data"),
                xytext=(-8, 14),
                textcoords="offset points",
                ha="right",
                va="center",
                color=colour,
                fontweight="bold",
            )
        low, high = min(everything), max(everything)
        pad = 0.04 * max(high - low, 0.05)
        axes.set_xlim(max(0.0, low - pad), min(1.0, high + pad) + 0.002)
        axes.set_xlabel("accuracy of one run (labels: mean \u00b1 standard deviation over runs)")
        axes.set_yticks([])
        axes.set_ylim(-0.2, len(results) - 0.15)
        axes.spines["left"].set_visible(False)
        percent_axis(axes, "x")
        grid_only(axes, "x")
    return figure


def accuracy_against_tokens(
    results: Mapping[str, Results], summaries: Mapping[str, Mapping[str, Any]]
) -> Figure:
    """Accuracy when responses are cut at L tokens, against L; the marker is (mean length, accuracy) with both
    intervals.
    """
    colours = stage_colours(list(results))
    longest = max(int(result.tokens.max()) for result in results.values())
    budgets = np.arange(longest + 1) if longest < 4000 else np.linspace(0, longest, 2000)
    with _figure(WIDTH, 3.6) as (figure, axes):
        axes.set_title("Accuracy within a budget of tokens per answer")
        labels = []
        for name, result in results.items():
            colour, summary = colours[name], summaries[name]
            accuracy = statistics.accuracy_at_budget(result.correct, result.tokens, budgets)
            axes.step(budgets, accuracy, where="post", color=colour, linewidth=1.9)
            labels.append((float(longest), float(accuracy[-1]), name, colour))
            mean, (low, high) = summary["mean_length"], summary["mean_length_ci95"]
            y, (bottom, top) = summary["avg_at_k"], summary["ci95"]
            axes.errorbar(
                mean,
                y,
                xerr=[[mean - low], [high - mean]],
                yerr=[[y - bottom], [top - y]],
                fmt="o",
                color=colour,
                markersize=8,
                markeredgecolor="white",
                elinewidth=1.8,
                zorder=4,
            )
        axes.set_xlabel("tokens allowed per answer (dots: mean tokens used)")
        axes.set_ylim(-0.02, 1.04)
        axes.set_xlim(0, longest)
        percent_axis(axes, "y")
        spread_labels(axes, labels)
    return figure


def length_histograms(results: Mapping[str, Results]) -> Figure:
    """How long the answers are, by stage (one row each), right answers coloured and wrong ones grey."""
    longest = max(int(result.tokens.max()) for result in results.values())
    width = max(1, math.ceil((longest + 1) / 40))
    edges = np.arange(0, longest + 2 * width, width) - 0.5
    colours = stage_colours(list(results))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 1.35 * len(results)))
        rows = figure.subplots(len(results), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, result) in zip(rows, results.items(), strict=True):
            right, _ = np.histogram(result.tokens[result.correct], edges)
            wrong, _ = np.histogram(result.tokens[~result.correct], edges)
            total = result.tokens.size
            axes.bar(edges[:-1], right / total, width * 0.92, align="edge", color=colours[name])
            axes.bar(edges[:-1], wrong / total, width * 0.92, align="edge", color=WRONG, bottom=right / total)
            axes.text(
                1.0,
                0.94,
                name,
                transform=axes.transAxes,
                ha="right",
                va="top",
                color=colours[name],
                weight="bold",
            )
            text = f"mean {result.tokens.mean():.1f} tokens"
            axes.text(
                1.0, 0.76, text, transform=axes.transAxes, ha="right", va="top", color=MUTED, fontsize=9
            )
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.yaxis.set_major_locator(MaxNLocator(3))
            grid_only(axes, "y")
            axes.set_xlim(-0.5, edges[-1])
        rows[0].set_title("Response lengths: right answers coloured, wrong ones grey")
        rows[-1].set_xlabel("tokens in the response")
    return figure


def pass_at_k_curves(summaries: Mapping[str, Mapping[str, Any]]) -> Figure:
    """pass@k (solid, with its 95% band) and maj@k (dashed) against k, by stage."""
    colours = stage_colours(list(summaries))
    with _figure(WIDTH, 3.6) as (figure, axes):
        axes.set_title("pass@k (solid, 95% band) and maj@k (dashed)")
        labels = []
        largest = 1
        for name, summary in summaries.items():
            colour = colours[name]
            ks = [int(k) for k in summary["pass_at_k"]]
            values = [row["value"] for row in summary["pass_at_k"].values()]
            low, high = np.array([row["ci95"] for row in summary["pass_at_k"].values()]).T
            axes.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(ks, values, color=colour, marker="o", markersize=4.5, linewidth=1.9)
            majority = [row["value"] for row in summary["maj_at_k"].values()]
            axes.plot(ks, majority, color=colour, linestyle=(0, (4, 2)), linewidth=1.4)
            labels.append((float(ks[-1]), values[-1], f"{name} {100 * values[-1]:.1f}%", colour))
            largest = max(largest, ks[-1])
        axes.set_xscale("log", base=2)
        ticks = [2**power for power in range(largest.bit_length())]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("k, answers per problem")
        axes.set_ylim(0, 1.06)
        percent_axis(axes, "y")
        spread_labels(axes, labels)
    return figure


def accuracy_by_difficulty(summaries: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Accuracy by the difficulty of the problems, a line per stage; None where there are not two
    difficulties.
    """
    if any(len(summary["by_difficulty"]) < 2 for summary in summaries.values()):
        return None
    colours = stage_colours(list(summaries))
    with _figure(WIDTH, 3.4) as (figure, axes):
        axes.set_title("Accuracy by difficulty of the problem")
        labels = []
        for name, summary in summaries.items():
            x = [row["difficulty"] for row in summary["by_difficulty"]]
            y = [row["accuracy"] for row in summary["by_difficulty"]]
            axes.plot(x, y, color=colours[name], marker="o", markersize=5, linewidth=1.9)
            labels.append((x[-1], y[-1], name, colours[name]))
        axes.set_xlabel("difficulty (in the unit of the task)")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_ylim(-0.02, 1.04)
        percent_axis(axes, "y")
        spread_labels(axes, labels)
    return figure


# --- curation


def curation_funnel(stages: Sequence[tuple[str, int, int]]) -> Figure:
    """What each curation stage kept and removed: `stages` holds (name, kept, removed) in order."""
    start = max(stages[0][1] + stages[0][2], 1)
    with _figure(WIDTH, 0.7 + 0.5 * (len(stages) + 1)) as (figure, axes):
        axes.set_title("Problems left after each stage of curation")
        rows = [("raw", start, 0), *stages]
        for row, (_, kept, removed) in enumerate(rows):
            axes.barh(row, kept, 0.62, color=STAGE_COLOURS[0])
            axes.barh(row, removed, 0.62, left=kept, color="#f0c9b0")
            text = f"{kept:,}" + (f"   \u2212{removed:,}" if removed else "")
            axes.text(kept + removed + start * 0.012, row, text, va="center", fontsize=9.5, color=INK)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], color=INK, fontsize=10)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, start * 1.2)
        axes.set_xticks([])
        axes.grid(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
    return figure
