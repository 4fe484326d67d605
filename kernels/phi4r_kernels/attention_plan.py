"""The tiles of one packed row, made once on the host and shared by all layers, heads and passes.

A packed row holds documents one after another; attention stays inside a document. Local query i stands at row
position i + q_offsets[0] before `q_split` and i + q_offsets[1] from there on (a rank of context parallelism
holds two chunks of the row; without it both offsets are 0), and sees key j of its document iff the attention
is not causal or j <= its position. The plan cuts the queries of every document into tiles of Q_TILE and its
keys into tiles of K_TILE, and orders them heaviest first: programs start in that order, so the longest
documents begin at once and the short ones fill the gaps at the end.

    q_tiles int32 [tiles, 8]: q_start, q_stop, offset, k_start, k_full, k_stop, 0, 0
        queries q_start..q_stop stand at q + offset (FAR behind all keys if not causal); all of them see keys
        k_start..k_full, some see keys up to k_stop.
    k_tiles int32 [tiles, 8]: k_start, k_stop, then twice q_start, q_stop, offset
        queries of the document that see a key of k_start..k_stop, before and after q_split (empty: both 0).

Nothing here reads a device: cu_seqlens are host integers, tables go up without a synchronisation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Q_TILE = 128
"""Queries of one tile of the forward and dQ kernels."""
K_TILE = 128
"""Keys of one tile of the dK/dV kernel."""
FAR = 2**30
"""Offset, in the tables of an attention that is not causal, that puts every query behind all keys."""


@dataclass(frozen=True)
class Piece:
    """A document's queries on one side of q_split: local queries q_start..q_stop at row positions + offset,
    and the document's keys k_start..k_stop."""

    q_start: int
    q_stop: int
    offset: int
    k_start: int
    k_stop: int


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """See the module. num_queries and num_keys are Tq and Tk; num_pairs counts the (query, key) pairs of one
    head, so one forward pass costs 4 H num_pairs FLOPs a head, a backward pass 10 H num_pairs."""

    num_queries: int
    num_keys: int
    causal: bool
    pieces: tuple[Piece, ...]
    num_pairs: int
    q_tiles: Tensor
    k_tiles: Tensor


def _bounds(name: str, cu_seqlens: Sequence[int] | npt.NDArray[np.integer]) -> list[int]:
    if isinstance(cu_seqlens, Tensor):
        raise ValueError(
            f"{name} is a tensor: pass host integers (numpy or list), a plan never reads a device"
        )
    bounds = [int(bound) for bound in cu_seqlens]
    if len(bounds) < 2 or bounds[0] != 0 or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"{name} must rise from 0 and name at least one document, got {bounds[:8]}")
    return bounds


def _pieces(
    bounds_q: list[int], bounds_k: list[int], causal: bool, q_split: int, q_offsets: tuple[int, int]
) -> list[Piece]:
    pieces = []
    for doc in range(len(bounds_q) - 1):
        start, stop, k_start, k_stop = bounds_q[doc], bounds_q[doc + 1], bounds_k[doc], bounds_k[doc + 1]
        sides = ((start, min(stop, q_split), q_offsets[0]), (max(start, q_split), stop, q_offsets[1]))
        for q_start, q_stop, offset in sides:
            if q_start >= q_stop:
                continue
            if k_start == k_stop:
                raise ValueError(f"document {doc} has {stop - start} queries and no keys")
            if causal and not k_start <= q_start + offset <= q_stop - 1 + offset < k_stop:
                raise ValueError(
                    f"document {doc}: queries {q_start}..{q_stop} stand at {q_start + offset}.."
                    f"{q_stop + offset}, outside its keys {k_start}..{k_stop}"
                )
            pieces.append(Piece(q_start, q_stop, offset, k_start, k_stop))
    return pieces


def _query_table(pieces: Sequence[Piece], causal: bool) -> npt.NDArray[np.int32]:
    rows = []
    for piece in pieces:
        for lo in range(piece.q_start, piece.q_stop, Q_TILE):
            hi = min(lo + Q_TILE, piece.q_stop)
            if causal:
                first, last = lo + piece.offset, hi - 1 + piece.offset
                rows.append((lo, hi, piece.offset, piece.k_start, first + 1, last + 1, 0, 0))
            else:
                rows.append((lo, hi, FAR, piece.k_start, piece.k_stop, piece.k_stop, 0, 0))
    table = np.array(rows, dtype=np.int32).reshape(-1, 8)
    return table[np.argsort(table[:, 3] - table[:, 5], kind="stable")]


def _key_table(bounds_k: list[int], pieces: Sequence[Piece], causal: bool) -> npt.NDArray[np.int32]:
    rows, work = [], []
    of_document: dict[int, list[Piece]] = {}
    for piece in pieces:
        of_document.setdefault(piece.k_start, []).append(piece)
    for start, stop in itertools.pairwise(bounds_k):
        for lo in range(start, stop, K_TILE):
            row = [lo, min(lo + K_TILE, stop)]
            for piece in of_document.get(start, ()):
                first = max(piece.q_start, lo - piece.offset) if causal else piece.q_start
                offset = piece.offset if causal else FAR
                row += [first, piece.q_stop, offset] if first < piece.q_stop else [0, 0, 0]
            row += [0] * (8 - len(row))
            rows.append(row)
            work.append(row[3] - row[2] + row[6] - row[5])
    table = np.array(rows, dtype=np.int32).reshape(-1, 8)
    return table[np.argsort(-np.array(work), kind="stable")]


def _num_pairs(pieces: Sequence[Piece], causal: bool) -> int:
    """Visible (query, key) pairs: exact integers."""
    total = 0
    for p in pieces:
        count = p.q_stop - p.q_start
        if causal:
            first, last = p.q_start + p.offset - p.k_start + 1, p.q_stop + p.offset - p.k_start
            total += (first + last) * count // 2
        else:
            total += count * (p.k_stop - p.k_start)
    return total


def _upload(table: npt.NDArray[np.int32], device: torch.device) -> Tensor:
    host = torch.from_numpy(np.ascontiguousarray(table))
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def make_plan(
    cu_seqlens_q: Sequence[int] | npt.NDArray[np.integer],
    cu_seqlens_k: Sequence[int] | npt.NDArray[np.integer],
    *,
    causal: bool,
    device: torch.device | str,
    q_split: int | None = None,
    q_offsets: tuple[int, int] = (0, 0),
) -> AttentionPlan:
    """The plan of a packed row.

    cu_seqlens_q, cu_seqlens_k: host integers [documents + 1] from 0 to Tq and to Tk; a document may be
    without queries (its keys get zero gradients) but not without keys if it has queries. q_split, q_offsets:
    see the module; the defaults put query i at row position i. device: where the tables go. ValueError if
    the bounds do not rise from 0, disagree in their number, or put a causal query outside its document.
    """
    bounds_q, bounds_k = _bounds("cu_seqlens_q", cu_seqlens_q), _bounds("cu_seqlens_k", cu_seqlens_k)
    if len(bounds_q) != len(bounds_k):
        raise ValueError(
            f"cu_seqlens_q names {len(bounds_q) - 1} documents, cu_seqlens_k {len(bounds_k) - 1}"
        )
    split = bounds_q[-1] if q_split is None else q_split
    pieces = _pieces(bounds_q, bounds_k, causal, split, q_offsets)
    device = torch.device(device)
    return AttentionPlan(
        num_queries=bounds_q[-1],
        num_keys=bounds_k[-1],
        causal=causal,
        pieces=tuple(pieces),
        num_pairs=_num_pairs(pieces, causal),
        q_tiles=_upload(_query_table(pieces, causal), device),
        k_tiles=_upload(_key_table(bounds_k, pieces, causal), device),
    )
