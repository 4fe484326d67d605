"""Evaluation killed with SIGKILL at random moments: no finished answer is sampled twice, and the results are
those of an uninterrupted evaluation, byte for byte."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.multiprocess.test_resume import DEADLINE_S, finish, start

pytestmark = pytest.mark.multiprocess

RUNS, PROBLEMS = 4, 24
TRAINED = [
    "sft", "tiny", "--train.num_steps", "3", "--data.num_generated", "160", "--data.heldout", "8",
    "--optimizer.warmup_steps", "1",
]  # fmt: skip
SETTINGS = [
    "--eval.runs", str(RUNS), "--eval.num_problems", str(PROBLEMS), "--sampling.max_new_tokens", "60",
    "--sampling.num_slots", "3", "--sampling.temperature", "0.8", "--sampling.top_p", "0.95",
    "--sampling.top_k", "50", "--eval.bootstrap", "200",
]  # fmt: skip
FILES = ("results.jsonl", "summary.json")


def ledger_rows(run_dir: Path) -> list[dict]:
    """Every complete line of the ledger."""
    texts = [path.read_text() for path in sorted(run_dir.glob("ledger/answers_*.jsonl"))]
    return [json.loads(line) for text in texts for line in text.splitlines(keepends=True) if line[-1] == "\n"]


def kill_at_random(words: list[str], run_dir: Path, chance: random.Random) -> int:
    """Start, and SIGKILL the process group: while it starts, or when a random number of new answers are
    there. Returns their number."""
    process = start(words, run_dir)
    before, until = len(ledger_rows(run_dir)), time.monotonic() + DEADLINE_S
    wanted = before + chance.randrange(0, 16)
    while len(ledger_rows(run_dir)) < wanted and process.poll() is None:
        assert time.monotonic() < until, "no answers came"
        time.sleep(0.002)
    if wanted == before:
        time.sleep(chance.uniform(0, 5))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    return len(ledger_rows(run_dir)) - before


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint."""
    run_dir = Path(tmp_path_factory.mktemp("trained")) / "sft"
    finish(TRAINED, run_dir)
    return run_dir


def killed_and_whole(words: list[str], folder: Path, num_kills: int) -> None:
    """Kill an evaluation so often, finish it, and compare it with an uninterrupted one."""
    finish(words, folder / "whole")
    chance, added = random.Random(7), []
    for _ in range(num_kills):
        added.append(kill_at_random(words, folder / "killed", chance))
    finish(words, folder / "killed")
    rows = ledger_rows(folder / "killed")
    assert set(Counter(row["key"] for row in rows).values()) == {1}, "an answer was sampled twice"
    assert len(rows) == RUNS * PROBLEMS
    assert sum(count > 0 for count in added) >= num_kills / 3, "kills should fall between answers"
    for name in FILES:
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.proves(
    "Evaluation killed with SIGKILL samples no finished answer again and ends with the same results",
    how="results.jsonl and summary.json of an uninterrupted evaluation, byte for byte",
    layouts="one rank",
)
def test_a_killed_evaluation_asks_only_for_what_is_missing(
    trained: Path, tmp_path: Path, num_kills: int
) -> None:
    words = ["eval", str(trained), "modchain", *SETTINGS]
    killed_and_whole(words, tmp_path, num_kills)
    log = (tmp_path / "killed.log").read_text()
    assert f"of {RUNS * PROBLEMS} answers are in the ledger" in log
    assert "tokens/s" in log
