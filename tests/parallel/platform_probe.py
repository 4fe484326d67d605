"""The program behind `test_cpu.py`: leave out each patch of the CPU platform in turn and see what breaks.

Two ranks go through all patches in one launch, so the originals are put back by hand; {patch: what happened}
comes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import numpy as np
import torch

from phi4r.configs.sections import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from phi4r.data.packing import Document, pack
from phi4r.models.names import load_weights, random_weights
from phi4r.parallel import cpu
from phi4r.parallel.layout import init_layout
from phi4r.train.checkpoint import load_checkpoint
from phi4r.train.engine import Engine, sft_loss
from phi4r.train.save import save_checkpoint

# Every attribute that `cpu.install` replaces, and the patch it belongs to.
ATTRIBUTES = {
    "current_device": [(torch.cuda, "current_device")],
    "rng_state": [
        (torch.cuda, "get_rng_state"),
        (torch.cuda.random, "get_rng_state"),
        (torch.cuda, "manual_seed"),
        (megatron_random, "_set_cuda_rng_state"),
    ],
    "synchronize": [(torch.cuda, "synchronize")],
}
ORIGINALS = {name: [getattr(owner, key) for owner, key in where] for name, where in ATTRIBUTES.items()}
MODEL = ModelConfig(
    num_layers=1, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, num_query_groups=1, head_dim=8,
    vocab_size=64,
)  # fmt: skip


@contextmanager
def left_out(name: str) -> Iterator[None]:
    """Undo one patch for a while."""
    if name in ATTRIBUTES:
        patched = [getattr(owner, key) for owner, key in ATTRIBUTES[name]]
        for (owner, key), original in zip(ATTRIBUTES[name], ORIGINALS[name], strict=True):
            setattr(owner, key, original)
        try:
            yield
        finally:
            for (owner, key), value in zip(ATTRIBUTES[name], patched, strict=True):
                setattr(owner, key, value)
        return
    mode = cpu._active[0]
    assert getattr(mode, name) is True
    setattr(mode, name, False)
    try:
        yield
    finally:
        setattr(mode, name, True)


def scenario(run_dir: str) -> None:
    """Train with recomputation, save and load: what phi4r does on a CPU."""
    parallel = ParallelConfig(dp=2)
    layout = init_layout(parallel)
    for dtype, recompute in (("fp32", "none"), ("fp32", "full"), ("fp64", "none")):
        model = replace(MODEL, dtype=dtype)  # type: ignore[arg-type]
        engine = Engine(model, parallel, layout, TrainConfig(recompute=recompute), OptimizerConfig())  # type: ignore[arg-type]
        load_weights(engine.models, MODEL, random_weights(MODEL, 0), 0, 1)
        engine.sync_optimizer()
        document = Document(np.arange(20, dtype=np.int32), np.ones(20, dtype=bool))
        engine.train_step(pack([document], 32), sft_loss, lr=1e-3)
    path = save_checkpoint(run_dir, 1, engine.chunks, engine.optimizer, state={"step": 1}, model_cfg=MODEL)
    load_checkpoint(path, engine.chunks, engine.optimizer)


def main(payload: dict[str, Any]) -> dict[str, str]:
    """Target of the launcher: what breaks without each of `payload["names"]`. Both ranks break at the same
    place, so neither is left waiting."""
    assert cpu.install()
    scenario(payload["run_dir"])
    found = {}
    for name in payload["names"]:
        with left_out(name):
            try:
                scenario(payload["run_dir"])
                found[name] = ""
            except Exception as error:  # noqa: BLE001  (whatever breaks is the finding)
                found[name] = f"{type(error).__name__}: {error}"[:200]
    return found


def main_without(payload: dict[str, Any]) -> None:
    """Target of the launcher: the scenario without `payload["name"]`, which may break on one rank alone."""
    assert cpu.install()
    with left_out(payload["name"]):
        scenario(payload["run_dir"])
