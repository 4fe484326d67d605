"""Planned against measured memory, once a run: one line on the console, and memory.json in the run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from phi4r.configs.stages import RLConfig, SFTConfig
from phi4r.core.console import say
from phi4r.core.io import atomic_write_json
from phi4r.plan.memory import GIB, stage_memory
from phi4r.plan.states import States, rank_states
from phi4r.train.engine import Engine

MIB = 2**20


def storage_bytes(tensors: Iterable[Tensor], besides: Collection[int] = ()) -> tuple[int, set[int]]:
    """(bytes of the distinct storages of `tensors` whose addresses are not in `besides`, all addresses)."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for address, size in found.items() if address not in besides), set(found)


def measured_states(engine: Engine) -> States:
    """Bytes of this rank's weights, gradient buffers and optimizer state, Adam's step counters left out. Call
    after a step: Adam makes its state in the first."""
    weights, weight_places = storage_bytes(p.data for model in engine.models for p in model.parameters())
    buffers = [buffer.grad_data for chunk in engine.chunks for buffer in chunk.buffers]
    gradients, gradient_places = storage_bytes(buffers)
    tensors: list[Tensor] = []
    for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        adam = part.optimizer
        tensors += [p.data for group in adam.param_groups for p in group["params"]]
        tensors += [v for state in adam.state.values() for name, v in state.items() if name != "step"]
    tensors = [t for t in tensors if t.device.type == engine.layout.device.type]  # others are offloaded
    optimizer, _ = storage_bytes(tensors, weight_places | gradient_places)
    return States(weights, gradients, optimizer)


def record_memory(config: SFTConfig | RLConfig, engine: Engine, run_dir: Path) -> None:
    """Say and write what this run was planned to hold and what it holds, of every rank; call on all ranks
    after the first step. On a GPU also the peak of the allocator, against the plan without the runtime's
    share."""
    layout = engine.layout
    known = dataclasses.replace(config, model=engine.model_config)
    shard = dist.get_rank(engine.chunks[0].dp_cp_group)
    planned = rank_states(known.model, known.parallel, layout.pp_rank, shard, known.optimizer)
    mine: dict[str, Any] = {
        "rank": layout.rank,
        "planned": dataclasses.asdict(planned),
        "measured": dataclasses.asdict(measured_states(engine)),
    }
    if layout.device.type == "cuda":
        memory = stage_memory(known, layout.pp_rank)
        mine["planned_peak"] = memory.total - memory.runtime
        mine["measured_peak"] = torch.cuda.max_memory_allocated()
    everyone: list[Any] = [None] * layout.world_size
    dist.all_gather_object(everyone, mine)
    if not layout.is_main:
        return
    atomic_write_json(run_dir / "memory.json", {"unit": "bytes", "ranks": everyone})
    fullest = max(everyone, key=lambda rank: sum(rank["measured"].values()))
    plan, found = (sum(fullest[which].values()) / MIB for which in ("planned", "measured"))
    line = f"memory: weights, gradients and optimizer state {found:,.1f} MiB on the fullest rank"
    line += f", planned {plan:,.1f} MiB"
    if "measured_peak" in mine:
        worst = max(everyone, key=lambda rank: rank["measured_peak"])
        line += (
            f"; peak {worst['measured_peak'] / GIB:.1f} GiB, planned {worst['planned_peak'] / GIB:.1f} GiB"
        )
    say(line)
