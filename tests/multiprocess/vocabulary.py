"""The program behind `test_vocabulary.py`: trains on one rank and on three, which do not divide the
vocabulary, saves, samples, and continues from the other's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from phi4r.configs.sections import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from phi4r.data.packing import Document, PackedRow, pack
from phi4r.models.names import load_weights, random_weights, to_mcore, weight_table
from phi4r.parallel.layout import Layout, init_layout
from phi4r.sampling.embedded import EmbeddedEngine
from phi4r.sampling.types import SampleRequest, SamplingOptions
from phi4r.train.checkpoint import load_checkpoint
from phi4r.train.engine import Engine, sft_loss
from phi4r.train.save import save_checkpoint

VOCAB, LENGTH, STEPS = 64, 48, 3
MODEL = ModelConfig(
    num_layers=2, hidden_size=24, ffn_hidden_size=48, num_attention_heads=6, num_query_groups=3, head_dim=8,
    vocab_size=VOCAB, max_position_embeddings=LENGTH, dtype="fp64",
)  # fmt: skip
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=0, weight_decay=0.1, clip_grad=0.5)


def rows(step: int) -> list[PackedRow]:
    """Rows that hold every token, those on the last rank too."""
    random = np.random.default_rng(step)
    tokens = [random.permutation(VOCAB)[:LENGTH].astype(np.int32) for _ in range(4)]
    return pack([Document(t, np.ones(LENGTH, dtype=bool)) for t in tokens], LENGTH)


def make(parallel: ParallelConfig, layout: Layout) -> Engine:
    engine = Engine(MODEL, parallel, layout, TrainConfig(logit_chunk_size=20), OPTIMIZER)
    load_weights(engine.models, MODEL, random_weights(MODEL, 7), layout.tp_rank, layout.tp)
    engine.sync_optimizer()
    return engine


def train(engine: Engine, first: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of a few steps."""
    results = [engine.train_step(rows(first + i), sft_loss, OPTIMIZER.lr) for i in range(STEPS)]
    return [(result.loss, result.grad_norm) for result in results]


def vocabulary_gradients(engine: Engine, layout: Layout) -> dict[str, Any]:
    """Of embedding and head after a forward and backward: every rank's rows, one after another."""
    for chunk in engine.chunks:
        chunk.zero_grad_buffer()
    engine._run(rows(0), sft_loss, 1.0, False, backward=True)
    found = {}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        mine = engine.models[0].get_parameter(name).main_grad.clone()
        parts = [torch.empty_like(mine) for _ in range(layout.tp)]
        dist.all_gather(parts, mine)
        found[name] = torch.cat(parts).tolist()
    return found


def run(payload: dict[str, Any]) -> None:
    """Rank 0 writes what this layout found to payload["out"]."""
    parallel = ParallelConfig(tp=payload["tp"])
    layout = init_layout(parallel)
    engine = make(parallel, layout)
    found: dict[str, Any] = {"gradients": vocabulary_gradients(engine, layout)}
    found["steps"] = train(engine, 0)
    folder = Path(payload["folder"])
    save_checkpoint(folder / f"tp{layout.tp}", 3, engine.chunks, engine.optimizer, state={}, model_cfg=MODEL)
    found["later"] = train(engine, STEPS)
    if payload["other"]:
        other = make(parallel, layout)
        load_checkpoint(
            folder / payload["other"] / "checkpoints" / "step_000003", other.chunks, other.optimizer
        )
        found["from_other"] = train(other, STEPS)
    requests = [SampleRequest((5, number), (0, number)) for number in range(6)]
    sampler = EmbeddedEngine(engine, stop_ids=[3], num_slots=4)
    found["samples"] = [c.tokens for c in sampler.generate(requests, SamplingOptions(16))]
    weight = next(w for w in weight_table(MODEL) if w.mcore == "output_layer.weight")
    assert to_mcore(weight, torch.zeros(weight.shape)).shape == (VOCAB, MODEL.hidden_size)
    if layout.is_main:
        Path(payload["out"]).write_text(json.dumps(found))
