"""Documents to rows: first-fit-decreasing packing into rows of one fixed length, and the way back.

    T  tokens of a row        n  tokens of a document        D  documents of a row (its padding tail counts as
    one)

A row is one packed ("thd") sequence: `cu_seqlens` says where its documents begin and end, positions restart
at each, and nothing may look across a boundary. The shift from tokens to labels happens
here and nowhere else: position t of a row predicts token t+1 of the *same* document, so the last token of a
document predicts nothing, and masks and extras, which documents carry on their target tokens, move one to the
left with the labels.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from phi4r.core.errors import UserError
from phi4r.data import native

OnLong = Literal["error", "truncate", "skip"]


@dataclass(frozen=True, eq=False)
class Document:
    """One example. tokens int32[n]; loss_mask bool[n], True where the token is a target; extras float32[n] by
    name, each aligned with the target token (a rollout log-prob stands at the token that was sampled, not at
    the one before it)."""

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    extras: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arrays = {"loss_mask": self.loss_mask, **self.extras}
        for name, array in arrays.items():
            if array.shape != self.tokens.shape:
                raise ValueError(f"{name} has shape {array.shape}, tokens {self.tokens.shape}")
        if self.tokens.ndim != 1 or len(self.tokens) == 0:
            raise ValueError(f"tokens must be a non-empty vector, found shape {self.tokens.shape}")

    @property
    def num_targets(self) -> int:
        """Tokens that will count in the loss: the first token of a document is never predicted."""
        return int(self.loss_mask[1:].sum())


@dataclass(frozen=True, eq=False)
class PackedRow:
    """One row. input_ids, labels, position_ids int64[T]; loss_mask float32[T] (0 or 1); cu_seqlens
    int32[D+1]; extras float32[T] by name; doc_index int32[T]: the document's index in the caller's list, -1
    in the padding tail."""

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.float32]
    position_ids: npt.NDArray[np.int64]
    cu_seqlens: npt.NDArray[np.int32]
    extras: dict[str, npt.NDArray[np.float32]]
    doc_index: npt.NDArray[np.int32]

    @property
    def num_tokens(self) -> int:
        """Tokens of real documents (not padding)."""
        return int((self.doc_index >= 0).sum())

    @property
    def max_seqlen(self) -> int:
        """The longest document of the row, the padding tail included."""
        return int(np.diff(self.cu_seqlens).max())


@dataclass
class LengthReport:
    """What `fit_documents` did. `truncated_tokens` and `skipped_tokens` are tokens that training will not
    see."""

    documents: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    skipped: int = 0
    skipped_tokens: int = 0
    no_target: int = 0


def fit_documents(
    documents: Sequence[Document],
    seq_length: int,
    on_long: OnLong = "error",
    names: Sequence[str] | None = None,
) -> tuple[list[Document], list[int], LengthReport]:
    """Applies the length rule: documents longer than `seq_length` are refused, cut to their head, or left
    out.

    Returns the documents that remain, their indices in `documents`, and the counts. A document without a
    single target (perhaps because of the cut) would only cost time, so it is left out and counted as
    `no_target`.
    """
    report = LengthReport(documents=len(documents))
    kept: list[Document] = []
    indices: list[int] = []
    for index, document in enumerate(documents):
        excess = len(document.tokens) - seq_length
        if excess > 0:
            if on_long == "error":
                name = names[index] if names is not None else f"document {index}"
                raise UserError(
                    f"{name} has {len(document.tokens)} tokens, data.seq_length is {seq_length}: "
                    "raise it, or say data.on_long = 'truncate' or 'skip'"
                )
            if on_long == "skip":
                report.skipped += 1
                report.skipped_tokens += len(document.tokens)
                continue
            extras = {key: value[:seq_length] for key, value in document.extras.items()}
            document = Document(document.tokens[:seq_length], document.loss_mask[:seq_length], extras)
            report.truncated += 1
            report.truncated_tokens += excess
        if document.num_targets == 0:
            report.no_target += 1
            continue
        kept.append(document)
        indices.append(index)
    return kept, indices, report


def _fill(
    documents: Sequence[Document],
    members: Sequence[int],
    seq_length: int,
    pad_id: int,
    extra_names: Sequence[str],
) -> PackedRow:
    input_ids = np.full(seq_length, pad_id, dtype=np.int64)
    labels = np.full(seq_length, pad_id, dtype=np.int64)
    loss_mask = np.zeros(seq_length, dtype=np.float32)
    position_ids = np.zeros(seq_length, dtype=np.int64)
    doc_index = np.full(seq_length, -1, dtype=np.int32)
    extras = {name: np.zeros(seq_length, dtype=np.float32) for name in extra_names}
    boundaries = [0]
    for index in members:
        document = documents[index]
        start, stop = boundaries[-1], boundaries[-1] + len(document.tokens)
        input_ids[start:stop] = document.tokens
        labels[start : stop - 1] = document.tokens[1:]
        loss_mask[start : stop - 1] = document.loss_mask[1:]
        position_ids[start:stop] = np.arange(stop - start)
        doc_index[start:stop] = index
        for name in extra_names:
            extras[name][start : stop - 1] = document.extras[name][1:]
        boundaries.append(stop)
    if boundaries[-1] < seq_length:
        position_ids[boundaries[-1] :] = np.arange(seq_length - boundaries[-1])
        boundaries.append(seq_length)
    cu_seqlens = np.asarray(boundaries, dtype=np.int32)
    return PackedRow(input_ids, labels, loss_mask, position_ids, cu_seqlens, extras, doc_index)


def pack(documents: Sequence[Document], seq_length: int, pad_id: int = 0) -> list[PackedRow]:
    """Packs `documents` into rows of `seq_length` tokens by first-fit-decreasing; deterministic.

    Longest documents first (ties by index), each into the first row with room; inside a row documents stand
    in the order of their index. Rows come out in the order they were opened, the fullest documents first: a
    trainer shuffles rows. Every document must fit and all must carry the same extras (ValueError):
    `fit_documents` applies the length rule.
    """
    if not documents:
        return []
    extra_names = sorted(documents[0].extras)
    for index, document in enumerate(documents):
        if sorted(document.extras) != extra_names:
            raise ValueError(
                f"document {index} has extras {sorted(document.extras)}, document 0 {extra_names}"
            )
    lengths = np.array([len(document.tokens) for document in documents], dtype=np.int64)
    bins = native.pack_ffd(lengths, seq_length)
    members: list[list[int]] = [[] for _ in range(int(bins.max()) + 1)]
    for index, bin_index in enumerate(bins.tolist()):
        members[bin_index].append(index)
    return [_fill(documents, row, seq_length, pad_id, extra_names) for row in members]


def unpack(
    rows: Sequence[PackedRow], values_per_row: Sequence[npt.NDArray[Any]], documents: Sequence[Document]
) -> list[npt.NDArray[Any]]:
    """Brings one value per row position back to the documents that `pack` was given.

    `values_per_row[r][t]` belongs to the prediction of `labels[t]` (a log-prob, say). Returns for each
    document an array of its n values aligned with its tokens: entry i belongs to token i, entry 0 is 0
    because nothing predicts the first token.
    """
    if len(rows) != len(values_per_row):
        raise ValueError(f"{len(rows)} rows but {len(values_per_row)} arrays of values")
    result: list[npt.NDArray[Any] | None] = [None] * len(documents)
    for row, values in zip(rows, values_per_row, strict=True):
        if values.shape != row.input_ids.shape:
            raise ValueError(f"values have shape {values.shape}, the row {row.input_ids.shape}")
        for start, stop in zip(row.cu_seqlens[:-1].tolist(), row.cu_seqlens[1:].tolist(), strict=True):
            index = int(row.doc_index[start])
            if index >= 0:
                aligned = np.zeros(stop - start, dtype=values.dtype)
                aligned[1:] = values[start : stop - 1]
                result[index] = aligned
    missing = [index for index, value in enumerate(result) if value is None]
    if missing:
        raise ValueError(f"{len(missing)} documents are in no row, the first is document {missing[0]}")
    return [value for value in result if value is not None]


def efficiency(rows: Sequence[PackedRow]) -> float:
    """Share of row positions that hold a real token (1.0 = no padding); 0.0 for no rows."""
    total = sum(len(row.input_ids) for row in rows)
    return sum(row.num_tokens for row in rows) / total if total else 0.0


# --- which data-parallel rank takes which rows
#
# All rows have the same number of tokens, so their matrix products cost the same; attention grows with the
# square of a document's length. A step ends when its slowest rank has, so rows are dealt to even out the sum
# of squared document lengths (the padding tail is one of them), equally many to every rank, as the pipeline
# needs. A pure function of the rows: every rank finds the same shares, and so does a resumed run.


def attention_cost(row: PackedRow) -> int:
    """Token pairs that attention looks at, twice over: the sum of the squared document lengths."""
    return int((np.diff(row.cu_seqlens).astype(np.int64) ** 2).sum())


def share_out(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """The indices of each rank's rows, ascending, equally many for all (ValueError where that cannot be).

    Longest first, each to the rank with the least so far that still has room; ties go to the lower index.
    """
    if len(costs) % num_ranks:
        raise ValueError(f"{len(costs)} rows cannot be dealt evenly to {num_ranks} ranks")
    room = len(costs) // num_ranks
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        if len(shares[rank]) < room:
            heapq.heappush(loads, (load + costs[index], rank))
    return [sorted(share) for share in shares]


def my_share(rows: Sequence[PackedRow], num_ranks: int, rank: int) -> list[int]:
    """Indices of the rows that data-parallel rank `rank` takes."""
    if num_ranks == 1:
        return list(range(len(rows)))
    return share_out([attention_cost(row) for row in rows], num_ranks)[rank]
