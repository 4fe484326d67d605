"""A rank's own part of the distributed optimizer's state, as chunks of a `torch_dist` checkpoint.

megatron-core has every data-parallel rank collect the states of all of them in host memory before a save,
while training stands still: 12 bytes a parameter of its model part. Here a rank offers what it holds and no
bytes move between ranks: the states of a flat range of each weight are a few boxes of the weight's array. The
checkpoint holds the same arrays under the same names, cut elsewhere, and is loaded by megatron-core's own
code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, one each per axis."""


def boxes(start: int, end: int, shape: Sequence[int]) -> Iterator[Box]:
    """Boxes of an array of `shape` that hold its elements [start, end) in row-major order, one after another:
    the rest of a row, whole rows, the beginning of a row."""
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    inner = tuple(shape[1:])
    length = math.prod(inner)

    def within(row: int, begin: int, stop: int) -> Iterator[Box]:
        for offsets, sizes in boxes(begin, stop, inner):
            yield (row, *offsets), (1, *sizes)

    first, last = -(-start // length), end // length  # the whole rows are [first, last)
    if first > last:
        yield from within(last, start - last * length, end - last * length)
        return
    if start % length:
        yield from within(first - 1, start % length, length)
    if first < last:
        yield (first, *(0 for _ in inner)), (last - first, *inner)
    if end % length:
        yield from within(last, 0, end % length)


@contextmanager
def states_left_out(optimizers: Sequence[Any]) -> Iterator[None]:
    """megatron-core's distributed optimizers describe all but the states of their parameters."""

    def nothing(*args: Any, **kwargs: Any) -> dict[int, Any]:
        return {}

    distributed = [one for one in optimizers if hasattr(one, "gbuf_ranges")]
    for one in distributed:
        one.sharded_param_state_fully_reshardable = nothing
    try:
        yield
    finally:
        for one in distributed:
            del one.sharded_param_state_fully_reshardable


def state_chunks(optimizers: Sequence[Any], model: Any) -> list[tuple[WriteItem, Tensor]]:
    """What this rank stores of the states of `optimizers` (none of a plain one): views, not copies.

    model: megatron-core's sharded state dict of the weights, as the model makes it.
    """
    entries = {entry.data: entry for entry in nested_values(model)}
    chunks: list[tuple[WriteItem, Tensor]] = []
    for one in optimizers:
        for parameter, start, end in _own_ranges(one):
            states = one._get_main_param_and_optimizer_states(parameter)
            for name, values in states.items():
                if name != "step":  # kept with the parameter groups
                    flat = values.detach().view(-1)
                    assert len(flat) == end - start
                    chunks += _cut(f"optimizer.state.{name}", entries[parameter], flat, start)
    return chunks


def _own_ranges(optimizer: Any) -> Iterator[tuple[Tensor, int, int]]:
    """(weight, start, end): the flat range of each weight whose states this rank holds."""
    for by_dtype in getattr(optimizer, "gbuf_ranges", ()):
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _cut(prefix: str, entry: Any, flat: Tensor, start: int) -> Iterator[tuple[WriteItem, Tensor]]:
    """The chunks of `flat`, elements from `start` on of something that lies as the weight of `entry` does."""
    weight = entry.data
    # A gate and its up-projection are one weight and two parts of the array in the checkpoint.
    parts = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    for part in parts:
        assert isinstance(part, ShardedTensor)
        assert part.data is not None
        assert part.data.is_contiguous()
        assert isinstance(part.replica_id, tuple)
        if any(part.replica_id[:-1]):  # copies over (pipeline, tensor, data): ranges share out the last
            continue
        first = part.data.storage_offset() - weight.storage_offset()
        begin, end = max(start, first), min(start + len(flat), first + part.data.numel())
        position = begin - start
        ones = (1,) * part.prepend_axis_num  # the layers of a kind are one array
        for offsets, sizes in boxes(begin - first, end - first, part.local_shape):
            length = math.prod(sizes)
            value = flat[position : position + length].view(*ones, *sizes)
            position += length
            yield _item(f"{prefix}.{part.key}", part, (*(0 for _ in ones), *offsets), value), value


def _item(name: str, part: ShardedTensor, offsets: tuple[int, ...], value: Tensor) -> WriteItem:
    """The entry in the plan of a checkpoint for `value`, at `offsets` in `part`."""
    where = torch.Size(g + o for g, o in zip(part.global_offset, offsets, strict=True))
    chunk = ChunkStorageMetadata(where, value.shape)
    return WriteItem(
        index=MetadataIndex(name, where),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk, TensorProperties.create_from_tensor(value), torch.Size(part.global_shape)
        ),
    )
