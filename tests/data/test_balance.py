"""Rows dealt to data-parallel ranks by what their attention costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4r.data.packing import Document, PackedRow, attention_cost, my_share, pack, share_out


def rows_of(lengths: list[int], row_tokens: int) -> list[PackedRow]:
    documents = [Document(np.ones(n, np.int32), np.ones(n, dtype=bool)) for n in lengths]
    return pack(documents, row_tokens)


def test_the_cost_of_a_row_counts_pairs_inside_documents_and_padding() -> None:
    (row,) = rows_of([30, 20, 4], 64)
    mask = np.zeros((64, 64), dtype=bool)
    for start, end in ((0, 30), (30, 50), (50, 54), (54, 64)):
        mask[start:end, start:end] = True
    assert attention_cost(row) == mask.sum()


@given(
    st.integers(1, 8).flatmap(
        lambda ranks: st.tuples(
            st.just(ranks),
            st.integers(1, 6).flatmap(
                lambda each: st.lists(st.integers(0, 10**9), min_size=ranks * each, max_size=ranks * each)
            ),
        )
    )
)
@pytest.mark.proves(
    "Rows are dealt to data-parallel ranks once, and evenly", how="random costs", layouts="dp 1 to 8"
)
def test_every_row_is_dealt_once_and_every_rank_gets_as_many(case: tuple[int, list[int]]) -> None:
    num_ranks, costs = case
    shares = share_out(costs, num_ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    assert {len(share) for share in shares} == {len(costs) // num_ranks}
    assert all(share == sorted(share) for share in shares)


def test_one_rank_keeps_the_order_and_uneven_numbers_are_refused() -> None:
    rows = rows_of([5, 30, 2, 60, 64], 64)
    assert my_share(rows, 1, 0) == list(range(len(rows)))
    with pytest.raises(ValueError, match="3 rows cannot be dealt evenly to 2 ranks"):
        share_out([1, 2, 3], 2)


def test_long_documents_are_spread_over_the_ranks() -> None:
    """Lengths as uneven as those of reasoning traces: dealt in turn, the slowest of 8 ranks has a good part
    more than the mean; dealt by cost it has hardly more."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(8.3, 0.9, 1_000), 64, 32_768).astype(int).tolist()
    rows = rows_of(lengths, 32_768)
    costs = np.array([attention_cost(rows[i]) for i in random.permutation(len(rows))[:128]])

    def excess(shares: list[list[int]]) -> float:
        loads = np.array([costs[share].sum() for share in shares])
        return float(loads.max() / loads.mean() - 1)

    in_turn = excess([list(range(rank, 128, 8)) for rank in range(8)])
    assert in_turn > 0.1
    assert excess(share_out(costs.tolist(), 8)) < 0.02
