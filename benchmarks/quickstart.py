"""Runs the quick start with several seeds and appends a row per seed to results/quickstart.csv.

    python -m benchmarks.quickstart [--seeds 0 1 2] [--folder runs/seeds] [-- --parallel.tp 2 ...]

Every seed tried is written, whatever came out. Columns: date (UTC), commit, dirty, cpu, seed, settings (what
was changed), accuracy after SFT and after GRPO (avg@8 on held-out problems) with their 95% intervals, the
paired gain with its interval, mean response lengths in tokens, and seconds of the whole run.
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
    "date", "commit", "dirty", "cpu", "seed", "settings", "sft_avg_at_8", "sft_low", "sft_high",
    "grpo_avg_at_8", "grpo_low", "grpo_high", "gain", "gain_low", "gain_high", "sft_length", "grpo_length",
    "seconds",
]  # fmt: skip


def row_of(summary: dict[str, Any]) -> dict[str, Any]:
    """The measured columns of one run's summary.json."""
    row: dict[str, Any] = {}
    for stage in ("sft", "grpo"):
        part = summary[stage]
        row |= {
            f"{stage}_avg_at_8": part["avg_at_8"],
            f"{stage}_low": part["ci95"][0],
            f"{stage}_high": part["ci95"][1],
            f"{stage}_length": part["mean_length"],
        }
    gain = summary["gain"]
    row |= {"gain": gain["mean"], "gain_low": gain["ci95"][0], "gain_high": gain["ci95"][1]}
    row = {name: round(value, 4) for name, value in row.items()}
    return {**row, "seconds": summary["seconds"]["total"]}


def main() -> int:
    """Run the seeds one after another, each in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    parser.add_argument("settings", nargs="*", help="passed on to phi4r quickstart, after --")
    options = parser.parse_args()
    shared = provenance("phi4r", "kernels")
    for seed in options.seeds:
        folder = options.folder / f"seed_{seed}"
        command = [sys.executable, "-m", "phi4r", "quickstart", "--run-dir", str(folder), "--seed", str(seed)]
        subprocess.run([*command, *options.settings], check=True)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        row = {**shared, "seed": seed, "settings": " ".join(options.settings), **row_of(summary)}
        print(f"written to {append_rows('quickstart', COLUMNS, [row])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
