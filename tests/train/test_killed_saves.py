"""kill -9 at random moments while a real run writes its checkpoints: the next start finds a whole one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLED_RUNS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
import phi4r.cli.main, phi4r.parallel.launch as launch
from phi4r.train import folders
launch.find_target("phi4r.train.sft:main")  # imported once: what is forked below starts at once

run_dir, kills = Path(sys.argv[1]), int(sys.argv[2])
words = json.loads(sys.argv[3])
rng = random.Random(int(sys.argv[4]))
log = run_dir.parent / "output.txt"

def start():
    pid = os.fork()
    if pid == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1); os.dup2(out, 2)
        phi4r.cli.main.main(words)
    return pid

def half_written():
    found = set()
    for path in folders.checkpoints_folder(run_dir).glob(".tmp-*"):
        try:
            found.add(path.stat().st_ino)
        except FileNotFoundError:  # it has got its name meanwhile
            pass
    return found

for number in range(kills):
    before = folders.find_latest(run_dir)
    seen = half_written()
    num_old = len(seen)  # what the kill before left
    pid = start()
    wanted = 1 + number % 3  # kill during the first, second or third save of this attempt
    deadline = time.monotonic() + 120
    while len(seen) < wanted + num_old:
        seen |= half_written()
        assert os.waitpid(pid, os.WNOHANG)[0] == 0, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
    time.sleep(rng.uniform(0, 0.06))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    folder = folders.checkpoints_folder(run_dir)
    said = log.read_text().split("after step ")
    whole = folders.all_steps(run_dir).values()
    print(json.dumps({
        "resumed": int(said[1].split()[0]) if len(said) > 1 else 0,
        "before": folders.step_of(before) if before else 0,
        "half": len(list(folder.glob(".*-step_*"))),
        "damage": [problem for path in whole for problem in folders.damage(path)],
    }), flush=True)
"""

BIGGER = [
    "sft", "tiny", "--model.hidden_size", "192", "--model.num_layers", "4", "--model.ffn_hidden_size", "512",
    "--data.num_generated", "400", "--data.heldout", "0", "--train.num_steps", "100000",
    "--train.global_batch_size", "1", "--checkpoint.every", "1", "--data.seq_length", "64",
]  # fmt: skip


def killed_runs(tmp_path: Path, kills: int) -> None:
    run_dir = tmp_path / "run"
    words = json.dumps([*BIGGER, "--run-dir", str(run_dir)])
    seed = int.from_bytes(os.urandom(4), "big")
    done = subprocess.run(
        [sys.executable, "-c", KILLED_RUNS, str(run_dir), str(kills), words, str(seed)],
        capture_output=True, text=True, check=False, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == kills
    for number, row in enumerate(rows):
        assert row["damage"] == [], (seed, number)
        assert int(row["resumed"]) == row["before"], (
            seed,
            number,
            "it resumes from the newest whole checkpoint",
        )
    assert sum(row["half"] > 0 for row in rows) > kills // 3, (
        "the kills came while a checkpoint was being written"
    )
    assert rows[-1]["before"] > 0


@pytest.mark.proves(
    "Runs killed while saving resume from a whole checkpoint", how="kill -9 at random moments"
)
def test_runs_killed_while_saving_resume_from_a_whole_checkpoint(tmp_path: Path) -> None:
    killed_runs(tmp_path, 5)


@pytest.mark.slow
def test_25_runs_killed_while_saving_resume_from_a_whole_checkpoint(tmp_path: Path) -> None:
    killed_runs(tmp_path, 25)
