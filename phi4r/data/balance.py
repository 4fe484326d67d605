"""Which data-parallel rank takes which packed rows of a step.

All rows have the same number of tokens, so their matrix products cost the same; attention does not, it grows
with the square of a document's length. A step ends when its slowest rank has, so rows are dealt to even out

    cost(row) = sum over its documents of length^2    (the padding tail is one of them)

with the same number of rows on every rank, as the pipeline needs. A pure function of the rows: every rank
finds the same shares, and so does a run that resumes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from phi4r.data.packing import PackedRow


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
