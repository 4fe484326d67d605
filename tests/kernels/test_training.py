"""Training with the Triton kernels, interpreted, attention and head, is training with the references."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")
from phi4r_kernels import interpreter

from phi4r.configs.sections import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig, TrainConfig
from phi4r.data.packing import Document, PackedRow, pack
from phi4r.models.names import load_weights, random_weights
from phi4r.parallel.layout import init_layout
from phi4r.rl.batch import policy_loss
from phi4r.train.engine import Engine, StepResult, TokenLoss, sft_loss

STEPS, VOCAB, ROW = 3, 320, 48
# The quick start's shape, smaller: two layers, its vocabulary rounded up to a multiple of 64.
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=16,
    vocab_size=VOCAB, max_position_embeddings=ROW,
)  # fmt: skip
OBJECTIVE = ObjectiveConfig(
    clip_high=0.28, dual_clip=3.0, kl_coef=0.05, kl_reference="ref", entropy_coef=0.01, importance_cap=2.0
)


@pytest.fixture(autouse=True)
def _mended() -> None:
    interpreter.install()


def rows(step: int) -> list[PackedRow]:
    random = np.random.default_rng(step)
    documents = []
    for length in (17, 30, 9, 22):
        mask = np.arange(length) >= 4
        extras = {
            "advantages": np.full(length, random.normal(), np.float32),
            "weights": mask.astype(np.float32),
            "counts": mask.astype(np.float32),
        }
        for name in ("rollout", "old", "ref"):
            extras[f"{name}_logprobs"] = random.normal(-5.8, 0.3, length).astype(np.float32)
        documents.append(Document(random.integers(0, VOCAB, length).astype(np.int32), mask, extras))
    return pack(documents, ROW)


def train(head: Any, attention: Any, loss: TokenLoss) -> list[StepResult]:
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=0, decay="constant")
    settings = TrainConfig(logit_chunk_size=20, head_backend=head)
    model = replace(MODEL, attention_backend=attention)
    engine = Engine(model, ParallelConfig(), init_layout(ParallelConfig()), settings, optimizer)
    load_weights(engine.models, MODEL, random_weights(MODEL, 3), 0, 1)
    engine.sync_optimizer()
    return [engine.train_step(rows(step), loss, 1e-3, with_entropy=True) for step in range(STEPS)]


@pytest.mark.parametrize(
    "loss",
    [sft_loss, policy_loss(OBJECTIVE, on_policy=False), policy_loss(OBJECTIVE, on_policy=True)],
    ids=["sft", "grpo", "grpo on-policy"],
)
@pytest.mark.proves(
    "Training with the Triton kernels equals training without",
    how="optimizer steps of SFT and GRPO, interpreted",
)
def test_training_with_the_kernels_is_training_without(loss: TokenLoss) -> None:
    kernels, plain = train("triton", "triton", loss), train("torch", "reference", loss)
    # Each step's sums round differently by some ulps of fp32, and a step of 1e-3 passes that on undamped.
    tolerance = 64 * STEPS * torch.finfo(torch.float32).eps
    for a, b in zip(kernels, plain, strict=True):
        assert a.count == b.count > 0
        assert a.applied
        assert a.loss == pytest.approx(b.loss, rel=tolerance, abs=tolerance)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=tolerance)
        for name, value in b.sums.items():
            assert a.sums[name] == pytest.approx(value, rel=tolerance, abs=tolerance * b.count), name
    assert kernels[0].loss != kernels[-1].loss
