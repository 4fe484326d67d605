"""What travels beside the hidden states of one packed row to every pipeline stage.

`PackedContext` is megatron-core's `PackedSeqParams` with what our core attention needs on top, so it
reaches each layer through megatron's own argument. Masks and rotary tables are made once per row and shared
by all layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from phi4r.families.rotary import Rotary
from phi4r.parallel import zigzag

if TYPE_CHECKING:
    from phi4r_kernels.attention_plan import AttentionPlan

    from phi4r.models.kv_cache import KVCache


class Varlen(NamedTuple):
    """Pieces of documents one after another: bounds int32 [pieces + 1] of their queries and of their keys,
    the longest of each, and the row positions of the keys int64 (None: all of the row, in order). The last
    query of a piece sits on its last key."""

    query_bounds: Tensor
    key_bounds: Tensor
    max_queries: int
    max_keys: int
    key_index: Tensor | None


@dataclass
class PackedContext(PackedSeqParams):
    """One packed row, or one decoding step, as attention sees it.

    position_ids: int64 [T local], position of each local token inside its document (for RoPE).
    num_tokens: T of the whole row (all CP ranks). cu_seqlens_q/kv: int32 [documents + 1] over the whole row.
    kv_cache: set while sampling; then keys and values are stored in (and, when decoding, read from) the
    cache. host_bounds: cu_seqlens as host integers, so that a plan needs no synchronisation.
    """

    position_ids: Tensor = None  # type: ignore[assignment]
    num_tokens: int = 0
    cp: int = 1
    cp_rank: int = 0
    kv_cache: KVCache | None = None
    host_bounds: Sequence[int] | None = None
    _mask: Tensor | None = None
    _segments: list[tuple[int, int, int, int]] | None = None
    _rotary: tuple[Tensor, Tensor] | None = None
    _plan: AttentionPlan | None = None
    _varlen: Varlen | None = None

    def query_index(self) -> Tensor:
        """Row positions int64 [T local] of this rank's queries."""
        return zigzag.local_index(self.num_tokens, self.cp, self.cp_rank)

    def mask(self) -> Tensor:
        """bool [T local, T]: same document and not after the query. Made once per row; for short rows
        only."""
        if self._mask is None:
            row = torch.arange(self.num_tokens, device=self.cu_seqlens_q.device)
            document = torch.searchsorted(self.cu_seqlens_q[1:].contiguous(), row, right=True)
            query = self.query_index().to(row.device)
            self._mask = (document[query, None] == document[None]) & (row[None] <= query[:, None])
        return self._mask

    def segments(self) -> list[tuple[int, int, int, int]]:
        """(query start, query end, key start, key end) per contiguous piece of a document held by this rank:
        local query indices against row key indices; the last query of a piece sits on its last key."""
        if self._segments is None:
            self._segments = []
            bounds = self.cu_seqlens_q.tolist()
            size = self.num_tokens // (2 * self.cp)
            chunks = zigzag.chunk_ids(self.cp, self.cp_rank) if self.cp > 1 else (0,)
            length = size if self.cp > 1 else self.num_tokens
            for local, chunk in enumerate(chunks):
                lo, hi = chunk * length, (chunk + 1) * length
                for start, end in itertools.pairwise(bounds):
                    first, last = max(lo, start), min(hi, end)
                    if first < last:
                        offset = local * length - lo
                        self._segments.append((first + offset, last + offset, start, last))
        return self._segments

    def varlen(self) -> Varlen:
        """This rank's pieces as FlashAttention's variable-length calls take them; made once per row."""
        if self._varlen is None:
            device = self.cu_seqlens_q.device
            pieces = self.segments()
            queries = [q_hi - q_lo for q_lo, q_hi, _, _ in pieces]
            keys = [k_hi - k_lo for _, _, k_lo, k_hi in pieces]
            bounds = [
                torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
                for lengths in (queries, keys)
            ]
            index = None
            if self.cp > 1:  # a piece that starts inside its document needs all earlier keys once more
                index = torch.cat([torch.arange(k_lo, k_hi) for _, _, k_lo, k_hi in pieces]).to(device)
            self._varlen = Varlen(bounds[0], bounds[1], max(queries), max(keys), index)
        return self._varlen

    def plan(self) -> AttentionPlan:
        """Tiles of this rank's queries against the whole row for the Triton kernels; made once per row."""
        if self._plan is None:
            from phi4r_kernels.attention_plan import make_plan

            bounds = self.cu_seqlens_q.tolist() if self.host_bounds is None else list(self.host_bounds)
            size = self.num_tokens // (2 * self.cp) if self.cp > 1 else self.num_tokens
            first, second = zigzag.chunk_ids(self.cp, self.cp_rank) if self.cp > 1 else (0, 1)
            # Row positions first * size .. + size come first on this rank, then those of the second chunk.
            starts = (first * size, second * size)
            held = [sum(min(max(bound - start, 0), size) for start in starts) for bound in bounds]
            self._plan = make_plan(
                held, bounds, causal=True, device=self.cu_seqlens_q.device,
                q_split=size, q_offsets=(starts[0], starts[1] - size),
            )  # fmt: skip
        return self._plan

    def rotary(self, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [T local, rotary.dim], of the NeoX half-rotation; made once per row."""
        if self._rotary is None:
            dim, device = rotary.dim, self.position_ids.device
            wavelengths = rotary.theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)

            def angles(factors: tuple[float, ...]) -> Tensor:
                scaled = wavelengths * torch.tensor(factors, device=device) if factors else wavelengths
                return self.position_ids.float()[:, None] * (1.0 / scaled)[None]

            angle = angles(rotary.short)
            if rotary.switch:
                angle = angles(rotary.long).where(self._lengths()[:, None] > rotary.switch, angle)
            angle = torch.cat([angle, angle], dim=-1)
            self._rotary = (angle.cos() * rotary.scale, angle.sin() * rotary.scale)
        return self._rotary

    def _lengths(self) -> Tensor:
        """int64 [T local]: tokens of each local token's document, so far where it is being decoded."""
        if self.kv_cache is not None and self.kv_cache.decoding:
            return self.position_ids + 1
        bounds = self.cu_seqlens_q.long()
        query = self.query_index().to(bounds.device)
        return bounds.diff()[torch.searchsorted(bounds[1:].contiguous(), query, right=True)]
