"""What a run checks about itself: steps that are not finite, replicas that have drifted.

A step that is not finite changes nothing (`Engine.train_step`), so the weights that made it are still there
when the run gives up: `save_replay` keeps them with the batch, and `phi4r replay RUN` does the step again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from phi4r.core.io import atomic_write_json
from phi4r.data.packing import PackedRow
from phi4r.train.folders import BATCH_INFO
from phi4r.train.save import finish_param_gather

# --- replicas


def fingerprints(parameters: Sequence[Tensor]) -> Tensor:
    """One int64 a parameter, [N] on its device: sum over i of bits_i * (2 i + 1) modulo 2**64, where bits_i
    is element i as an integer. A change of any one element changes it, for odd factors have inverses."""
    found = []
    for parameter in parameters:
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
        bits = parameter.detach().contiguous().view(-1).view(kind)
        total = torch.zeros((), dtype=torch.int64, device=bits.device)
        for start in range(0, len(bits), 1 << 24):  # so that the int64 copies stay small
            part = bits[start : start + (1 << 24)].long()
            factor = 2 * torch.arange(start, start + len(part), device=bits.device) + 1
            total += (part * factor).sum()
        found.append(total)
    return torch.stack(found)


def check_replicas(chunks: Sequence[Any], step: int) -> None:
    """Compare the parameters of all data-parallel (and context-parallel) replicas, bit for bit.

    Collective. Raises RuntimeError, on every rank, naming the ranks that differ from the others (where two
    halves disagree: both) and the first parameter in which they do.
    """
    finish_param_gather(chunks)
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    named = [(name, p) for chunk in chunks for name, p in chunk.named_parameters()]
    mine = fingerprints([p for _, p in named])
    ranks = dist.get_process_group_ranks(group)
    gathered = [torch.empty_like(mine) for _ in ranks]
    dist.all_gather(gathered, mine, group=group)
    table = torch.stack(gathered).cpu()
    problem = ""
    if not bool((table == table[0]).all()):
        rows = [tuple(row) for row in table.tolist()]
        most = max(rows, key=rows.count)
        odd = [rank for rank, row in zip(ranks, rows, strict=True) if row != most]
        if 2 * len(odd) >= len(ranks):  # nobody can say which half is right
            odd = ranks
        first = next(i for i in range(len(named)) if len({row[i] for row in rows}) > 1)
        count = sum(len({row[i] for row in rows}) > 1 for i in range(len(named)))
        listed = ", ".join(map(str, odd))
        problem = f"rank {listed}: {named[first][0]}" + (
            f" and {count - 1} more parameters" if count > 1 else ""
        )
    problems = [problem]
    if dist.get_world_size() > 1:
        problems = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    if any(problems):
        text = "; ".join(sorted({p for p in problems if p}))
        raise RuntimeError(
            f"step {step}: the copies of the model have drifted apart (train.check_replicas_every): {text}"
        )


# --- the batch of a step that went wrong

BATCH = "batch.npz"


def save_batch(folder: Path, rows: Sequence[PackedRow], info: dict[str, Any]) -> None:
    """Write rows and what else the step was given (JSON-able)."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    for index, row in enumerate(rows):
        for field in dataclasses.fields(row):
            value = getattr(row, field.name)
            parts = value.items() if isinstance(value, dict) else [("", value)]
            arrays |= {f"{index}/{field.name}/{name}": np.asarray(part) for name, part in parts}
    np.savez(folder / BATCH, **arrays)  # type: ignore[arg-type]
    atomic_write_json(folder / BATCH_INFO, info)


def load_batch(folder: Path) -> tuple[list[PackedRow], dict[str, Any]]:
    """What `save_batch` wrote."""
    info = json.loads((folder / BATCH_INFO).read_text(encoding="utf-8"))
    rows: dict[int, dict[str, Any]] = {}
    with np.load(folder / BATCH) as arrays:
        for key in arrays.files:
            index, field, name = key.split("/", 2)
            fields = rows.setdefault(int(index), {"extras": {}})
            if field == "extras":
                fields["extras"][name] = arrays[key]
            else:
                fields[field] = arrays[key]
    return [PackedRow(**rows[index]) for index in sorted(rows)], info
