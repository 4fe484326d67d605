"""A rank's own part of the distributed optimizer's state, as chunks of a `torch_dist` checkpoint.

megatron-core has every data-parallel rank collect the states of all of them in host memory before a save,
while training stands still, and read all of them in a load: 12 bytes a parameter of its model part. Here a
rank writes what it holds and reads what it will hold, and no bytes move between ranks: the states of a flat
range of each weight are a few boxes of the weight's array. The checkpoint holds megatron-core's arrays under
its names, cut elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

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
    """megatron-core's distributed optimizers describe and load all but the states of their parameters."""

    def nothing(*args: Any, **kwargs: Any) -> dict[int, Any]:
        return {}

    distributed = [one for one in optimizers if hasattr(one, "gbuf_ranges")]
    for one in distributed:
        one.sharded_param_state_fully_reshardable = nothing
        one.load_parameter_state_from_fully_reshardable = nothing
    try:
        yield
    finally:
        for one in distributed:
            del one.sharded_param_state_fully_reshardable
            del one.load_parameter_state_from_fully_reshardable


@dataclass(frozen=True)
class _Piece:
    """A box of an array of the checkpoint that this rank holds. value: a view of the state, of its sizes."""

    name: str
    shape: torch.Size
    """Of the whole array."""
    offsets: torch.Size
    value: Tensor

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.name, self.offsets)

    @property
    def box(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(self.offsets, self.value.shape)


def state_chunks(optimizers: Sequence[Any], model: Any) -> list[tuple[WriteItem, Tensor]]:
    """What this rank stores of the states of `optimizers` (none of a plain one): views, not copies.

    model: megatron-core's sharded state dict of the weights, as the model makes it.
    """
    entries = _entries(model)
    pieces = [
        piece
        for one in optimizers
        for parameter, start, states in _own_states(one)
        for piece in _pieces(entries[parameter], start, states, with_copies=False)
    ]
    return [
        (
            WriteItem(
                index=piece.index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    piece.box, TensorProperties.create_from_tensor(piece.value), piece.shape
                ),
            ),
            piece.value,
        )
        for piece in pieces
    ]


def load_states(folder: Path, optimizers: Sequence[Any], model: Any) -> None:
    """Fill what this rank holds of the states of `optimizers` (nothing of a plain one) from a checkpoint's
    `torch_dist` folder, saved under any layout. Of its files only the chunks that have a part of it are read.

    model: as for `state_chunks`. Rows that pad the vocabulary are zero where the checkpoint has none. Raises
    KeyError for a state that the checkpoint lacks.
    """
    reader = FileSystemReader(folder)
    index = reader.read_metadata()
    reader.set_up_storage_reader(index, is_coordinator=False)
    held = [(one, *rest) for one in optimizers for rest in _own_states(one)]
    targets: dict[MetadataIndex, Tensor] = {}
    items: list[ReadItem] = []
    entries = _entries(model)
    for _, parameter, start, states in held:
        for piece in _pieces(entries[parameter], start, states, with_copies=True):
            stored = index.state_dict_metadata[piece.name]
            assert isinstance(stored, TensorStorageMetadata)
            reads = create_read_items_for_chunk_list(piece.name, stored, [piece.box])
            num_read = sum(math.prod(read.lengths) for read in reads)
            assert num_read == _num_inside(piece, stored.size), f"{folder}: a part of {piece.name} is missing"
            if num_read < piece.value.numel():
                piece.value.zero_()
            targets[piece.index] = piece.value
            items += reads
    reader.read_data(LoadPlan(items), _Targets(targets)).wait()
    with torch.no_grad():
        for one, parameter, _, states in held:
            if not isinstance(one.optimizer, torch.optim.AdamW):  # transformer-engine's may have given copies
                one._set_main_param_and_optimizer_states(parameter, states)
    for one in optimizers:
        if hasattr(one.optimizer, "_sync_hdo_state_to_sub_optimizers"):  # states in host memory
            one.optimizer._sync_hdo_state_to_sub_optimizers()


def _num_inside(piece: _Piece, stored: Sequence[int]) -> int:
    """Elements of the piece that an array of the size `stored` has."""
    sizes = zip(piece.offsets, piece.value.shape, stored, strict=True)
    return math.prod(max(0, min(start + size, end) - start) for start, size, end in sizes)


class _Targets(DefaultLoadPlanner):
    """Says where what is read belongs."""

    def __init__(self, targets: dict[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self.targets = targets

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.targets[index]


def _entries(model: Any) -> dict[Tensor, Any]:
    """Each weight's entry in the sharded state dict."""
    return {entry.data: entry for entry in nested_values(model)}


def _own_states(optimizer: Any) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
    """(weight, start, states): the flat range of each weight whose states this rank holds, and these."""
    for by_dtype in getattr(optimizer, "gbuf_ranges", ()):
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    states = {
                        name: values.detach()
                        for name, values in optimizer._get_main_param_and_optimizer_states(parameter).items()
                        if name != "step"  # kept with the parameter groups
                    }
                    length = ranges["param"].end - ranges["param"].start
                    assert all(values.numel() == length for values in states.values())
                    yield parameter, ranges["param"].start, states


def _pieces(entry: Any, start: int, states: dict[str, Tensor], *, with_copies: bool) -> Iterator[_Piece]:
    """The boxes of `states`, elements from `start` on of arrays that lie as the weight of `entry` does.

    with_copies: also of what other ranks along (pipeline, tensor) hold as well.
    """
    weight = entry.data
    # A gate and its up-projection are one weight and two parts of the array in the checkpoint.
    parts = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    for part in parts:
        assert isinstance(part, ShardedTensor)
        assert part.data is not None
        assert part.data.is_contiguous()
        assert isinstance(part.replica_id, tuple)
        # Copies over (pipeline, tensor, data): of the last, ranges are shared out.
        if any(part.replica_id[:-1]) and not with_copies:
            continue
        first = part.data.storage_offset() - weight.storage_offset()
        ones = (1,) * part.prepend_axis_num  # the layers of a kind are one array
        for state, values in states.items():
            flat = values.view(-1)
            begin, end = max(start, first), min(start + len(flat), first + part.data.numel())
            position = begin - start
            for offsets, sizes in boxes(begin - first, end - first, part.local_shape):
                length = math.prod(sizes)
                within = (*(0 for _ in ones), *offsets)
                yield _Piece(
                    f"optimizer.state.{state}.{part.key}",
                    torch.Size(part.global_shape),
                    torch.Size(g + o for g, o in zip(part.global_offset, within, strict=True)),
                    flat[position : position + length].view(*ones, *sizes),
                )
                position += length
