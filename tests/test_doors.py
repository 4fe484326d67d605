"""A task, a reward, an objective and a family by import path train together; phi4r itself is not touched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOY = '''\
from dataclasses import replace

from phi4r.core.problem import Problem
from phi4r.families.qwen3 import QWEN3
from phi4r.tasks.base import CounterStream, Task

FAMILY = replace(QWEN3, title="Toy", presets={}, architecture="ToyForCausalLM", model_type="toy")


class Echo(Task):
    def generate(self, seed, index, difficulty=None):
        digit = str(CounterStream(self.name, seed, index).below(10))
        return Problem(f"echo-{seed}-{index}", digit, digit, task=self.name)

    def check_answer(self, problem, answer):
        return answer == problem.answer


def even_tokens(response, settings):
    return sum(token % 2 == 0 for token in response.tokens.tolist()) / response.num_tokens


def likelihood(tokens, settings):
    """s_t = A_t log pi(o_t)"""
    return tokens.advantages * tokens.policy_logprobs, {"surprise": -tokens.policy_logprobs}
'''
RECIPE = """\
[model]
family = "toy:FAMILY"
num_layers = 2
hidden_size = 16
ffn_hidden_size = 32
num_attention_heads = 2
num_query_groups = 2
head_dim = 8
tie_embeddings = true
dtype = "fp64"

[problems]
task = "toy:Echo"
num_generated = 16

[reward]
function = "toy:even_tokens"

[objective]
surrogate = "toy:likelihood"
kl_coef = 0.0

[rollout]
prompts_per_step = 4
group_size = 4

[sampling]
max_new_tokens = 8

[train]
num_steps = 2

[optimizer]
lr = 1e-2
warmup_steps = 0
"""


@pytest.mark.multiprocess
def test_four_parts_by_import_path_train_alike_in_two_layouts(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "toy.toml").write_text(RECIPE)
    steps = {}
    for tp in (1, 2):
        folder = tmp_path / f"tp{tp}"
        command = [sys.executable, "-m", "phi4r", "rl", "toy.toml", "--run-dir", str(folder)]
        command += [f"--parallel.tp={tp}"]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-2000:]
        steps[tp] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for one, two in zip(steps[1], steps[2], strict=True):
        assert 0 < one["reward"] < 1
        assert one["zero_variance_share"] < 1
        assert one["grad_norm"] > 0
        for name in ("loss", "grad_norm", "surprise"):
            assert two[name] == pytest.approx(one[name], rel=1e-12)
    sample = json.loads((tmp_path / "tp1" / "rollouts" / "step_000001.jsonl").read_text().splitlines()[0])
    assert sample["problem_id"].startswith("echo-")
    assert sample["reward_parts"]["accuracy_source"] == "function"
