"""Pictures of result rows: a roofline and the scaling with the number of tokens.

    python -m benchmarks.plot attention [--results FOLDER] [--out FOLDER]

Takes the newest row of every implementation, mode, case and size on the device of the newest row, and draws
OP_scaling.png (tokens against TFLOP/s, GB/s or ms, a panel per mode and case) and, where there are FLOPs and
bytes, OP_roofline.png (FLOPs per byte against TFLOP/s, under the measured product and copy ceilings, at the
largest size).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, read_rows

Row = dict[str, str]
OURS = ("#b2182b", "#ef6548", "#fdbb84")
PEERS = ("#08519c", "#238b45", "#6a51a3", "#737373", "#41b6c4", "#a6761d", "#1d1d1d")
MARKERS = "osD^vP*X"


def newest(rows: Sequence[Row]) -> list[Row]:
    """The last row of every (op, mode, case, impl, tokens), of the device that the last row is from."""
    device = rows[-1]["device"]
    keys = ("op", "mode", "case", "impl", "tokens")
    found = {
        tuple(row[key] for key in keys): row for row in rows if row["device"] == device and row["p50_ms"]
    }
    return list(found.values())


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour per implementation: reds for ours, other ones for the rest."""
    names = list(dict.fromkeys(row["impl"] for row in rows))
    ours = [name for name in names if name.startswith("ours")]
    others = [name for name in names if name not in ours]
    return {name: OURS[i % len(OURS)] for i, name in enumerate(ours)} | {
        name: PEERS[i % len(PEERS)] for i, name in enumerate(others)
    }


def measure_of(rows: Sequence[Row]) -> tuple[str, str]:
    """(column, axis label): TFLOP/s where FLOPs were counted, else GB/s, else ms."""
    if any(row["tflops"] for row in rows):
        return "tflops", "TFLOP/s"
    if any(row["gb_s"] for row in rows):
        return "gb_s", "GB/s"
    return "p50_ms", "ms"


def _figure(panels: int, width: float = 4.2) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(panels, 4)
    lines = math.ceil(panels / columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(width * columns, 3.4 * lines + 0.9), squeeze=False, layout="constrained"
    )
    flat = list(axes.flat)
    for axis in flat[panels:]:
        axis.set_visible(False)
    for axis in flat:
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, flat[:panels]


def _legend(figure: Any, palette: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    names = list(palette)
    handles = [
        Line2D([], [], color=palette[name], marker=MARKERS[i % len(MARKERS)], markersize=5)
        for i, name in enumerate(names)
    ]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4), frameon=False)


def _title(rows: Sequence[Row], what: str) -> str:
    last = rows[-1]
    device = last["cpu"] if last["device"] == "cpu" else last["device"]
    return f"{last['op']} {what}: {device}, {last['dtype']}, torch {last['torch']}, commit {last['commit']}"


def draw_scaling(rows: Sequence[Row], path: Path) -> bool:
    """Tokens against the measure, a panel per op, mode and case, median with the 20% to 80% band."""
    column, label = measure_of(rows)
    palette = colours(rows)
    panels = sorted({(row["op"], row["mode"], row["case"]) for row in rows})
    figure, axes = _figure(len(panels))
    for axis, panel in zip(axes, panels):
        for i, name in enumerate(palette):
            chosen = [r for r in rows if (r["op"], r["mode"], r["case"]) == panel and r["impl"] == name]
            chosen = sorted((r for r in chosen if r[column]), key=lambda r: int(r["tokens"]))
            if not chosen:
                continue
            x = [int(r["tokens"]) for r in chosen]
            y = [float(r[column]) for r in chosen]
            marker = MARKERS[i % len(MARKERS)]
            axis.plot(x, y, color=palette[name], marker=marker, markersize=4, linewidth=1.4)
            if column != "p50_ms":
                low = [v * float(r["p50_ms"]) / float(r["p80_ms"]) for v, r in zip(y, chosen)]
                high = [v * float(r["p50_ms"]) / float(r["p20_ms"]) for v, r in zip(y, chosen)]
                axis.fill_between(x, low, high, color=palette[name], alpha=0.15, linewidth=0)
        axis.set_xscale("log", base=2)
        ticks = sorted({int(r["tokens"]) for r in rows if (r["op"], r["mode"], r["case"]) == panel})
        axis.set_xticks(ticks, [_count(n) for n in ticks])
        axis.set_xticks([], minor=True)
        axis.set_ylim(bottom=0)
        axis.set_title(" ".join(panel), fontsize=10)
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
    _legend(figure, palette)
    figure.suptitle(_title(rows, "against the number of tokens"), fontsize=10)
    _save(figure, path)
    return True


def _count(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else str(n)


def _roof(axis: Any, rows: Sequence[Row], palette: dict[str, str], gemm: float, copy: float) -> None:
    """One mode's points under the two ceilings, each case at its own FLOPs per byte."""
    from matplotlib.ticker import LogLocator, NullFormatter

    cases = {row["case"]: float(row["flops"]) / float(row["bytes"]) for row in rows}
    ridge = gemm * 1e3 / copy
    x = [min(*cases.values(), ridge) / 3, ridge, max(*cases.values(), ridge) * 3]
    axis.plot(x, [min(n * copy / 1e3, gemm) for n in x], color="#222222", linewidth=1.5)
    axis.annotate(f"product {gemm:.3g} TFLOP/s", (x[2], gemm), ha="right", va="bottom", fontsize=8)
    axis.annotate(f"copy {copy:,.4g} GB/s", (x[0], x[0] * copy / 1e3), ha="left", va="bottom", fontsize=8)
    names = list(palette)
    for row in rows:
        marker = MARKERS[names.index(row["impl"]) % len(MARKERS)]
        axis.plot(cases[row["case"]], float(row["tflops"]), marker, color=palette[row["impl"]], alpha=0.85)
    axis.set_xscale("log")
    axis.set_yscale("log")
    lowest = min(min(float(row["tflops"]) for row in rows), x[0] * copy / 1e3) / 3
    axis.set_ylim(lowest, 1.5 * gemm)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    for place, case in enumerate(sorted(cases, key=lambda name: cases[name])):
        # Cases close to each other take turns in height.
        axis.annotate(
            case, (cases[case], lowest * (1.15 if place % 2 else 1.45)), ha="center", va="bottom", fontsize=8
        )
    axis.set_xlabel("FLOPs per byte that must move")
    axis.set_ylabel("TFLOP/s")


def draw_roofline(rows: Sequence[Row], path: Path) -> bool:
    """FLOPs per byte against TFLOP/s at the largest size; False where nothing has both."""
    rows = [row for row in rows if row["tflops"] and row["bytes"]]
    if not rows:
        return False
    largest = max(int(row["tokens"]) for row in rows)
    rows = [row for row in rows if int(row["tokens"]) == largest]
    gemm = statistics.median(float(row["gemm_tflops"]) for row in rows)
    copy = statistics.median(float(row["copy_gb_s"]) for row in rows)
    palette = colours(rows)
    modes = sorted({row["mode"] for row in rows})
    figure, axes = _figure(len(modes), width=max(5.0, 9.0 / len(modes)))
    for axis, mode in zip(axes, modes):
        _roof(axis, [row for row in rows if row["mode"] == mode], palette, gemm, copy)
        axis.set_title(f"{rows[0]['op']} {mode}", fontsize=10)
    _legend(figure, palette)
    figure.suptitle(_title(rows, f"under both ceilings, {_count(largest)} tokens"), fontsize=10)
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> int:
    """Draw what the op's rows allow; exit code 1 without rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", help="the name of a file in --results, without .csv")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: --results")
    parser.add_argument(
        "--kinds", nargs="+", choices=("scaling", "roofline"), default=["scaling", "roofline"]
    )
    options = parser.parse_args()
    source = options.results / f"{options.op}.csv"
    rows = read_rows(source) if source.exists() else []
    if not rows or "p50_ms" not in rows[0]:
        print(f"benchmarks.plot: {source} has no rows of a comparison", file=sys.stderr)
        return 1
    chosen = newest(rows)
    out = options.out or options.results
    for kind in options.kinds:
        path = out / f"{options.op}_{kind}.png"
        drawn = draw_scaling(chosen, path) if kind == "scaling" else draw_roofline(chosen, path)
        print(f"drawn: {path}" if drawn else f"not drawn: {path} (no FLOPs and bytes in the rows)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
