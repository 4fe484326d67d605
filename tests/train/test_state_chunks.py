"""Flat ranges of arrays as boxes. What is made of them is tested by the checkpoints of every layout that are
loaded in every other (test_checkpoint)."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from phi4r.train.state_chunks import boxes

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@given(SHAPES, st.data())
def test_boxes_hold_the_elements_of_a_range_in_order_and_are_few(
    shape: list[int], data: st.DataObject
) -> None:
    array = np.arange(math.prod(shape)).reshape(shape)
    start, end = sorted(data.draw(st.tuples(st.integers(0, array.size), st.integers(0, array.size))))
    found = list(boxes(start, end, shape))
    parts = [
        array[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].reshape(-1)
        for offsets, sizes in found
    ]
    assert np.concatenate([*parts, np.empty(0, int)]).tolist() == list(range(start, end))
    assert all(part.size for part in parts)
    assert len(found) <= 2 * len(shape) - 1
