"""Which items a step gets: counter-based permutations, so that a position in the data is a step number and
nothing else."""

from __future__ import annotations

import numpy as np


def epoch_order(seed: int, stream: int, epoch: int, num_items: int) -> np.ndarray:
    """The order of the items in `epoch`: a permutation int64 [num_items] that (seed, stream, epoch) alone
    fixes."""
    return np.random.default_rng([seed, stream, epoch]).permutation(num_items)


def items_of_step(num_items: int, seed: int, stream: int, step: int, per_step: int) -> list[int]:
    """Indices of the items of step `step` (from 0): the epochs' permutations, one after another, cut into
    steps. Every item comes once an epoch, whatever `per_step` is. stream: separates the uses of one run
    seed."""
    epochs, places = np.divmod(np.arange(step * per_step, (step + 1) * per_step), num_items)
    orders = {epoch: epoch_order(seed, stream, epoch, num_items) for epoch in np.unique(epochs).tolist()}
    return [int(orders[epoch][place]) for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)]
