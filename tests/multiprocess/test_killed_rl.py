"""GRPO killed with SIGKILL at 20 random moments: every prompt is sampled and trained on exactly once."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from phi4r.core.seeds import Stream, items_of_step
from tests.multiprocess.test_resume import DEADLINE_S, finish, metrics, start

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

NUM_KILLS, STEPS, PROBLEMS, PROMPTS, GROUP = 20, 60, 50, 4, 2
WORDS = [
    "rl", "tiny", "--train.num_steps", str(STEPS), "--checkpoint.every", "3", "--problems.num_generated",
    str(PROBLEMS), "--rollout.prompts_per_step", str(PROMPTS), "--rollout.group_size", str(GROUP),
    "--sampling.max_new_tokens", "8", "--objective.min_informative", "0",
    "--model.hidden_size", "32", "--model.num_layers", "2", "--model.ffn_hidden_size", "64",
    "--model.head_dim", "8",
]  # fmt: skip
MODES = {
    "synchronous": [],
    "one step ahead": ["--rollout.mode", "one_step", "--objective.importance_cap", "2"],
    "continuous": [
        "--rollout.mode", "continuous", "--objective.importance_cap", "2",
        "--sampling.num_slots", "10",
    ],
}  # fmt: skip


def newest_rollouts(run_dir: Path) -> int:
    """When the last step's samples were written, in ns; 0 before the first."""
    return max((path.stat().st_mtime_ns for path in run_dir.glob("rollouts/step_*.jsonl")), default=0)


def kill_at_random(words: list[str], run_dir: Path, chance: random.Random) -> int:
    """Start, and SIGKILL the whole process group: while it starts, or at most two seconds into its steps.
    Returns the steps that were logged."""
    process = start(words, run_dir)
    before, until = len(metrics(run_dir)), time.monotonic() + DEADLINE_S
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0, 5))
    else:
        newest = newest_rollouts(run_dir)
        while newest_rollouts(run_dir) == newest and process.poll() is None:
            assert time.monotonic() < until, "no rollouts came"
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 2))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    return len(metrics(run_dir)) - before


def rollouts(run_dir: Path, step: int) -> str:
    """What was trained on in a step, a line for each sample."""
    return (run_dir / f"rollouts/step_{step:06d}.jsonl").read_text()


def samples(text: str) -> list[tuple[int, int]]:
    """(problem, sample) of every line."""
    rows = map(json.loads, text.splitlines())
    return [(int(row["problem_id"].rsplit("-", 1)[1]), row["sample_index"]) for row in rows]


def drawn(step: int) -> list[tuple[int, int]]:
    """(problem, sample) of all that is due in a step."""
    items = items_of_step(PROBLEMS, 0, Stream.PROMPTS, step - 1, PROMPTS)
    return [(item, sample) for item in items for sample in range(GROUP)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.proves(
    "GRPO killed at random loses and repeats no prompt",
    how="20 times kill -9; prompts, samples and metrics of an uninterrupted run, equal",
    layouts="one rank",
)
def test_every_prompt_is_trained_on_exactly_once(mode: str, tmp_path: Path) -> None:
    words, chance = [*WORDS, *MODES[mode]], random.Random(mode)
    finish(words, tmp_path / "whole")
    progress = [kill_at_random(words, tmp_path / "killed", chance) for _ in range(NUM_KILLS)]
    assert any(steps > 0 for steps in progress)
    finish(words, tmp_path / "killed")
    for step in range(1, STEPS + 1):
        text = rollouts(tmp_path / "killed", step)
        assert samples(text) == drawn(step)
        assert text == rollouts(tmp_path / "whole", step)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
