"""Hugging Face model folders: config.json, safetensors shards tensor by tensor, files carried along.

    FOLDER/config.json, generation_config.json          what the model is, how to sample from it
    FOLDER/model.safetensors, or model-0000i-of-0000n.safetensors with model.safetensors.index.json
    FOLDER/tokenizer.json, tokenizer_config.json, ...   (optional)

Safetensors files are read and written here byte range by byte range rather than through the library, whose
writer takes all tensors of a shard at once and whose reader maps whole files: a conversion must not need the
model's size in memory. torch is imported only where tensors are touched, so a login node can read configs.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from phi4r.core.errors import UserError
from phi4r.families.hf_config import model_config
from phi4r.families.model import Dtype, ModelConfig

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPARED_BYTES = 1 << 24
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

# safetensors' name of a dtype -> (bytes, torch's name, ours)
_DTYPES = {"F64": (8, "float64", "fp64"), "F32": (4, "float32", "fp32"), "BF16": (2, "bfloat16", "bf16")}
_OURS = {ours: theirs for theirs, (_, _, ours) in _DTYPES.items()}


# --- config.json


def is_hf_folder(folder: str | Path) -> bool:
    """True where `folder` has a config.json of a transformers model (a run folder's config.json is another
    thing).
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return False
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(raw, dict) and ("architectures" in raw or "model_type" in raw)


def read_raw_config(folder: str | Path) -> dict[str, Any]:
    """config.json as it stands; UserError where it is missing or not a JSON object."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a Hugging Face model folder (no config.json)")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object")
    return raw


def read_hf_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder. UserError gives every reason why a model is not supported."""
    raw = read_raw_config(folder)
    named = raw.get("dtype") or raw.get("torch_dtype")
    return model_config(raw, str(Path(folder) / "config.json"), None if named else HFWeights(folder).dtype)


# --- safetensors


@dataclass(frozen=True)
class Entry:
    """One tensor inside a safetensors file: its bytes are [start, start + num_bytes)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name. UserError where the file is damaged or shorter than it
    says.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > size - 8:
                raise UserError(f"{path}: truncated: {size} bytes hold no safetensors header")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path}: not a safetensors file") from None
    header.pop("__metadata__", None)
    entries = {}
    for name, item in header.items():
        start, end = item["data_offsets"]
        entries[name] = Entry(path, item["dtype"], tuple(item["shape"]), 8 + length + start, end - start)
        if 8 + length + end > size:
            raise UserError(
                f"{path}: truncated: tensor {name} ends at byte {8 + length + end}, the file has {size}"
            )
        if item["dtype"] in _DTYPES and end - start != math.prod(item["shape"]) * _DTYPES[item["dtype"]][0]:
            raise UserError(f"{path}: tensor {name}: {end - start} bytes do not make shape {item['shape']}")
    return entries


class HFWeights:
    """The tensors of a Hugging Face folder, read one at a time. Opening reads headers only.

    Attributes: `entries` (name -> Entry), `dtype` ("bf16", "fp32" or "fp64", the same for all tensors).
    Raises UserError naming a missing, damaged or doubly defined file or tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        for path, names in self._files():
            header = read_header(path)
            for name in names if names is not None else header:
                if name not in header:
                    raise UserError(f"{path}: tensor {name} is missing ({INDEX} says it is in this file)")
            for name, entry in header.items():
                if name in self.entries:
                    raise UserError(f"{path}: tensor {name} is also in {self.entries[name].file.name}")
                self.entries[name] = entry
        self.dtype: Dtype = self._common_dtype()

    def _files(self) -> Iterator[tuple[Path, list[str] | None]]:
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / SINGLE).is_file():
                raise UserError(f"{self.folder}: no weights (expected {SINGLE} or {INDEX})")
            yield self.folder / SINGLE, None
            return
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{index}: not a safetensors index (no weight_map)") from None
        for name in sorted(set(weight_map.values())):
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder / name}: missing, but {INDEX} names it")
            yield self.folder / name, [tensor for tensor, file in weight_map.items() if file == name]

    def _common_dtype(self) -> Dtype:
        first = ""
        for name, entry in self.entries.items():
            if entry.dtype not in _DTYPES:
                raise UserError(f"{entry.file}: tensor {name} is {entry.dtype}, expected BF16, F32 or F64")
            first = first or entry.dtype
            if entry.dtype != first:
                raise UserError(f"{entry.file}: tensor {name} is {entry.dtype}, but others are {first}")
        return cast(Dtype, _DTYPES[first][2])

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """UserError naming the first tensor that is missing, not expected, or of another shape. A head that
        is tied to the embedding may stand beside it in the files if it is the same, byte for byte."""
        for name, shape in shapes.items():
            if name not in self.entries:
                raise UserError(f"{self.folder}: tensor {name} is missing (expected shape {list(shape)})")
            found = self.entries[name].shape
            if found != shape:
                raise UserError(
                    f"{self.entries[name].file}: tensor {name} has shape {list(found)}, "
                    f"expected {list(shape)}"
                )
        for name, entry in self.entries.items():
            if name == HEAD and name not in shapes:
                self._check_tied(entry)
            elif name not in shapes:
                raise UserError(f"{entry.file}: tensor {name} has no place in a model of this config")

    def _check_tied(self, head: Entry) -> None:
        embedding = self.entries[EMBEDDING]
        with open(head.file, "rb") as ours, open(embedding.file, "rb") as theirs:
            ours.seek(head.start)
            theirs.seek(embedding.start)
            left = head.num_bytes
            is_same = head.shape == embedding.shape
            while is_same and left:
                count = min(left, COMPARED_BYTES)
                is_same, left = ours.read(count) == theirs.read(count), left - count
        if not is_same:
            raise UserError(
                f"{head.file}: tensor {HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true"
            )

    def get_tensor(self, name: str) -> torch.Tensor:
        """One whole tensor, in the dtype of the file, in memory of its own."""
        import torch

        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=getattr(torch, _DTYPES[entry.dtype][1]))
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.start)
            _read_into(file, tensor.view(torch.uint8).numpy().data.cast("B"), entry)
        return tensor


def _read_into(file: Any, buffer: memoryview, entry: Entry) -> None:
    done = 0
    while done < len(buffer):  # one read gives at most 2 GiB
        count = file.readinto(buffer[done:])
        if not count:
            raise UserError(f"{entry.file}: truncated while it was read")
        done += count


class ShardWriter:
    """Write one safetensors file whose tensors are handed over one after another, in the order of `tensors`.

    tensors: (name, shape) in order; dtype: "bf16", "fp32" or "fp64". A context manager; leaving it early is
    an error of ours.
    """

    def __init__(self, path: Path, tensors: list[tuple[str, tuple[int, ...]]], dtype: str) -> None:
        size, self._torch_dtype, _ = _DTYPES[_OURS[dtype]]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in tensors:
            start, end = end, end + math.prod(shape) * size
            header[name] = {"dtype": _OURS[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start on 8 bytes
        self._waiting = list(tensors)
        self._file = open(path, "wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor."""
        import torch

        expected, shape = self._waiting.pop(0)
        assert (name, tuple(tensor.shape)) == (expected, shape), (
            f"{name} {tensor.shape} is not {expected} {shape}"
        )
        assert tensor.dtype == getattr(torch, self._torch_dtype), f"{name} is {tensor.dtype}"
        data = tensor.contiguous().view(torch.uint8)
        self._file.write(data.numpy().data.cast("B"))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is None:
            assert not self._waiting, f"not written: {self._waiting}"
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()


def plan_shards(
    tensors: list[tuple[str, tuple[int, ...]]], dtype: str, max_bytes: int
) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Cut tensors, in order, into shards of at most `max_bytes` (a larger tensor gets a shard of its own)."""
    size = _DTYPES[_OURS[dtype]][0]
    shards: list[list[tuple[str, tuple[int, ...]]]] = []
    room = 0
    for name, shape in tensors:
        num_bytes = math.prod(shape) * size
        if not shards or num_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append((name, shape))
        room -= num_bytes
    return shards


def shard_names(count: int) -> list[str]:
    """The file names that transformers gives `count` shards."""
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
