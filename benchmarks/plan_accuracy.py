"""What `phi4r plan` says of a run beside what the run measures, over layouts; appends rows to
results/plan_accuracy.csv.

    python -m benchmarks.plan_accuracy [--recipe tiny] [--steps 4] [--layouts "tp=2; pp=2"] [--section.key v]

Each layout is trained for a few steps by `phi4r sft` on this machine; what is left over of the command line
goes to it. Columns: date (UTC), commit, dirty (the tree had changes), cpu, recipe, layout, ranks, device,
planned_bytes and measured_bytes: weights, gradients and optimizer state on the fullest rank;
peak_planned_gib and peak_measured_gib: the allocator's peak ("" on a CPU, which has none); step_s: the median
step but for the first, and step_planned_s: the plan's step for rows that one document fills ("" on a CPU, for
which it has no rates).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import append_rows, provenance
from phi4r.configs.load import load_stage
from phi4r.plan.hardware import GPUS, load_rates
from phi4r.plan.memory import GIB
from phi4r.plan.speed import Work, step_time

COLUMNS = [
    "date", "commit", "dirty", "cpu", "recipe", "layout", "ranks", "device", "planned_bytes",
    "measured_bytes", "peak_planned_gib", "peak_measured_gib", "step_planned_s", "step_s",
]  # fmt: skip
LAYOUTS = "tp=1; dp=2; tp=2; tp=2 sp=true; pp=2; cp=2"


def words_of(layout: str) -> list[str]:
    """`tp=2 sp=true` as words of the command line."""
    return [f"--parallel.{pair}" for pair in layout.split()]


def gpu_columns(rank: dict[str, Any], config: Any, num_ranks: int) -> dict[str, Any]:
    """Device, peaks of the fullest rank and the planned step, where the run was on GPUs."""
    import torch

    name = torch.cuda.get_device_name()
    found: dict[str, Any] = {
        "device": name,
        "peak_planned_gib": f"{rank['planned_peak'] / GIB:.2f}",
        "peak_measured_gib": f"{rank['measured_peak'] / GIB:.2f}",
    }
    gpu = next((gpu for gpu in GPUS.values() if gpu.name in name.upper()), None)
    if gpu and config.model.vocab_size:
        per_node = min(num_ranks, torch.cuda.device_count())
        planned = step_time(config, load_rates(gpu), per_node, Work(config.data.seq_length, 0))
        found["step_planned_s"] = f"{planned.total:.3f}"
    return found


def run(recipe: str, layout: str, steps: int, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Train `steps` steps in one layout and compare."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "phi4r", "sft", recipe, "--run-dir", str(run_dir)]
        command += ["--train.num_steps", str(steps), "--checkpoint.save_final", "false"]
        subprocess.run([*command, *words_of(layout), *extra], check=True, stdout=subprocess.DEVNULL)
        ranks = json.loads((run_dir / "memory.json").read_text(encoding="utf-8"))["ranks"]
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        config = load_stage("sft", str(run_dir)).config
    fullest = max(ranks, key=lambda rank: sum(rank["measured"].values()))
    seconds = [json.loads(line)["step_seconds"] for line in lines][1:]
    row: dict[str, Any] = {
        "recipe": recipe, "layout": layout, "ranks": len(ranks), "device": "cpu",
        "planned_bytes": sum(fullest["planned"].values()),
        "measured_bytes": sum(fullest["measured"].values()),
        "step_s": f"{statistics.median(seconds):.3f}",
    }  # fmt: skip
    if "measured_peak" in fullest:
        row |= gpu_columns(max(ranks, key=lambda rank: rank["measured_peak"]), config, len(ranks))
    return row


def main() -> int:
    """Runs, prints and appends a row for each layout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--steps", type=int, default=4, help="at least 2")
    parser.add_argument("--layouts", default=LAYOUTS)
    options, extra = parser.parse_known_args()
    shared = provenance("phi4r", "benchmarks/plan_accuracy.py")
    for layout in options.layouts.split(";"):
        row = run(options.recipe, layout.strip(), options.steps, extra)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        append_rows("plan_accuracy", COLUMNS, [shared | row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
