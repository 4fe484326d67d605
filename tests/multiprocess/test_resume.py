"""A run that is killed with SIGKILL and started again leaves the metrics of a run that was never interrupted,
bit for bit."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from phi4r.data import build
from phi4r.data.shards import ShardRows
from phi4r.evaluate.timeline import read_timeline
from phi4r.train.log import WALL_CLOCK
from tests.data import corpus

pytestmark = pytest.mark.multiprocess

SFT = [
    "sft", "tiny", "--train.num_steps", "8", "--train.eval_every", "3", "--checkpoint.every", "2",
    "--checkpoint.keep_last", "1",
    "--data.num_generated", "160", "--data.heldout", "8", "--optimizer.warmup_steps", "3",
]  # fmt: skip
RL = [
    "rl", "tiny", "--train.num_steps", "6", "--checkpoint.every", "2", "--problems.num_generated", "24",
    "--rollout.prompts_per_step", "4", "--rollout.group_size", "4", "--sampling.max_new_tokens", "12",
    "--rollout.max_prompt_batches", "2", "--objective.min_informative", "0",
    "--objective.updates_per_rollout", "2",
]  # fmt: skip
CASES = {
    "sft": SFT,
    "sft-dp2": [*SFT, "--parallel.dp", "2"],
    "rl": RL,
    "rl-ahead": [
        *RL, "--rollout.mode", "one_step", "--objective.importance_cap", "2",
        "--rollout.curriculum", "pass_rate",
    ],
    # fewer slots than the 48 answers of three draws: beginnings are there at every checkpoint
    "rl-continuous": [
        *RL, "--rollout.mode", "continuous", "--objective.importance_cap", "2",
        "--sampling.num_slots", "20", "--rollout.curriculum", "pass_rate",
    ],
}  # fmt: skip
DEADLINE_S = 240


def start(words: list[str], run_dir: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "phi4r", *words, "--run-dir", str(run_dir)]
    with open(run_dir.parent / f"{run_dir.name}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def logged(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    rows = logged(run_dir)
    return [{key: value for key, value in row.items() if key not in WALL_CLOCK} for row in rows]


def finish(words: list[str], run_dir: Path) -> None:
    process = start(words, run_dir)
    assert process.wait(DEADLINE_S) == 0, (run_dir.parent / f"{run_dir.name}.log").read_text()[-3000:]


def kill_after(words: list[str], run_dir: Path, num_rows: int) -> None:
    """Start, and SIGKILL the whole process group as soon as `num_rows` steps are logged and a checkpoint,
    which is written beside the training, is there."""
    process = start(words, run_dir)
    until = time.monotonic() + DEADLINE_S
    while len(metrics(run_dir)) < num_rows or not (run_dir / "checkpoints" / "latest").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < until, "no metrics came"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.proves(
    "A run killed with SIGKILL continues bit for bit",
    how="metrics of an uninterrupted run, equal",
    layouts="one rank, dp 2",
)
def test_a_killed_run_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    words = CASES[name]
    finish(words, tmp_path / "whole")
    kill_after(words, tmp_path / "killed", 3)
    assert not (tmp_path / "killed" / "checkpoints" / f"step_{len(metrics(tmp_path / 'whole')):06d}").exists()
    finish(words, tmp_path / "killed")
    whole, resumed = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    assert [row["step"] for row in resumed] == list(range(1, len(whole) + 1))
    assert resumed == whole
    if "--rollout.mode" in words:
        assert [row["policy_lag"] for row in whole] == [0, 1, 1, 1, 1, 1]  # two draws a step
    if "continuous" in words:
        kept = (tmp_path / "whole" / "queue").glob("step_*.jsonl")
        lengths = {len(json.loads(line)["tokens"]) for path in kept for line in path.read_text().splitlines()}
        assert lengths & set(range(1, 12)), "a checkpoint has beginnings of answers"
    assert "resuming" in (tmp_path / "killed.log").read_text()
    for run, num_restarts in (("whole", 0), ("killed", 1)):
        check_timeline(logged(tmp_path / run), num_restarts)


def check_timeline(rows: list[dict[str, Any]], num_restarts: int) -> None:
    """The phases and the sampling of a run lie one after the other, and are as long as its columns say."""
    found = read_timeline(rows)
    assert found is not None
    assert len(found.restarts) == num_restarts
    assert [step for step, _ in found.steps] == [row["step"] for row in rows]
    for spans in found.lanes.values():
        assert all(a.end <= b.start + 1e-6 for a, b in itertools.pairwise(spans))
    rounding = 0.002 * len(rows)
    for lane, what in (("trainer", "train"), ("trainer", "rollout"), ("rollouts", "sampling")):
        seconds = sum(row.get(f"{what}_seconds", 0.0) for row in rows)
        assert found.share(lane, what) * found.end == pytest.approx(seconds, abs=2 * rounding)
    assert sum(row["step_seconds"] for row in rows) <= found.end + rounding


GOLOMB = (0, 1, 4, 9, 15, 22, 32, 34)
"""A Golomb ruler: no two pairs of marks are equally far apart, so that no two pairs have the same sum."""


@pytest.mark.proves(
    "Every row of packed shards is trained on once an epoch, over a kill and a change of dp",
    how="rows told by the number of targets that the ranks counted; kill -9",
    layouts="dp 2 -> dp 1",
)
def test_rows_come_once_an_epoch_over_a_kill_and_another_layout(tmp_path: Path) -> None:
    """Eight rows of one document each, of lengths whose sum over a step says which two rows it was."""
    content = [
        {"id": f"p{i}", "problem": f"{i}+1?", "answer": "3", "trace": "1" * (60 + mark)}
        for i, mark in enumerate(GOLOMB)
    ]
    path, shards = corpus.write_jsonl(tmp_path / "in.jsonl", content), tmp_path / "shards"
    build.main(corpus.config(path, "data.heldout=0"), shards, build.Options())
    targets = [int(row.loss_mask.sum()) for row in ShardRows(shards)]
    pairs = {targets[i] + targets[j]: (i, j) for i, j in itertools.combinations(range(8), 2)}
    assert len(pairs) == 28
    assert not {2 * count for count in targets} & pairs.keys(), "nor is it one row twice"

    words = [
        "sft", "tiny", "--data.path", str(shards), "--data.seq_length", "128", "--data.heldout", "0",
        "--train.global_batch_size", "2", "--train.num_steps", "12", "--checkpoint.every", "2",
        "--checkpoint.keep_last", "1", "--model.num_layers", "1", "--model.hidden_size", "32",
    ]  # fmt: skip
    kill_after([*words, "--parallel.dp", "2"], tmp_path / "run", 3)
    finish(words, tmp_path / "run")
    assert "resuming" in (tmp_path / "run.log").read_text()
    trained = [pairs[int(str(row["num_valid_tokens"]))] for row in metrics(tmp_path / "run")]
    epochs = [trained[first : first + 4] for first in (0, 4, 8)]
    assert len(trained) == 12
    assert all(sorted(itertools.chain(*epoch)) == list(range(8)) for epoch in epochs), trained
    assert epochs[0] != epochs[1], "each epoch has an order of its own"
