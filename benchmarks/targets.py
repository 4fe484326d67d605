"""What was aimed at on an H200, beside what the newest rows say.

    python -m benchmarks.targets [--results FOLDER]

"must" is what a release needs, "goal" what is aimed at; packed is the log-normal mix. Measured: the best of
our implementations in the newest rows, of the device that the last row of each file is from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.plot import Row, newest
from benchmarks.rows import RESULTS, read_rows

TOKENS = 32_768


@dataclass(frozen=True)
class Target:
    """One line: where its rows are, how it is read off them (None: not measured), what it should reach."""

    name: str
    op: str
    read: Callable[[Sequence[Row]], float | None]
    unit: str
    must: float | None
    goal: float | None
    less_is_better: bool = False


def _best(column: str, rows: Sequence[Row], less_is_better: bool = False) -> float | None:
    values = [float(row[column]) for row in rows if row["impl"].startswith("ours") and row.get(column)]
    return (min(values) if less_is_better else max(values)) if values else None


def _at(rows: Sequence[Row], tokens: int = TOKENS, **wanted: str) -> list[Row]:
    return [
        row for row in rows if row["tokens"] == str(tokens) and all(row[k] == v for k, v in wanted.items())
    ]


def _tflops(mode: str, case: str) -> Callable[[Sequence[Row]], float | None]:
    return lambda rows: _best("tflops", _at(rows, mode=mode, case=case))


def _faster_than(impl: str, mode: str = "grpo") -> Callable[[Sequence[Row]], float | None]:
    def read(rows: Sequence[Row]) -> float | None:
        there = [row for row in _at(rows, mode=mode, impl=impl) if row["against"].startswith("ours")]
        return float(there[0]["ratio"]) if there else None

    return read


def _memory_share(rows: Sequence[Row]) -> float | None:
    ours = _best("peak_mib", _at(rows, mode="grpo"), less_is_better=True)
    naive = [row for row in _at(rows, mode="grpo", impl="naive") if row["peak_mib"]]
    return ours / float(naive[0]["peak_mib"]) if ours is not None and naive else None


def _model_mfu(tokens: int) -> Callable[[Sequence[Row]], float | None]:
    def read(rows: Sequence[Row]) -> float | None:
        best = _best("model_mfu", _at(rows, tokens, mode="forward_backward"))
        return None if best is None else 100 * best

    return read


def _head(column: str, less_is_better: bool = False) -> Callable[[Sequence[Row]], float | None]:
    return lambda rows: _best(column, _at(rows, mode="grpo"), less_is_better)


_PACKED, _LESS = "lognormal", {"less_is_better": True}
TARGETS = (
    Target("attention, causal 32K: forward", "attention", _tflops("forward", "dense"), "TFLOP/s", 450, 600),
    Target("  backward", "attention", _tflops("backward", "dense"), "TFLOP/s", 330, 490),
    Target(
        "attention, packed 32K: forward", "attention", _tflops("forward", "lognormal"), "TFLOP/s", 400, 520
    ),
    Target("  backward", "attention", _tflops("backward", _PACKED), "TFLOP/s", 263, 380),
    Target("GRPO head 32K, of the bare products", "grpo_head", _head("percent_of_bound"), "%", 80, 90),
    Target("GRPO head 32K", "grpo_head", _head("p50_ms", True), "ms", 160, 142, **_LESS),
    Target("  over Liger, fp32 products", "grpo_head", _faster_than("liger_grpo_fp32"), "x", 8, None),
    Target("  over Liger, TF32 products", "grpo_head", _faster_than("liger_grpo_tf32"), "x", 3, None),
    Target("  over all logits at once", "grpo_head", _faster_than("naive"), "x", 1.25, None),
    Target("  memory over that of all logits", "grpo_head", _memory_share, "", 0.125, None, **_LESS),
    Target("  over a compiled chunk loop", "grpo_head", _faster_than("compiled_chunks"), "x", None, 1.05),
    Target("whole model, MFU at 8K", "step", _model_mfu(8192), "%", None, 50),
    Target("whole model, MFU at 32K", "step", _model_mfu(TOKENS), "%", None, 45),
)


def verdict(target: Target, value: float | None) -> str:
    """goal, must, below, or - where nothing was measured or aimed at."""
    if value is None:
        return "not measured"

    def reached(aim: float | None) -> bool:
        return aim is not None and (value <= aim if target.less_is_better else value >= aim)

    return "goal" if reached(target.goal) else "must" if reached(target.must) else "below"


def table(results: Path) -> list[str]:
    """The lines of the table, from the rows that are there."""
    rows: dict[str, list[Row]] = {}
    for op in {target.op for target in TARGETS}:
        path = results / f"{op}.csv"
        rows[op] = newest(read_rows(path)) if path.exists() else []
    devices = sorted({row["device"] for found in rows.values() for row in found})
    lines = [
        f"measured on: {', '.join(devices) or 'nothing'} (targets are for an H200)",
        f"{'':38} {'must':>8} {'goal':>8} {'measured':>10}",
    ]
    for target in TARGETS:
        value = target.read(rows[target.op])
        must, goal = ("-" if aim is None else f"{aim:g}" for aim in (target.must, target.goal))
        measured = "-" if value is None else f"{value:.4g}"
        lines.append(
            f"{target.name:38} {must:>8} {goal:>8} {measured:>10} {target.unit:8} {verdict(target, value)}"
        )
    return lines


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    print("\n".join(table(parser.parse_args().results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
