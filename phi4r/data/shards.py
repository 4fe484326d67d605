"""Packed rows on disk: memory-mapped shards that a trainer reads row by row.

    FOLDER/build.json                what it is built from and how
    FOLDER/index.json                written last: statistics, and the rows of every shard
    FOLDER/train/tokens_00000.npy    int32 [rows, T]  token ids; the sign bit is set on targets
    FOLDER/train/bounds_00000.npy    int32 [...]      every row's cu_seqlens, one after another
    FOLDER/train/rows_00000.npy      int64 [rows, 3]  start and length of its bounds, tokens but for padding
    FOLDER/heldout/...               the same

    T  tokens of a row

`phi4r data build` writes them (`phi4r.data.build`); nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from phi4r.core.errors import UserError
from phi4r.data.packing import PackedRow
from phi4r.data.tokenizer import Tokenizer

FORMAT = "phi4r-shards-1"
INDEX = "index.json"
SETTINGS = "build.json"
TARGET_BIT = np.int32(-(2**31))
ID_BITS = np.int32(2**31 - 1)


def is_shard_folder(path: str | Path) -> bool:
    """Whether `phi4r data build` has finished a folder there."""
    return bool(path) and (Path(path) / INDEX).is_file()


def read_index(folder: str | Path) -> dict[str, Any]:
    """The content of index.json; UserError where it is missing, damaged or of another format."""
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no {INDEX}: `phi4r data build` has not finished here") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error.msg}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{path}: expected the format {FORMAT}")
    return index


def read_settings(folder: str | Path) -> dict[str, Any]:
    """What the folder was built from and how: build.json."""
    settings: dict[str, Any] = json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8"))
    return settings


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of the tokenizer's files: shards are for the tokenizer they were made with."""
    digest = hashlib.blake2b(digest_size=16)
    for name, content in sorted(tokenizer.files.items()):
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


def mark_targets(tokens: npt.NDArray[np.int32], loss_mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Tokens with the sign bit set where the mask is."""
    return np.where(loss_mask, tokens | TARGET_BIT, tokens)


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an .npy file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def shard_paths(folder: Path, number: int) -> dict[str, Path]:
    """The files of a shard by what they hold."""
    return {name: folder / f"{name}_{number:05d}.npy" for name in ("tokens", "bounds", "rows")}


@lru_cache(maxsize=2)
def _counts(length: int) -> npt.NDArray[np.int64]:
    """0, 1, ... length - 1, shared by all rows of that length."""
    counts = np.arange(length, dtype=np.int64)
    counts.setflags(write=False)
    return counts


class ShardRow(PackedRow):
    """A row of a shard whose arrays are made when they are asked for: a rank that has no part in a row never
    reads its tokens. `doc_index` counts the documents of the row from 0. `placed`: arrays by name that a
    loader has made tensors of already, where the training wants them."""

    placed: dict[str, Any]

    def __init__(
        self, marked: npt.NDArray[np.int32], cu_seqlens: npt.NDArray[np.int32], filled: int, pad_id: int
    ) -> None:
        # A frozen dataclass refuses assignment; the arrays below are cached in __dict__ as well.
        self.__dict__.update(
            _marked=marked, cu_seqlens=cu_seqlens, _filled=filled, _pad=pad_id, extras={}, placed={}
        )

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = (self.input_ids, self.labels, self.loss_mask, self.position_ids)
        return PackedRow, (*arrays, self.cu_seqlens, self.extras, self.doc_index)

    @property
    def num_tokens(self) -> int:
        """Tokens of real documents (not padding)."""
        return int(self.__dict__["_filled"])

    @cached_property
    def _ids(self) -> npt.NDArray[np.int32]:
        return np.asarray(self.__dict__["_marked"]) & ID_BITS

    @cached_property
    def input_ids(self) -> npt.NDArray[np.int64]:  # type: ignore[override]
        return self._ids.astype(np.int64)

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        """Positions whose successor is in no document, or in another one."""
        return self.cu_seqlens[1:].astype(np.int64) - 1

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:  # type: ignore[override]
        labels = np.empty(len(self._ids), dtype=np.int64)
        labels[:-1] = self._ids[1:]
        labels[self._ends] = self.__dict__["_pad"]
        return labels

    @cached_property
    def loss_mask(self) -> npt.NDArray[np.float32]:  # type: ignore[override]
        mask = np.zeros(len(self._ids), dtype=np.float32)
        mask[:-1] = np.asarray(self.__dict__["_marked"])[1:] < 0
        mask[self._ends] = 0.0
        return mask

    @cached_property
    def position_ids(self) -> npt.NDArray[np.int64]:  # type: ignore[override]
        positions = np.empty(len(self._ids), dtype=np.int64)
        bounds = self.cu_seqlens.tolist()
        for start, end in itertools.pairwise(bounds):  # copies of one range: a tenth of np.repeat's time
            positions[start:end] = _counts(len(positions))[: end - start]
        return positions

    @cached_property
    def doc_index(self) -> npt.NDArray[np.int32]:  # type: ignore[override]
        lengths = np.diff(self.cu_seqlens)
        index = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        index[self.num_tokens :] = -1
        return index

    def load(self) -> None:
        """Make the arrays that training reads now."""
        _ = self.input_ids, self.labels, self.loss_mask, self.position_ids


class ShardRows(Sequence[PackedRow]):
    """The rows of one part ("train" or "heldout") of a folder, as a sequence; memory-mapped."""

    def __init__(self, folder: str | Path, part: str = "train") -> None:
        self.folder, self.part = Path(folder), part
        index = read_index(folder)
        self.seq_length, self.pad_id = int(index["seq_length"]), int(index["pad_id"])
        self.first_rows = np.cumsum([0, *index["shards"][part]])
        self._open: dict[int, tuple[npt.NDArray[Any], ...]] = {}

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def _shard(self, number: int) -> tuple[npt.NDArray[Any], ...]:
        if number not in self._open:
            paths = shard_paths(self.folder / self.part, number)
            try:
                arrays = tuple(np.load(path, mmap_mode="r") for path in paths.values())
            except (OSError, ValueError) as error:
                raise UserError(f"{self.folder}: shard {number} of {self.part} is damaged: {error}") from None
            rows = int(self.first_rows[number + 1] - self.first_rows[number])
            if arrays[0].shape != (rows, self.seq_length) or arrays[2].shape != (rows, 3):
                raise UserError(
                    f"{paths['tokens']}: expected {rows} rows of {self.seq_length} tokens, found shape"
                    f" {arrays[0].shape}"
                )
            self._open[number] = arrays
        return self._open[number]

    @overload
    def __getitem__(self, index: int) -> PackedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[PackedRow]: ...
    def __getitem__(self, index: int | slice) -> PackedRow | list[PackedRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        number = int(np.searchsorted(self.first_rows, index, side="right")) - 1
        tokens, bounds, rows = self._shard(number)
        local = index - int(self.first_rows[number])
        start, count, filled = rows[local].tolist()
        return ShardRow(tokens[local], np.array(bounds[start : start + count]), filled, self.pad_id)

    def __iter__(self) -> Iterator[PackedRow]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardRows, (self.folder, self.part)
