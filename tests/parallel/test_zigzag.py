"""The zig-zag split deals every token of a row to exactly one rank, and back."""

from __future__ import annotations

import pytest
import torch

from phi4r.parallel import zigzag


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_every_position_is_held_once_and_the_gathered_row_is_in_order(cp: int) -> None:
    num_tokens = 24 * cp
    parts = [zigzag.local_index(num_tokens, cp, rank) for rank in range(cp)]
    assert sorted(torch.cat(parts).tolist()) == list(range(num_tokens))
    assert torch.equal(zigzag.to_row_order(torch.cat(parts), cp), torch.arange(num_tokens))


def test_ranks_have_the_same_causal_work() -> None:
    work = [int((zigzag.local_index(64, 4, rank) + 1).sum()) for rank in range(4)]
    assert len(set(work)) == 1


def test_a_row_that_cannot_be_cut_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"30 tokens.*4 equal"):
        zigzag.local_index(30, 2, 0)
