"""Context parallelism's zig-zag split of a packed row.

A row of T tokens is cut into 2 cp equal chunks; rank r holds chunks r and 2 cp - 1 - r, so that under a
causal mask every rank has the same work. The cut ignores document borders: documents are kept apart by
cu_seqlens, not by the split, and the packing of a run does not depend on its layout.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chunk_ids(cp: int, cp_rank: int) -> tuple[int, int]:
    """The two chunks (of 2 cp) that `cp_rank` holds, in local order."""
    return cp_rank, 2 * cp - 1 - cp_rank


def local_index(num_tokens: int, cp: int, cp_rank: int) -> Tensor:
    """Row positions int64 [num_tokens / cp] held by `cp_rank`. num_tokens must be a multiple of 2 cp."""
    if cp == 1:
        return torch.arange(num_tokens)
    if num_tokens % (2 * cp):
        raise ValueError(f"a row of {num_tokens} tokens cannot be cut into 2 x cp = {2 * cp} equal chunks")
    size = num_tokens // (2 * cp)
    first, second = chunk_ids(cp, cp_rank)
    return torch.cat(
        [torch.arange(first * size, (first + 1) * size), torch.arange(second * size, (second + 1) * size)]
    )


def to_row_order(gathered: Tensor, cp: int) -> Tensor:
    """Reorder [T, ...] that was all-gathered over the CP group (rank by rank) into row order."""
    if cp == 1:
        return gathered
    chunks = gathered.chunk(2 * cp)
    order = [2 * c if c < cp else 2 * (2 * cp - 1 - c) + 1 for c in range(2 * cp)]
    return torch.cat([chunks[i] for i in order])
