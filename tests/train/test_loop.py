"""Around the steps: gradients that are not finite, checkpoints that are due, signals, going on afterwards."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phi4r_kernels.linear_loss import Tokens
from torch import Tensor

from phi4r.cli.main import main
from phi4r.configs.sections import (
    CheckpointConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from phi4r.configs.stages import SFTConfig
from phi4r.core.errors import UserError
from phi4r.data.packing import Document, PackedRow, pack
from phi4r.data.tokenizer import Tokenizer
from phi4r.models.names import load_weights, random_weights
from phi4r.objectives.objective import PolicyObjective
from phi4r.parallel.layout import init_layout
from phi4r.train.engine import Engine, StepResult, TokenLoss, sft_loss
from phi4r.train.loop import RunState, TrainingLoop, open_loop

MODEL = ModelConfig(
    num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, num_query_groups=1, head_dim=8,
    vocab_size=64, max_position_embeddings=64,
)  # fmt: skip
TINY = [
    "sft", "tiny", "--model.hidden_size", "32", "--model.num_layers", "2", "--model.ffn_hidden_size", "64",
    "--model.head_dim", "8", "--data.num_generated", "120", "--data.heldout", "0",
]  # fmt: skip


def make_engine() -> Engine:
    optimizer = OptimizerConfig(weight_decay=0.1, clip_grad=0.5)
    engine = Engine(MODEL, ParallelConfig(), init_layout(ParallelConfig()), TrainConfig(), optimizer)
    load_weights(engine.models, MODEL, random_weights(MODEL, 1), 0, 1)
    engine.sync_optimizer()
    return engine


def rows(step: int) -> list[PackedRow]:
    random = np.random.default_rng(step)
    tokens = random.integers(0, 64, (4, 20)).astype(np.int32)
    return pack([Document(t, np.ones(20, dtype=bool)) for t in tokens], 48)


def tensors(engine: Engine) -> list[Tensor]:
    """Copies of every parameter and of everything Adam keeps, its step counters included."""
    found = [parameter.detach().clone() for model in engine.models for parameter in model.parameters()]
    for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        for state in part.optimizer.state.values():
            found += [torch.as_tensor(state[name]).clone() for name in sorted(state)]
        found += [torch.as_tensor(float(group.get("step", 0))) for group in part.optimizer.param_groups]
        found += [p.detach().clone() for group in part.optimizer.param_groups for p in group["params"]]
    return found


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    assert len(one) == len(other)
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- gradients that are not finite


def nan(tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
    return tokens.policy_logprobs * float("nan"), {}


def infinite_sum(tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
    """Each token's loss is finite and clipped, so that it has no gradient; their sum is beyond fp32."""
    advantages = torch.full_like(tokens.weights, -2e38)
    old = torch.full_like(tokens.weights, -100.0)
    return OBJECTIVE(replace(tokens, advantages=advantages, old_logprobs=old))


def infinite_slopes(tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
    """The advantages nearly cancel in the loss; in the gradient's norm their squares are beyond fp32."""
    signs = torch.where(torch.arange(len(tokens.weights)) % 2 == 0, 1.0, -1.0)
    return OBJECTIVE(replace(tokens, advantages=1e36 * signs))


OBJECTIVE = PolicyObjective.make(ObjectiveConfig(dual_clip=1.5, kl_coef=0.0, entropy_coef=0.0))
nan_loss, infinite_loss, infinite_gradient = (
    replace(sft_loss, objective=objective) for objective in (nan, infinite_sum, infinite_slopes)
)


@pytest.mark.parametrize(
    "bad",
    [nan_loss, infinite_loss, infinite_gradient],
    ids=["nan_loss", "infinite_loss", "infinite_gradient"],
)
def test_a_step_that_is_not_finite_leaves_no_trace(bad: TokenLoss) -> None:
    engine, untouched = make_engine(), make_engine()
    for step in range(2):
        engine.train_step(rows(step), sft_loss, lr=1e-2)
        untouched.train_step(rows(step), sft_loss, lr=1e-2)
    before = tensors(engine)
    assert len(before) > 3 * sum(1 for _ in engine.models[0].parameters()), "Adam's state is among them"

    result = engine.train_step(rows(2), bad, lr=1e-2)

    assert not result.applied
    assert same_bits(tensors(engine), before)
    # And nothing is left behind for the next step: it is the one that an engine without the bad step takes.
    after, wanted = (e.train_step(rows(3), sft_loss, lr=1e-2) for e in (engine, untouched))
    assert after == wanted
    assert after.applied
    assert same_bits(tensors(engine), tensors(untouched))
    assert not same_bits(tensors(engine), before)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[TrainingLoop]:
    """A run that gives up at the third step in a row that is not finite."""
    config = SFTConfig(
        train=TrainConfig(max_nonfinite_steps=2), checkpoint=CheckpointConfig(save_final=False)
    )
    with open_loop(config, tmp_path, make_engine(), Tokenizer.load(""), "sft") as opened:
        yield opened


def test_steps_in_a_row_are_counted_and_a_good_one_starts_again(loop: TrainingLoop) -> None:
    good, bad = (StepResult(1.0, 5, norm, norm == 1.0, {}) for norm in (1.0, float("nan")))
    for result in (bad, bad, good, bad, bad, good):
        loop.check_finite(0, result, rows(0))
    loop.check_finite(3, bad, rows(0))
    loop.check_finite(4, bad, rows(0))
    with pytest.raises(
        RuntimeError, match=r"step 6: .*gradient norm nan is not finite for 3 steps in a row"
    ) as error:
        loop.check_finite(5, bad, rows(0))
    assert "train.max_nonfinite_steps = 2" in str(error.value)


def run(*words: str) -> int:
    """The command in this process; returns the exit code."""
    with pytest.raises(SystemExit) as ended:
        main([*TINY, *words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))


def test_a_run_that_diverges_counts_its_skipped_steps_and_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run-dir", str(tmp_path), "--optimizer.lr", "1e30", "--optimizer.warmup_steps", "0"]
    assert run(*words, "--train.max_nonfinite_steps", "3") == 1
    found = metrics(tmp_path)
    assert [row["skipped"] for row in found] == [0, 1, 1, 1]
    assert "is not finite for 4 steps in a row (train.max_nonfinite_steps = 3)" in capsys.readouterr().err


# --- checkpoints


@pytest.mark.parametrize(
    ("saved", "state"),
    [
        ({"step": 7, "seed": 3}, RunState(7, 3, next_batch=7)),
        ({"step": 7, "seed": 3, "num_draws": 9}, RunState(7, 3, next_batch=9)),
        ({"step": 7, "seed": 3, "num_draws": 9, "curriculum": {"a": 1}}, RunState(7, 3, 9, {"a": 1})),
    ],
)
def test_states_of_version_0_1_0_are_read(saved: dict[str, Any], state: RunState) -> None:
    assert RunState.from_dict(saved) == state
    assert RunState.from_dict(json.loads(json.dumps(asdict(state)))) == state


def test_a_state_with_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match="unknown 'shard': from a newer phi4r"):
        RunState.from_dict({"step": 7, "seed": 3, "shard": 1})


def test_checkpoints_come_when_due_and_a_finished_run_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run-dir", str(tmp_path), "--checkpoint.every", "2", "--checkpoint.keep_last", "0"]
    assert run(*words, "--train.num_steps", "5") == 0
    assert checkpoints(tmp_path) == ["step_000002", "step_000004", "step_000005"]
    before = (tmp_path / "metrics.jsonl").read_text()
    capsys.readouterr()

    assert run(*words, "--train.num_steps", "5") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text() == before

    assert run(*words, "--train.num_steps", "7") == 0
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, 8))
    assert checkpoints(tmp_path)[-1] == "step_000007"


# --- signals


def stop(run_dir: Path, number: signal.Signals, after_step: int) -> tuple[int, str]:
    """Start the command, send it a signal once it has logged a step; returns its exit code and its output."""
    words = [*TINY, "--run-dir", str(run_dir), "--train.num_steps", "100000", "--checkpoint.every", "0"]
    log = run_dir.parent / f"{number.name}.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "phi4r", *words], stdout=out, stderr=subprocess.STDOUT
        )
    try:
        until = time.monotonic() + 200
        while not any(row["step"] >= after_step for row in metrics(run_dir)):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < until, "no metrics came"
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait(60), log.read_text()
    finally:
        process.kill()


def test_a_signal_ends_the_run_with_a_checkpoint_and_it_resumes(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"

    code, text = stop(run_dir, signal.SIGTERM, after_step=2)
    first = metrics(run_dir)[-1]["step"]
    assert code == 128 + signal.SIGTERM
    assert checkpoints(run_dir) == [f"step_{first:06d}"]
    assert f"stopped after step {first} of 100000; the same command resumes" in text

    code, text = stop(run_dir, signal.SIGINT, after_step=first + 2)
    second = metrics(run_dir)[-1]["step"]
    assert code == 130
    assert f"resuming {run_dir} after step {first}" in text
    assert "Traceback" not in text
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, second + 1))
    assert checkpoints(run_dir) == [f"step_{first:06d}", f"step_{second:06d}"]
