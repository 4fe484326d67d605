"""The program behind `test_checkpoint.py`: trains, saves, loads and goes on under several layouts in one
job.
"""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from phi4r.configs.sections import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from phi4r.core.errors import UserError
from phi4r.data.packing import Document, PackedRow, pack
from phi4r.models.names import load_weights, random_weights
from phi4r.parallel.layout import init_layout
from phi4r.train.checkpoint import load_checkpoint, load_model
from phi4r.train.engine import Engine, sft_loss
from phi4r.train.folders import find_latest
from phi4r.train.save import save_checkpoint

LENGTH, VOCAB = 32, 64
SAVE_AT, STEPS = 2, 5
MODEL = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, head_dim=8,
    vocab_size=VOCAB, max_position_embeddings=LENGTH,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=0, decay="constant", weight_decay=0.1, clip_grad=0.5)


def rows(step: int) -> list[PackedRow]:
    """Four rows of random documents, the same in every layout."""
    random = np.random.default_rng(step % 2)  # two batches in turn, so that the loss falls
    lengths = [32, 20, 12, 32, 15, 17]
    tokens = [random.integers(0, VOCAB, n).astype(np.int32) for n in lengths]
    return pack([Document(t, np.arange(len(t)) > 2, {}) for t in tokens], LENGTH)


def make_engine(sizes: dict[str, Any], dtype: str = "fp32", model: ModelConfig = MODEL) -> Engine:
    """An engine with the random weights of seed 3."""
    parallel = ParallelConfig(**sizes)
    layout = init_layout(parallel)
    model = replace(model, dtype=dtype)  # type: ignore[arg-type]
    engine = Engine(model, parallel, layout, TrainConfig(), OPTIMIZER)
    load_weights(engine.models, model, random_weights(model, 3), layout.tp_rank, layout.tp)
    engine.sync_optimizer()
    return engine


def train(engine: Engine, first: int, last: int) -> list[float]:
    """Losses of steps [first, last)."""
    return [engine.train_step(rows(step), sft_loss, OPTIMIZER.lr).loss for step in range(first, last)]


def save(engine: Engine, run_dir: Path, step: int = SAVE_AT, **options: Any) -> Path:
    """Save with a state that says the step."""
    state = {"data": {"position": step}}
    return save_checkpoint(
        run_dir, step, engine.chunks, engine.optimizer, state=state, model_cfg=engine.model_config, **options
    )


def resume(
    run_dir: Path, sizes: dict[str, Any], dtype: str = "fp32", leave_out: tuple[str, ...] = ()
) -> list[float]:
    """Losses after resuming from the newest checkpoint of `run_dir`."""
    engine = make_engine(sizes, dtype)
    train(engine, 0, 1)  # weights and optimizer state that must be overwritten
    engine = make_engine(sizes, dtype) if leave_out else engine
    folder = find_latest(run_dir)
    assert folder is not None
    state = load_checkpoint(folder, engine.chunks, engine.optimizer, leave_out=leave_out)
    assert state == {"data": {"position": SAVE_AT}}
    return train(engine, SAVE_AT, STEPS)


def run(payload: dict[str, Any]) -> None:
    """payload["work"]: a list of ("save" | "resume" | "evaluate" | "fail", run, layout sizes, dtype). "save"
    trains to SAVE_AT, saves into the run folder and goes on; "evaluate" loads weights alone; "fail" cannot
    write. Rank 0 writes what came out, in order, to "out"."""
    results = []
    for verb, name, sizes, dtype in payload["work"]:
        gc.collect()  # an engine that is gone but not collected keeps its groups, and they their threads
        run_dir = Path(payload["folder"]) / name
        if verb == "save":
            engine = make_engine(sizes, dtype)
            before = train(engine, 0, SAVE_AT)
            save(engine, run_dir)
            results.append(before + train(engine, SAVE_AT, STEPS))
        elif verb == "fail":
            engine = make_engine(sizes, dtype)
            if dist.get_rank() == 0:
                run_dir.mkdir()
                (run_dir / "checkpoints").write_text("in the way")
            with pytest.raises(UserError, match="File exists"):  # on every rank: none is left waiting
                save(engine, run_dir)
            results.append([])
        elif verb == "resume":
            results.append(resume(run_dir, sizes, dtype))
        else:
            engine = make_engine(sizes, dtype)
            load_model(run_dir, engine.chunks)
            results.append([engine.evaluate(rows(SAVE_AT)).loss])
    if dist.get_rank() == 0:
        Path(payload["out"]).write_text(json.dumps(results))
