"""megatron-core's `torch_dist` storage (torch.distributed.checkpoint), read and written one tensor at a time.

megatron-core stacks a layer weight of all layers under one key (`decoder.layers.mlp.linear_fc2.weight`, a
leading axis of `num_layers`), one chunk or more a layer, and names norms after the linear layer that follows,
as transformer-engine does. `StreamWriter` makes the folder that `dist_checkpointing.save` would make for
weights alone; `StreamReader` reads the weights out of any checkpoint, however its chunks were cut. Both hold
one tensor at a time. The index file is a pickle: open only checkpoints that you trust.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from phi4r.core.errors import UserError
from phi4r.models.names import Weight

FILE_BYTES = 4 << 30
"""A data file is closed once it is longer than this."""

# megatron-core's own renaming of the local layer spec's norms (`sharded_state_dict_keys_map`)
_RENAMED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def storage_key(weight: Weight) -> str:
    """The key under which a checkpoint stores a weight, the same for all layers."""
    if weight.layer is None:
        return weight.mcore
    name = weight.mcore.removeprefix(f"decoder.layers.{weight.layer}.")
    return f"decoder.layers.{_RENAMED.get(name, name)}"


# --- write


class StreamWriter:
    """Fill a new `torch_dist` folder tensor by tensor; `finish` writes its index, without which it is no
    checkpoint.
    """

    def __init__(self, folder: Path, num_layers: int) -> None:
        self.folder, self.num_layers = folder, num_layers
        folder.mkdir(parents=True, exist_ok=True)
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._results: list[WriteResult] = []
        self._num_files = 0
        self._file: Any = None

    def write(self, weight: Weight, tensor: Tensor) -> None:
        """Store a full mcore tensor (see `names.to_mcore`)."""
        assert tuple(tensor.shape) == weight.shape, f"{weight.mcore}: {tensor.shape} is not {weight.shape}"
        # gate and up as chunks of their own, as megatron-core stores them
        parts = tensor.chunk(2) if weight.kind == "gate_up" else (tensor,)
        row = 0
        for part in parts:
            offset, shape = [row] + [0] * (part.dim() - 1), list(part.shape)
            row += part.size(0)
            # torch.save would write all of the storage that a view looks at
            part = part.clone() if part.untyped_storage().nbytes() != part.nbytes else part
            if weight.layer is None:
                self._write_chunk(storage_key(weight), list(weight.shape), offset, shape, part)
            else:
                size = [self.num_layers, *weight.shape]
                self._write_chunk(storage_key(weight), size, [weight.layer, *offset], [1, *shape], part[None])

    def _write_chunk(
        self, key: str, size: list[int], offset: list[int], shape: list[int], tensor: Tensor
    ) -> None:
        if self._file is not None and self._file.tell() > FILE_BYTES:
            self._close()
        if self._file is None:
            self._file = open(self.folder / f"__0_{self._num_files}.distcp", "wb")
            self._num_files += 1
        start = self._file.tell()
        try:
            torch.save(tensor, self._file)
        except RuntimeError as error:
            # torch puts an error of its own before the file's (a full disk)
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        length = self._file.tell() - start
        stored = self._tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties.create_from_tensor(tensor), torch.Size(size), [])
        )
        index = MetadataIndex(key, offset, len(stored.chunks))
        stored.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)))
        info = _StorageInfo(Path(self._file.name).name, start, length)
        self._results.append(WriteResult(index=index, size_in_bytes=length, storage_data=info))

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._file = None

    def finish(self) -> None:
        """Write the index, the (empty) common state and megatron-core's metadata.json."""
        self._close()
        FileSystemWriter(self.folder).finish(Metadata(dict(self._tensors)), [self._results])
        torch.save({}, self.folder / "common.pt")
        (self.folder / "metadata.json").write_text(json.dumps(_CONFIG), encoding="utf-8")


# --- read


class StreamReader:
    """The weights of a `torch_dist` folder, one at a time.

    Attributes: `dtype` (torch dtype of the weights). Raises UserError naming a weight that is missing or of
    another size.
    """

    def __init__(self, folder: Path, weights: tuple[Weight, ...]) -> None:
        self.folder = folder
        self._index: Metadata = FileSystemReader(folder).read_metadata()
        num_layers = 1 + max((w.layer for w in weights if w.layer is not None), default=-1)
        dtypes = set()
        for weight in weights:
            key = storage_key(weight)
            stored = self._index.state_dict_metadata.get(key)
            if not isinstance(stored, TensorStorageMetadata):
                raise UserError(f"{folder}: {key} is missing (it holds {weight.hf})")
            expected = weight.shape if weight.layer is None else (num_layers, *weight.shape)
            # A layout whose tp did not divide the vocabulary has stored padding rows after it.
            is_padded = weight.is_vocabulary and stored.size[0] > expected[0]
            if (expected[0], *stored.size[1:]) != expected or not (
                is_padded or stored.size[0] == expected[0]
            ):
                raise UserError(f"{folder}: {key} has shape {list(stored.size)}, expected {list(expected)}")
            dtypes.add(stored.properties.dtype)
        if len(dtypes) != 1:
            raise UserError(f"{folder}: weights of several dtypes: {', '.join(sorted(map(str, dtypes)))}")
        self.dtype: torch.dtype = dtypes.pop()

    def read(self, weight: Weight) -> Tensor:
        """The full mcore tensor of a weight, put together from its chunks, without padding rows."""
        key = storage_key(weight)
        stored = self._index.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        first = () if weight.layer is None else (weight.layer,)
        chunks = [c for c in stored.chunks if all(c.offsets[0] == layer for layer in first)]
        whole: Tensor | None = None
        num_filled = 0
        size = tuple(stored.size[len(first) :])
        for chunk in chunks:
            offset, shape = chunk.offsets[len(first) :], chunk.sizes[len(first) :]
            part = self._load(MetadataIndex(key, chunk.offsets)).reshape(shape)
            num_filled += part.numel()
            if tuple(shape) == size:
                whole = part
                break
            if whole is None:
                whole = torch.empty(size, dtype=stored.properties.dtype)
            whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))] = part
        if whole is None or num_filled != whole.numel():
            raise UserError(f"{self.folder}: {key}: the chunks of {weight.hf} do not cover it")
        return whole[: weight.shape[0]] if weight.is_vocabulary else whole

    def _load(self, index: MetadataIndex) -> Tensor:
        info = self._index.storage_data[index]
        with open(self.folder / info.relative_path, "rb") as file:
            view: Any = FileSystemReader(self.folder)._slice_file(file, info)
            return torch.load(view, map_location="cpu", weights_only=True)
