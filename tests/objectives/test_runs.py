"""Runs of RL with objectives of every kind, through the command line: what is run, logged and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from phi4r_kernels.linear_loss import Tokens
from torch import Tensor

from phi4r.cli.main import main
from phi4r.configs.load import load_stage
from phi4r.configs.sections import ObjectiveConfig
from phi4r.configs.stages import RLConfig
from phi4r.core.errors import ConfigError
from phi4r.objectives.formula import formula
from phi4r.objectives.objective import PolicyObjective
from phi4r.plan.memory import worst_stage
from tests.golden.runner import CHECKPOINT, MODEL

ROOT = Path(__file__).resolve().parents[2]
NAME = f"{__name__}:reinforce"
SETTINGS = {
    **MODEL, "init.checkpoint": CHECKPOINT, "problems.num_generated": 16, "rollout.prompts_per_step": 3,
    "rollout.group_size": 4, "rollout.max_prompt_tokens": 24, "sampling.max_new_tokens": 40,
    "rollout.row_tokens": 96, "sampling.num_slots": 12, "objective.min_informative": 0, "train.num_steps": 2,
    "checkpoint.save_final": "false", "reward.verifier_workers": 1, "log.ref_kl": "false",
}  # fmt: skip


def reinforce(tokens: Tokens, settings: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """A_t log pi(o_t), the plainest policy gradient"""
    assert tokens.advantages is not None
    return tokens.advantages * tokens.policy_logprobs, {"likelihood": tokens.policy_logprobs.exp()}


def run(folder: Path, **objective: Any) -> list[dict[str, Any]]:
    """metrics.jsonl of two steps of `phi4r rl` with these settings of the objective."""
    settings = {**SETTINGS, **{f"objective.{name}": value for name, value in objective.items()}}
    options = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "phi4r", "rl", "tiny", "--run-dir", str(folder), *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-3000:]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_surrogate_of_ones_own_trains_by_import_path_without_a_reference(tmp_path: Path) -> None:
    rows = run(tmp_path, surrogate=NAME)
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["likelihood"] < 1
        assert row["grad_norm"] > 0
        assert "kl_ref" not in row, "nothing reads the reference"


def test_a_run_with_choices_among_all_tokens_and_kl_in_the_reward(tmp_path: Path) -> None:
    rows = run(
        tmp_path, surrogate="clip_cov", cov_share=0.1, cov_low=0.01, cov_high=100, top_entropy=0.5,
        entropy_mean="token", kl_reference="ref", kl_in_reward="true", kl_coef=0.5, updates_per_rollout=2,
        drop_truncated="true", baseline="opo", advantage_norm="none", normalization="sequence",
        importance_cap=2, importance_level="mean", off_policy_limit=0.5,
    )  # fmt: skip
    assert rows[0]["reward_kl"] == pytest.approx(0, abs=1e-4), "before its first step, the reference itself"
    assert rows[1]["reward_kl"] != 0
    for row in rows:
        assert 0 < row["selected"] <= 0.11
        assert {"kl_ref", "kl_old", "importance", "off_policy_masked"} <= set(row)
        assert row["grad_norm"] > 0


def test_the_reference_costs_nothing_where_nothing_reads_it() -> None:
    def config(*settings: str) -> RLConfig:
        return load_stage("rl", "phi4_grpo", list(settings)).config

    plain, logged = config(), config("log.ref_kl=true")
    read = config("objective.kl_reference=ref")
    assert [c.needs_reference for c in (plain, logged, read)] == [False, True, True]
    assert not config("objective.kl_reference=ref", "objective.kl_coef=0").needs_reference
    assert worst_stage(plain).reference == 0
    assert worst_stage(logged).reference == worst_stage(read).reference > 0


def test_explain_prints_the_docstring_of_a_surrogate_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["rl", "tiny", "--explain", "--objective.surrogate", NAME])
    assert ended.value.code == 0
    assert f"s_t = {NAME}: A_t log pi(o_t), the plainest policy gradient\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        (f"{__name__}:reinforced", "did you mean 'reinforce'"),
        (f"{__name__}:SETTINGS", "expected a function of (tokens, settings)"),
        ("no_such_package:loss", "there is no module 'no_such_package'"),
    ],
)
def test_what_is_no_surrogate_is_refused_in_one_line(surrogate: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        PolicyObjective.make(ObjectiveConfig(surrogate=surrogate))
    assert str(refused.value).startswith("objective.surrogate: ")
    assert message in str(refused.value)


EXOTIC = ObjectiveConfig(
    surrogate="sapo", importance_cap=5, importance_floor=0.5, importance_mode="mask", importance_level="mean",
    off_policy_limit=0.1, top_entropy=0.2, kl_reference="ref", kl_ratio=True, entropy_mean="token",
    normalization="constant", constant=1, drop_truncated=True,
)  # fmt: skip


def test_the_formula_of_every_setting() -> None:
    assert formula(EXOTIC).splitlines() == [
        "r_t = pi(o_t) / pi_old(o_t)",
        "s_t = A_t 4/tau sigmoid(tau (r_t - 1)),  tau = 1 where A_t > 0, else 1.05",
        "i_t = exp(mean over the response of log pi_old(o) - log pi_rollout(o)), 0 outside [0.5, 5]",
        "s_t = 0 where A_t < 0 and the mean over the response of log pi_rollout(o) - log pi(o) is above 0.1",
        "s_t = 0 and H_t = 0 but for the 0.2 of the tokens with the largest H_t",
        "KL_t = r_t (exp(-d_t) - 1 + d_t),  d_t = log pi(o_t) - log pi_ref(o_t)",
        "H_t = entropy of pi at token t",
        "l_t = -i_t s_t + 0.001 KL_t",
        "loss = 1/n sum_i 1/1 sum_t l_t - 0.001 sum_i sum_t H_t / sum_i |o_i|,  without truncated answers",
    ]
