"""GRPO on vLLM servers, its trainer killed with SIGKILL at 20 random moments: every prompt is sampled and
trained on exactly once. The servers outlive the trainers, which find them by address."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from phi4r.configs.load import load_stage, split_overrides
from phi4r.configs.sections import VLLMConfig
from phi4r.configs.stages import RLConfig
from phi4r.convert.live import export_form
from phi4r.rl.vllm.server import ServerProcess
from phi4r.train.session import open_tokenizer, resolve_model
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

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS, START_S = 40, 300
WORDS = [
    "rl", "tiny", "--train.num_steps", str(STEPS), "--checkpoint.every", "3", "--problems.num_generated",
    str(PROBLEMS), "--rollout.prompts_per_step", str(PROMPTS), "--rollout.group_size", str(GROUP),
    "--rollout.max_new_tokens", "8", "--objective.min_informative", "0", "--rollout.engine", "vllm",
]  # fmt: skip
MODES = {
    "synchronous": ["--vllm.transfer", "files"],
    "one step ahead": [
        "--vllm.transfer", "gloo", "--rollout.staleness", "1", "--objective.importance_cap", "2",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def addresses(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two servers for the model of these runs, ready for either way of transfer."""
    run = load_stage("rl", "tiny", split_overrides(WORDS)[1]).config
    assert isinstance(run, RLConfig)
    folder = Path(tmp_path_factory.mktemp("servers"))
    export_form(resolve_model(run.model, open_tokenizer(run.tokenizer)), folder / "form", (0,), None)
    longest = run.rollout.max_prompt_tokens + run.rollout.max_new_tokens
    config = VLLMConfig(num_servers=2, python=vllm_python, transfer="gloo")
    servers = [
        ServerProcess(number, config, "float32", longest, True, folder / f"{number}.log")
        for number in range(2)
    ]
    try:
        for server in servers:
            server.start(folder / "form")
        until = time.monotonic() + START_S
        for server in servers:
            while not is_healthy(server):
                assert server.is_alive, server.last_words()
                assert time.monotonic() < until, f"not healthy within {START_S} s"
                time.sleep(0.5)
        yield ",".join(server.url for server in servers)
    finally:
        for server in servers:
            server.stop()


def is_healthy(server: ServerProcess) -> bool:
    try:
        return httpx.get(server.url + "/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


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
