"""Seeds are counters: a random number is a function of (run seed, stream, step, prompt, sample) and nothing
else.

`Stream` lists the uses of a run seed. A random number is keyed by the run seed, the stream and as many
counters as the use needs: it can be drawn again alone, in any order and on any number of ranks, and no two
uses share one.
"""

from __future__ import annotations

from enum import IntEnum, unique
from typing import Literal

import numpy as np


@unique
class Stream(IntEnum):
    """The uses of a run seed. A value is part of every key: changing one changes the numbers of that use."""

    # bootstrap intervals of an evaluation
    ACCURACY = 0
    ACCURACY_SAME_PROBLEMS = 1
    LENGTH = 2
    PASS_AT_K = 3
    MAJ_AT_K = 4
    WORST_AT_K = 5
    GAIN = 10
    GAIN_PASSES = 12
    GAIN_LENGTH = 13
    # training
    SFT_ROWS = 11
    PROMPTS = 21
    SAMPLES = 22
    UPDATES = 23
    PROBE = 24
    CONTINUED = 25
    CURRICULUM = 26
    AUDIT = 27
    SELECTED_TOKENS = 28
    # evaluation and curation
    EVAL_SAMPLES = 31
    PASS_RATE = 41
    GENERATE = 51
    HELDOUT = 81


EVAL_PROBLEMS = 1_000_003


def problem_seed(seed: int, use: Literal["train", "eval"]) -> int:
    """The seed of generated problems: another one for each pair of a run seed (at least 0) and a use.

    Evaluation's lie above `EVAL_PROBLEMS`; training seeds that would lie there too are negated.
    """
    if use == "eval":
        return seed + EVAL_PROBLEMS
    return seed if seed < EVAL_PROBLEMS else -seed


def epoch_order(seed: int, stream: Stream, epoch: int, num_items: int) -> np.ndarray:
    """The order of the items in `epoch`: a permutation int64 [num_items] that (seed, stream, epoch) alone
    fixes."""
    return np.random.default_rng([seed, stream, epoch]).permutation(num_items)


def items_of_step(num_items: int, seed: int, stream: Stream, step: int, per_step: int) -> list[int]:
    """Indices of the items of step `step` (from 0): the epochs' permutations, one after another, cut into
    steps. Every item comes once an epoch, whatever `per_step` is."""
    epochs, places = np.divmod(np.arange(step * per_step, (step + 1) * per_step), num_items)
    orders = {epoch: epoch_order(seed, stream, epoch, num_items) for epoch in np.unique(epochs).tolist()}
    return [int(orders[epoch][place]) for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)]
