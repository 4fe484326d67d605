"""Submitting tiny runs to the test cluster, through the real command line and the real job scripts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4r.train.log import WALL_CLOCK
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
# What two equal runs differ in: the clock, and who started them.
NOT_COMPARED = {*WALL_CLOCK, "slurm_restarts"}
MODEL = [
    "--model.hidden_size", "32", "--model.num_layers", "2", "--model.ffn_hidden_size", "64",
    "--model.head_dim", "8",
]  # fmt: skip
SFT = [
    "tiny", *MODEL, "--data.num_generated", "200", "--data.heldout", "0", "--data.seq_length", "64",
    "--train.global_batch_size", "2", "--train.eval_every", "0", "--optimizer.warmup_steps", "3",
    "--checkpoint.every", "10", "--checkpoint.keep_last", "1", "--parallel.threads", "1",
]  # fmt: skip

# A rank that is sent SIGUSR1 fails, and one that is sent SIGALRM hangs, wherever its code is just then.
PLANTED = """\
import signal, time
def planted_error(number, frame):
    raise RuntimeError("planted error")
def planted_hang(number, frame):
    time.sleep(100_000)
signal.signal(signal.SIGUSR1, planted_error)
signal.signal(signal.SIGALRM, planted_hang)
"""
# The nodes' GPUs are links to /dev/null, so what reports on them has to be a stand-in too: the GPUs of the
# node in the file `busy` are in use.
NVIDIA_SMI = """\
#!/bin/bash
used=3
[[ $SLURMD_NODENAME == "$(cat {folder}/busy 2>/dev/null)" ]] && used=70000
for index in 0 1 2 3; do echo "$index, $used"; done
"""


@dataclass
class Site:
    """A cluster and the folder of one test, with its launch/site.sh."""

    cluster: Cluster
    folder: Path

    def __post_init__(self) -> None:
        planted, programs = self.folder / "planted", self.folder / "bin"
        planted.mkdir(parents=True)
        programs.mkdir()
        (planted / "sitecustomize.py").write_text(PLANTED)
        (programs / "nvidia-smi").write_text(NVIDIA_SMI.format(folder=self.folder))
        (programs / "nvidia-smi").chmod(0o755)
        (self.folder / "site.sh").write_text(
            f"export PHI4R_PYTHON={sys.executable} PYTHONPATH={planted}:${{PYTHONPATH:-}}\n"
            f"export PATH={programs}:$PATH GLOO_SOCKET_IFNAME=lo PHI4R_WATCH_S=1 PHI4R_FREE_GIB=0.01\n"
        )

    def variables(self, **more: str) -> dict[str, str]:
        """The environment in which a user of this site submits."""
        return {"PHI4R_HOME": str(ROOT), "PHI4R_SITE": str(self.folder / "site.sh"), "COLUMNS": "200", **more}

    def phi4r(self, *words: object, **more: str) -> str:
        """The command line on the login node; its stdout."""
        return self.cluster.run(
            sys.executable, "-m", "phi4r", *words, cwd=self.folder, **self.variables(**more)
        )

    def launch(self, stage: str, *words: object, **more: str) -> int:
        """Submit with one CPU per task; the job's id."""
        command = ["launch", stage, *words, "--time", "60", "--parsable", "--sbatch", "--cpus-per-task=1"]
        return int(self.phi4r(*command, **more))

    def run(self, *words: object) -> None:
        """The same without SLURM, on this machine."""
        ended = subprocess.run(
            [sys.executable, "-m", "phi4r", *map(str, words)],
            cwd=self.folder,
            env={k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PHI4R_"))},
            capture_output=True,
            text=True,
            timeout=540,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what two equal runs differ in."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    return [{k: v for k, v in json.loads(line).items() if k not in NOT_COMPARED} for line in lines]


def step(run_dir: Path) -> int:
    """The newest logged step."""
    found = rows(run_dir)
    return int(found[-1]["step"]) if found else 0


def history(run_dir: Path) -> list[tuple[str, str]]:
    """(how, why) of every entry of the job script's history."""
    path = run_dir / "slurm" / "history.tsv"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line.split("\t")[3], line.split("\t")[4]) for line in lines]


def rank_pid(run_dir: Path, rank: int) -> int:
    """Process id of a rank that runs now: all nodes are this machine."""
    return int((run_dir / "logs" / "latest" / f"heartbeat_{rank:05d}").read_text().split()[1])


def wait_in_run(
    site: Site, run_dir: Path, what: str, condition: Callable[[], object], seconds: float
) -> None:
    """Wait for a condition of a run that goes on; fails at once when its job ends for good."""

    def over() -> bool:
        ended = {how for how, _ in history(run_dir)} & {"finished", "failed", "gave up"}
        assert not ended, f"waited for {what}, but the job has {ended}\n{story(run_dir)}"
        return bool(condition())

    site.cluster.wait_for(what, over, seconds, lambda: story(run_dir))


class Fault:
    """Something that is done to a run now. What came of it goes to benchmarks/results/slurm_faults.csv where
    PHI4R_SLURM_ROWS is set: the table of docs/slurm.md is made from it.
    """

    def __init__(self, run_dir: Path, fault: str) -> None:
        self.run_dir, self.fault = run_dir, fault
        self.attempt = (run_dir / "logs" / "latest").resolve().name
        self.began = time.time()

    def wait_for_steps(self, site: Site, seconds: float) -> None:
        """Until a later attempt has done a step."""

        def has_step() -> bool:
            latest = (self.run_dir / "logs" / "latest").resolve()
            log = latest / "rank_00000.log"
            if latest.name == self.attempt or not log.exists():
                return False
            return re.search(r"^sft \d+/", log.read_text(), re.MULTILINE) is not None

        wait_in_run(site, self.run_dir, f"a step after: {self.fault}", has_step, seconds)
        self.note("resumed")

    def note(self, outcome: str) -> None:
        """Write the row."""
        if not os.environ.get("PHI4R_SLURM_ROWS"):
            return
        from benchmarks.rows import append_rows, provenance

        row = provenance("launch", "phi4r", "tests/slurm")
        row |= {"fault": self.fault, "outcome": outcome, "seconds": f"{time.time() - self.began:.1f}"}
        append_rows("slurm_faults", list(row), [row])


def story(run_dir: Path) -> str:
    """Everything that a failed test should show."""
    text = [f"history: {history(run_dir)}", f"step {step(run_dir)}"]
    names = ("*.out", "*/rank_*.log", "*/srun.err", "*/check*.log", "*/check_srun.err", "*/error_*")
    for name in names:
        for path in sorted((run_dir / "logs").glob(name)):
            text.append(f"--- {path}\n{path.read_text()[-1500:]}")
    return "\n".join(text)
