"""Trains the quick start's stages on one rank and on two, and appends how far apart their losses ever were.

    python -m benchmarks.layouts [--stages sft rl] [--layouts tp pp] [--folder D] [-- --train.num_steps 9 ...]

GRPO starts from the checkpoint of the one-rank SFT run. A folder that holds finished runs is not run again.
Columns of results/layouts.csv: date (UTC), commit, dirty, cpu, stage, layout ("tp 2": two tensor-parallel
ranks), settings (what was changed), steps, loss_difference (largest |difference| of a step's loss from one
rank's), at_step, grad_norm_difference (largest relative difference of the gradient norm).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.rows import append_rows, provenance

COLUMNS = [
    "date", "commit", "dirty", "cpu", "stage", "layout", "settings", "steps", "loss_difference", "at_step",
    "grad_norm_difference",
]  # fmt: skip


def train(stage: str, run_dir: Path, *more: str) -> list[dict[str, Any]]:
    """The metrics, a dictionary per step, of a whole run of `stage`."""
    command = [sys.executable, "-m", "phi4r", stage, "tiny", "--run-dir", str(run_dir), *more]
    subprocess.run(command, check=True)
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def compare(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> dict[str, Any]:
    """The measured columns. Raises ValueError where the runs have different steps."""
    if [row["step"] for row in found] != [row["step"] for row in expected]:
        raise ValueError(f"{len(found)} steps against {len(expected)}: one of the runs is not whole")
    pairs = list(zip(found, expected, strict=True))
    largest, step = max((abs(ours["loss"] - theirs["loss"]), ours["step"]) for ours, theirs in pairs)
    norm = max(
        abs(ours["grad_norm"] - theirs["grad_norm"]) / (theirs["grad_norm"] or 1.0)  # 0: a step left out
        for ours, theirs in pairs
    )
    return {
        "steps": len(pairs),
        "loss_difference": f"{largest:.1e}",
        "at_step": step,
        "grad_norm_difference": f"{norm:.1e}",
    }


def main() -> int:
    """Run each stage on one rank, then in each layout, and write a row per comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=["sft", "rl"], default=["sft", "rl"])
    parser.add_argument("--layouts", nargs="+", choices=["tp", "pp", "cp", "dp"], default=["tp", "pp"])
    parser.add_argument("--folder", type=Path, default=Path("runs/layouts"))
    parser.add_argument("settings", nargs="*", help="passed on to every run, after --")
    options = parser.parse_args()
    shared = {**provenance("phi4r", "kernels"), "settings": " ".join(options.settings)}
    for stage in options.stages:
        init = ["--init.checkpoint", str(options.folder / "sft_one")] if stage == "rl" else []
        expected = train(stage, options.folder / f"{stage}_one", *init, *options.settings)
        for layout in options.layouts:
            ranks = [f"--parallel.{layout}", "2"]
            found = train(stage, options.folder / f"{stage}_{layout}2", *init, *options.settings, *ranks)
            row = {**shared, "stage": stage, "layout": f"{layout} 2", **compare(found, expected)}
            print(f"{row} written to {append_rows('layouts', COLUMNS, [row])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
