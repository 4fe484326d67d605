"""The weights of a model that is being trained, as a Hugging Face folder: for rollout servers, once a step.

The ranks of one copy of the model (TP x PP, whatever the schedule) send their parts to rank 0, tensor by
tensor in the order of the name table; rank 0 joins them and writes. Nobody holds more than one whole tensor
beside its own part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from phi4r.configs.sections import ModelConfig
from phi4r.convert.hf import SHARD_BYTES, new_folder
from phi4r.core.io import atomic_write_json
from phi4r.families.hf_config import hf_config
from phi4r.models.huggingface import INDEX, ShardWriter, plan_shards, shard_names
from phi4r.models.names import from_mcore, hf_tensors, local_weights, parts, unshard, weight_table
from phi4r.parallel.layout import Layout
from phi4r.train.save import finish_param_gather

SERVED = {"fp64": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}
"""The type in which weights of a compute type are served: samplers have no float64."""


def served_model(model: ModelConfig) -> ModelConfig:
    """The model as it is written for servers."""
    return replace(model, dtype="bf16" if model.dtype == "bf16" else "fp32")


@torch.no_grad()
def whole_weights(
    chunks: Sequence[nn.Module], model: ModelConfig, layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    """(name, full HF tensor on the CPU, in the type served), in table order, on rank 0; other ranks send
    their parts and get nothing. Collective: every rank must run the iterator to its end."""
    finish_param_gather(chunks)
    if 0 not in layout.copy_ranks:
        return
    mine = {weight.hf: parameter.detach() for weight, parameter in local_weights(chunks, model)}
    shapes: list[dict[str, torch.Size]] = [{} for _ in layout.copy_ranks]
    dist.all_gather_object(shapes, {name: p.shape for name, p in mine.items()}, group=layout.copy_group)
    dtype = SERVED[model.dtype]
    for weight in weight_table(model):
        # Stage by stage, and in order of TP rank within a stage.
        holders = [
            (rank, held[weight.hf])
            for rank, held in zip(layout.copy_ranks, shapes, strict=True)
            if weight.hf in held
        ]
        # Tied embeddings lie on the first stage and, once more, on the last.
        holders = holders[: 1 if weight.shard_dim is None else layout.tp]
        if not layout.is_main:
            if layout.rank in [rank for rank, _ in holders]:
                dist.send(mine[weight.hf].to(dtype).contiguous(), 0)
            continue
        shards = []
        for rank, shape in holders:
            if rank == layout.rank:
                part = mine[weight.hf].to(dtype)
            else:
                part = torch.empty(shape, dtype=dtype, device=layout.device)
                dist.recv(part, rank)
            shards.append(part.cpu())
        yield from parts(weight, from_mcore(weight, unshard(weight, shards)))


def hand_over(weights: Iterator[tuple[str, Tensor]]) -> None:
    """The part in `whole_weights` of a rank other than 0."""
    for _ in weights:
        raise AssertionError("only rank 0 is given weights")


def export_live(
    chunks: Sequence[nn.Module],
    model: ModelConfig,
    layout: Layout,
    folder: Path,
    eos_ids: tuple[int, ...],
    pad_id: int | None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the weights as the Hugging Face folder `folder`, which appears whole or not at all. Collective;
    only rank 0 writes. There are no tokenizer files: servers are given token ids."""
    weights = whole_weights(chunks, model, layout)
    if not layout.is_main:
        hand_over(weights)
        return
    served = served_model(model)
    shards = plan_shards(list(hf_tensors(model).items()), served.dtype, max_shard_bytes)
    weight_map: dict[str, str] = {}
    with new_folder(folder) as temporary:
        for file_name, shard in zip(shard_names(len(shards)), shards, strict=True):
            with ShardWriter(temporary / file_name, shard, served.dtype) as writer:
                for name, _ in shard:
                    found, tensor = next(weights)
                    assert found == name, f"{found} came where {name} was due"
                    writer.write(name, tensor)
                    weight_map[name] = file_name
        assert next(weights, None) is None
        if len(shards) > 1:
            index: dict[str, Any] = {"metadata": {}, "weight_map": weight_map}
            atomic_write_json(temporary / INDEX, index)
        _write_config(temporary, model, eos_ids, pad_id)


def export_form(model: ModelConfig, folder: Path, eos_ids: tuple[int, ...], pad_id: int | None) -> None:
    """Write the folder `folder` with all but the weights: a server can start with random ones."""
    with new_folder(folder) as temporary:
        _write_config(temporary, model, eos_ids, pad_id)


def _write_config(folder: Path, model: ModelConfig, eos_ids: tuple[int, ...], pad_id: int | None) -> None:
    atomic_write_json(folder / "config.json", hf_config(served_model(model), {}, eos_ids, pad_id))
