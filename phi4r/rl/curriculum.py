"""Which prompts a batch gets: the epochs' permutations, or first those that have something left to teach.

`rollout.curriculum` = "none": every problem comes exactly once an epoch, in an order that (seed, epoch) fixes
(`core.seeds`).

"pass_rate": every problem has a running pass rate, (right + 1/2) / (samples + 1) over its own samples, older
ones weighted by `DECAY` a visit; the `pass_rate` that curation wrote into the problem counts as
`PRIOR_SAMPLES` of them. An epoch holds, without replacement,

    each problem exactly once whose rate is unknown or lies within `curriculum_low` .. `curriculum_high`
    each other problem in one epoch of `curriculum_rest`, by turns: no problem is forgotten, and the rate of
    one that has become easier or harder is measured again

in a random order in which the first kind stands before the second with odds `curriculum_rest` : 1
(exponential keys; Efraimidis and Spirakis 2006). The order of an epoch is fixed when its first prompt is
needed, from the results of all batches before that one, less those that may still be in flight then:
the policy lag x `rollout.max_prompt_batches`. So batches depend on the seed and on results, never on timing:
a resumed run gets the prompts of an uninterrupted one, and a batch that is sampled ahead keeps its prompts.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from phi4r.configs.sections import RolloutConfig
from phi4r.core.errors import UserError
from phi4r.core.seeds import Stream

DECAY = 0.5
PRIOR_SAMPLES = 8.0

Counts = Mapping[int, tuple[float, float]]
"""Problem -> (right samples, all samples), decayed; problems without samples are not in it."""


def pass_rate(counts: Counts, item: int) -> float | None:
    """The running pass rate of a problem with Jeffreys' prior; None without samples."""
    right, samples = counts.get(item, (0.0, 0.0))
    return (right + 0.5) / (samples + 1.0) if samples else None


def with_results(counts: Counts, results: Iterable[tuple[int, int, int]]) -> dict[int, tuple[float, float]]:
    """The counts after visits (problem, right samples, all samples)."""
    new = dict(counts)
    for item, right, samples in results:
        before, all_before = new.get(item, (0.0, 0.0))
        new[item] = (DECAY * before + right, DECAY * all_before + samples)
    return new


def epoch_items(
    num_items: int, counts: Counts, band: tuple[float, float], rest: int, seed: int, epoch: int
) -> list[int]:
    """The problems of an epoch in their order; a pure function."""
    rates = [pass_rate(counts, item) for item in range(num_items)]
    inside = np.array([rate is None or band[0] <= rate <= band[1] for rate in rates])
    turns = np.array([zlib.crc32(f"{seed} {item}".encode()) % rest for item in range(num_items)])
    members = np.flatnonzero(inside | (turns == epoch % rest))
    keys = np.random.default_rng([seed, Stream.CURRICULUM, epoch]).exponential(size=num_items)
    keys *= np.where(inside, 1.0, float(rest))
    order: list[int] = members[np.argsort(keys[members], kind="stable")].tolist()
    return order


class PassRateOrder:
    """Batches by running pass rates. `lag`: batches that may be in flight when another one is begun."""

    def __init__(
        self,
        num_items: int,
        seed: int,
        rollout: RolloutConfig,
        known_rates: Mapping[int, float],
        first_batch: int,
        state: Mapping[str, Any] | None,
    ) -> None:
        self.num_items, self.seed, self.rollout = num_items, seed, rollout
        self.lag = rollout.policy_lag * rollout.max_prompt_batches
        self.counts: dict[int, tuple[float, float]] = {
            item: (PRIOR_SAMPLES * rate, PRIOR_SAMPLES) for item, rate in known_rates.items()
        }
        self.epoch = -1
        self.left: list[int] = []
        self.next = first_batch
        self.open: dict[int, list[int]] = {}
        self.results: dict[int, list[tuple[int, int, int]]] = {}
        if state:
            self._restore(state)

    def items(self, batch: int) -> list[int]:
        """The next problems of the epoch's order; its last batch is filled from the next epoch."""
        while batch >= self.next:
            self.open[self.next] = self._next_items()
            self.next += 1
        return self.open[batch]

    def _next_items(self) -> list[int]:
        items: list[int] = []
        while len(items) < self.rollout.prompts_per_step:
            if not self.left:
                self._begin_epoch()
            number = self.rollout.prompts_per_step - len(items)
            items, self.left = items + self.left[:number], self.left[number:]
        return items

    def _begin_epoch(self) -> None:
        due = [batch for batch in sorted(self.results) if batch < self.next - self.lag]
        late = [batch for batch in self.open if batch < self.next - self.lag]
        assert not late, f"batches {late} have no results yet, and batch {self.next} begins an epoch"
        for batch in due:
            self.counts = with_results(self.counts, self.results.pop(batch))
        self.epoch += 1
        rollout = self.rollout
        band = (rollout.curriculum_low, rollout.curriculum_high)
        self.left = epoch_items(
            self.num_items, self.counts, band, rollout.curriculum_rest, self.seed, self.epoch
        )

    def record(self, batch: int, right: Sequence[int], samples: int) -> None:
        """Close a batch; its results are used from the next epoch on."""
        items = self.open.pop(batch)
        self.results[batch] = [(item, int(r), samples) for item, r in zip(items, right, strict=True)]

    def state(self) -> dict[str, Any]:
        """All of it, as lists."""
        return {
            "num_items": self.num_items,
            "epoch": self.epoch,
            "left": list(self.left),
            "next": self.next,
            "open": [[batch, list(items)] for batch, items in self.open.items()],
            "results": [[batch, [list(row) for row in rows]] for batch, rows in self.results.items()],
            "counts": [[item, right, samples] for item, (right, samples) in self.counts.items()],
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state["num_items"] != self.num_items:
            raise UserError(
                f"the checkpoint's curriculum is of {state['num_items']} problems, this run has"
                f" {self.num_items}: rollout.curriculum needs the same problems"
            )
        self.epoch, self.left, self.next = state["epoch"], list(state["left"]), state["next"]
        self.open = {batch: list(items) for batch, items in state["open"]}
        self.results = {batch: [(i, r, n) for i, r, n in rows] for batch, rows in state["results"]}
        self.counts = {item: (right, samples) for item, right, samples in state["counts"]}
