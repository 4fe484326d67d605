"""GRPO on vLLM servers, its trainer killed with SIGKILL at 20 random moments: every prompt is sampled and
trained on exactly once. The servers outlive the trainers, which find them by address."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multiprocess.test_killed_rl import (
    GROUP,
    NUM_KILLS,
    PROBLEMS,
    PROMPTS,
    drawn,
    kill_at_random,
    rollouts,
    samples,
)
from tests.multiprocess.test_resume import finish, metrics
from tests.vllm.conftest import persistent_servers

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 40
WORDS = [
    "rl", "tiny", "--train.num_steps", str(STEPS), "--checkpoint.every", "3", "--problems.num_generated",
    str(PROBLEMS), "--rollout.prompts_per_step", str(PROMPTS), "--rollout.group_size", str(GROUP),
    "--sampling.max_new_tokens", "8", "--objective.min_informative", "0", "--sampling.engine", "vllm",
]  # fmt: skip
MODES = {
    "synchronous": ["--vllm.transfer", "files"],
    "one step ahead": [
        "--vllm.transfer", "gloo", "--rollout.mode", "one_step", "--objective.importance_cap", "2",
    ],
    "continuous": [
        "--vllm.transfer", "gloo", "--rollout.mode", "continuous",
        "--objective.importance_cap", "2",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def addresses(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two servers for the model of these runs, ready for either way of transfer."""
    with persistent_servers(WORDS, vllm_python, Path(tmp_path_factory.mktemp("servers"))) as found:
        yield found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.proves(
    "GRPO on vLLM servers killed at random loses and repeats no prompt",
    how="20 times kill -9 of the trainer; the prompts and samples of every step are those that were drawn",
    layouts="one rank, two servers that outlive it",
)
def test_every_prompt_is_trained_on_exactly_once(mode: str, addresses: str, tmp_path: Path) -> None:
    words, chance = [*WORDS, *MODES[mode], "--vllm.addresses", addresses], random.Random(mode)
    progress = [kill_at_random(words, tmp_path / "killed", chance) for _ in range(NUM_KILLS)]
    assert any(steps > 0 for steps in progress)
    finish(words, tmp_path / "killed")
    rows = metrics(tmp_path / "killed")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert sum(row["rollout_failures"] for row in rows) == 0  # type: ignore[misc]
    for step in range(1, STEPS + 1):
        assert samples(rollouts(tmp_path / "killed", step)) == drawn(step)
