"""The plan of `phi4r data build`: from the tables of the parts alone (some 50 bytes a document) it draws the
held-out documents, turns mixture weights into copies, and packs rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phi4r.configs.sections import DataConfig
from phi4r.configs.stages import SFTConfig
from phi4r.core.errors import UserError
from phi4r.data import mixture, native
from phi4r.data.records import Span
from phi4r.data.sft_data import draw_heldout

DOCUMENT = np.dtype(
    [
        ("start", np.int64),  # of its tokens in the part
        ("length", np.int32),  # tokens kept; 0: left out by the length rule
        ("rendered", np.int32),  # tokens before the length rule
        ("targets", np.int32),
        ("cluster", np.int32),  # index into the part's list of clusters
        ("copies", np.int32),  # the row's own epochs; -1: the mixture decides
        ("line", np.int64),
        ("id", np.uint64),
        ("question", np.uint64),
    ]
)
"""A document in a part's table; ids and questions as 64-bit hashes."""


def hash64(text: str) -> int:
    """A 64-bit hash of a text, the same everywhere."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def part_paths(out: str | Path, number: int) -> dict[str, Path]:
    """The files of a part; `info`, written last, says that it is whole."""
    folder = Path(out) / "parts"
    return {
        "tokens": folder / f"tokens_{number:06d}.npy",
        "table": folder / f"table_{number:06d}.npy",
        "rejects": folder / f"rejects_{number:06d}.jsonl",
        "info": folder / f"info_{number:06d}.json",
    }


@dataclass
class Plan:
    """The tables of all parts joined, in file and line order, and what they are used for. parts int32[N]: the
    part of each document; clusters: names; rows: per part of the result ("train", "heldout") the documents
    of each row."""

    table: npt.NDArray[Any]
    parts: npt.NDArray[np.int32]
    clusters: list[str]
    rows: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = field(default_factory=dict)
    """part -> (documents of all rows one after another, where each row begins [rows + 1])."""
    overlap: int = 0
    rows_read: int = 0
    rejected: int = 0


def read_tables(out: Path, spans: list[Span], data: DataConfig) -> Plan:
    """Join the parts' tables. Two rows with one id: UserError, or the later one is dropped ("skip")."""
    names: dict[str, int] = {}
    tables, parts = [], []
    plan = Plan(np.zeros(0, DOCUMENT), np.zeros(0, np.int32), [])
    for number in range(len(spans)):
        paths = part_paths(out, number)
        info = json.loads(paths["info"].read_text(encoding="utf-8"))
        table = np.load(paths["table"])
        known = np.array([names.setdefault(name, len(names)) for name in info["clusters"]] or [0], np.int32)
        table["cluster"] = known[table["cluster"]]
        tables.append(table)
        parts.append(np.full(len(table), number, np.int32))
        plan.rows_read += info["rows"]
        plan.rejected += info["rejected"]
    plan.table, plan.parts, plan.clusters = np.concatenate(tables), np.concatenate(parts), list(names)
    _, first = np.unique(plan.table["id"], return_index=True)
    if len(first) < len(plan.table):
        repeated = np.ones(len(plan.table), bool)
        repeated[first] = False
        if data.on_bad_row == "stop":
            index = int(np.flatnonzero(repeated)[0])
            place = f"{spans[plan.parts[index]].file}:{plan.table['line'][index]}"
            raise UserError(f"{place}: field 'id': already used by an earlier row")
        plan.rejected += int(repeated.sum())
        plan.table, plan.parts = plan.table[~repeated], plan.parts[~repeated]
    if not len(plan.table):
        raise UserError(f"{data.path}: no usable rows ({plan.rows_read} read, all rejected)")
    return plan


def plan_rows(plan: Plan, config: SFTConfig, epochs: dict[str, float], foreign: set[int]) -> None:
    """Fill `plan.rows`: held-out documents as SFT draws them, no training document that asks the same, and
    each epoch packed by itself, so that a row never holds a document twice. foreign: hashed questions of
    `data.heldout_path`."""
    table, data = plan.table, config.data
    is_heldout = np.zeros(len(table), bool)
    if not data.heldout_path:
        is_heldout[draw_heldout(len(table), data.heldout, config.seed)] = True
    held = np.array(sorted(foreign), np.uint64) if foreign else table["question"][is_heldout]
    asked = np.isin(table["question"], held)
    plan.overlap = int((asked & ~is_heldout).sum())
    copies = mixture.copies(table["id"], table["cluster"], plan.clusters, epochs, config.seed)
    copies = np.where(table["copies"] >= 0, table["copies"], copies)
    copies[asked | (table["length"] == 0)] = 0
    plan.rows["train"] = _pack(table, [np.flatnonzero(copies > e) for e in range(copies.max())], data)
    plan.rows["heldout"] = _pack(table, [np.flatnonzero(is_heldout & (table["length"] > 0))], data)
    if len(plan.rows["train"][1]) == 1:
        raise UserError(
            f"{data.path}: no document is left to train on, of {len(table)} ({plan.overlap} overlap)"
        )


def _pack(
    table: npt.NDArray[Any], epochs: Iterable[npt.NDArray[np.int64]], data: DataConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    documents, starts, filled = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)], 0
    for chosen in epochs:
        if not len(chosen):
            continue
        bins = native.pack_ffd(table["length"][chosen].astype(np.int64), data.seq_length)
        order = np.argsort(bins, kind="stable")
        documents.append(chosen[order])
        starts.append(np.cumsum(np.bincount(bins)) + filled)
        filled += len(chosen)
    return np.concatenate(documents), np.concatenate(starts)
