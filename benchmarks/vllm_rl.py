"""GRPO with the embedded engine and with vLLM servers, from one SFT checkpoint: a row each in
results/vllm_rl.csv.

    python -m benchmarks.vllm_rl runs/quickstart/sft [--steps 80] [--servers 2] [--kill-at 40]

Needs `make vllm-deps` (or PHI4R_VLLM_PYTHON). Both runs train on the tiny recipe's problems with the same
seed; a run that was interrupted goes on where it stopped, and rows are written when both are complete.
With `--kill-at N` one of the servers is killed (-9) while it samples, after N steps.
Columns: date (UTC), commit, dirty, cpu, engine, servers, steps, seed, settings (what was changed), killed_at
(0: nothing was killed), accuracy
of the rollouts over the first and the last `window` steps, held-out avg@8 with its 95% interval, mean and
largest difference between the sampler's and the trainer's log-probs over all steps (nats), smallest effective
sample share of a step, answers that were asked for again, servers that failed, mean seconds of a step and of
its parts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.rows import append_rows, provenance
from benchmarks.suite import require_vllm

WINDOW = 5
COLUMNS = [
    "date", "commit", "dirty", "cpu", "engine", "servers", "steps", "seed", "settings", "killed_at", "window",
    "accuracy_first", "accuracy_last", "avg_at_8", "low", "high", "mean_length", "mean_gap", "max_gap",
    "min_effective_sample_share", "requeued", "failures", "step_s", "sync_s", "rollout_s", "train_s",
]  # fmt: skip


def row_of(run_dir: Path, steps: int) -> dict[str, Any]:
    """The measured columns of one finished run and its evaluation."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    if len(metrics) != steps:
        raise SystemExit(f"{run_dir}: {len(metrics)} of {steps} steps are done: run the same command again")
    summary = json.loads((run_dir / "eval" / "summary.json").read_text(encoding="utf-8"))

    def column(name: str) -> np.ndarray:
        return np.array([row.get(name, 0.0) for row in metrics], dtype=float)

    found = {
        "accuracy_first": column("accuracy")[:WINDOW].mean(),
        "accuracy_last": column("accuracy")[-WINDOW:].mean(),
        "avg_at_8": summary["avg_at_8"],
        "low": summary["ci95"][0],
        "high": summary["ci95"][1],
        "mean_length": summary["mean_length"],
        "mean_gap": column("logprob_gap").mean(),
        "max_gap": column("max_logprob_gap").max(),
        "min_effective_sample_share": column("effective_sample_share").min(),
        "requeued": column("rollout_requeued").sum(),
        "failures": column("rollout_failures").sum(),
        **{f"{part}_s": column(f"{part}_seconds").mean() for part in ("step", "sync", "rollout", "train")},
    }
    return {"window": WINDOW, **{name: float(f"{value:.4g}") for name, value in found.items()}}


def kill_a_server(trainer: subprocess.Popen[bytes], run_dir: Path, after: int) -> None:
    """Wait until `after` steps are logged, then kill the engine of one of the trainer's servers where it has
    requests."""
    metrics = run_dir / "metrics.jsonl"
    while trainer.poll() is None:
        if metrics.exists() and len(metrics.read_bytes().splitlines()) >= after:
            break
        time.sleep(0.2)
    for process in psutil.Process(trainer.pid).children(recursive=True):
        if process.name().startswith("VLLM::Engine"):
            before = sum(process.cpu_times()[:2])
            while trainer.poll() is None and sum(process.cpu_times()[:2]) < before + 0.5:
                time.sleep(0.05)  # between rollouts it does nothing
            print(f"killing {process.name()} ({process.pid}) after step {after}", flush=True)
            process.kill()
            return
    raise SystemExit("found no engine process of a vLLM server to kill")


def run(command: list[str], run_dir: Path, kill_at: int) -> None:
    """Run `command` to its end, perhaps killing one of its servers."""
    trainer = subprocess.Popen(command)
    if kill_at:
        threading.Thread(target=kill_a_server, args=(trainer, run_dir, kill_at), daemon=True).start()
    if trainer.wait():
        raise SystemExit(f"ended with exit code {trainer.returncode}: {' '.join(command)}")


def main() -> int:
    """Run what is still to do, evaluate, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="the SFT run folder or checkpoint that both start from")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--kill-at", type=int, default=0, help="kill a server after this many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/vllm_rl"))
    parser.epilog = "What stands after -- is passed on to phi4r rl."
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    options, settings_given = parser.parse_args(given[:end]), given[end + 1 :]
    require_vllm(parser)
    engines = {
        "embedded": [],
        "vllm": ["--sampling.engine", "vllm", "--vllm.num_servers", str(options.servers)],
    }
    program = [sys.executable, "-m", "phi4r"]
    for engine, settings in engines.items():
        run_dir = options.folder / engine
        run(
            [
                *program, "rl", "tiny", "--run-dir", str(run_dir), "--init.checkpoint", options.checkpoint,
                "--train.num_steps", str(options.steps), "--seed", str(options.seed),
                *settings, *settings_given,
            ],
            run_dir,
            options.kill_at if engine == "vllm" else 0,
        )  # fmt: skip
        if not (run_dir / "eval" / "summary.json").exists():
            subprocess.run(
                [
                    *program,
                    "eval",
                    str(run_dir),
                    "modchain",
                    "--run-dir",
                    str(run_dir / "eval"),
                    "--runs",
                    "8",
                ],
                check=True,
            )
    shared = {**provenance("phi4r", "kernels"), "steps": options.steps, "seed": options.seed}
    shared["settings"] = " ".join(settings_given)
    rows = [
        {
            **shared,
            "engine": engine,
            "servers": options.servers if engine == "vllm" else 0,
            "killed_at": options.kill_at if engine == "vllm" else 0,
            **row_of(options.folder / engine, options.steps),
        }
        for engine in engines
    ]
    if options.kill_at and not rows[-1]["failures"]:
        raise SystemExit("no server failed though one was to be killed: no row is written")
    print(f"written to {append_rows('vllm_rl', COLUMNS, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
