"""GRPO on vLLM servers by a trainer of several ranks: the samples and steps of one rank, in every layout, and
with either way of transfer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multiprocess.test_killed_rl import GROUP, PROBLEMS, PROMPTS, drawn, rollouts, samples
from tests.multiprocess.test_resume import finish, metrics
from tests.vllm.conftest import persistent_servers

pytestmark = [pytest.mark.vllm, pytest.mark.multiprocess, pytest.mark.timeout(600)]

STEPS = 4
WORDS = [
    "rl", "tiny", "--train.num_steps", str(STEPS), "--problems.num_generated", str(PROBLEMS),
    "--rollout.prompts_per_step", str(PROMPTS), "--rollout.group_size", str(GROUP),
    "--sampling.max_new_tokens", "8",
    "--objective.min_informative", "0", "--sampling.engine", "vllm", "--parallel.threads", "1",
]  # fmt: skip
LAYOUTS = {
    "tp2-gloo": ["--parallel.tp", "2", "--vllm.transfer", "gloo"],
    "pp2-files": ["--parallel.pp", "2"],
    "dp2-gloo": ["--parallel.dp", "2", "--vllm.transfer", "gloo"],
}
CONTINUOUS = ["--rollout.mode", "continuous", "--objective.importance_cap", "2"]


@pytest.fixture(scope="module")
def addresses(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Where the servers are, in words for the command line."""
    with persistent_servers(WORDS, vllm_python, Path(tmp_path_factory.mktemp("servers"))) as found:
        yield ["--vllm.addresses", found]


@pytest.fixture(scope="module")
def one_rank(addresses: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one rank."""
    run_dir = Path(tmp_path_factory.mktemp("one")) / "run"
    finish([*WORDS, *addresses], run_dir)
    return run_dir


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.proves(
    "GRPO on vLLM servers by several ranks takes the samples and the steps of one rank",
    how="two real servers; every token and policy version equal, losses and gradient norms to 1e-6",
    layouts="tp 2 (gloo), pp 2 (files), dp 2 (gloo)",
)
def test_several_ranks_take_the_steps_of_one(
    layout: str, addresses: list[str], one_rank: Path, tmp_path: Path
) -> None:
    finish([*WORDS, *addresses, *LAYOUTS[layout]], tmp_path / "run")
    for step in range(1, STEPS + 1):
        ours, theirs = (
            [json.loads(line) for line in rollouts(run, step).splitlines()]
            for run in (tmp_path / "run", one_rank)
        )
        for key in ("problem_id", "sample_index", "tokens", "policy_version"):
            assert [row[key] for row in ours] == [row[key] for row in theirs]
    for row, expected in zip(metrics(tmp_path / "run"), metrics(one_rank), strict=True):
        for key in ("loss", "grad_norm", "reward", "entropy"):
            assert row[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-9)
        assert row["rollout_servers"] == 2
        assert row["rollout_failures"] == 0
        assert row["max_logprob_gap"] < 1e-4


def test_several_ranks_with_open_draws_train_on_every_sample_once(
    addresses: list[str], tmp_path: Path
) -> None:
    words = [*WORDS, *addresses, *CONTINUOUS, *LAYOUTS["tp2-gloo"]]
    finish(words, tmp_path / "run")
    for step in range(1, STEPS + 1):
        assert samples(rollouts(tmp_path / "run", step)) == drawn(step)
    rows = metrics(tmp_path / "run")
    assert [row["policy_version"] for row in rows] == list(range(STEPS))
    assert sum(row["rollout_failures"] for row in rows) == 0
    assert max(row["policy_lag"] for row in rows) > 0
