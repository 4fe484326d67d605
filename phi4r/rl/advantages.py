"""Advantages of a group of samples of one prompt (GRPO; technical report, section 4.2). numpy float64.

    std:   A_i = (R_i - mean R) / std R      std over the group's G samples, divided by G (population)
    none:  A_i =  R_i - mean R               (Dr. GRPO: no division, so prompts keep their own scale)
    batch: A_i = (R_i - mean R) / std B      std of all centred rewards of the step (REINFORCE++ with the
                                             group's mean as baseline, arXiv 2501.03262)

Group filtering (GFPO, arXiv 2508.09726) compares only some samples of each group: mean and std are theirs,
and the others get an advantage of 0.

A group whose rewards are all equal has nothing to compare: its advantages are 0 and it is reported, not
dropped.

Shapes: `P` prompts, `G` samples of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

AdvantageNorm = Literal["std", "none", "batch"]
GroupFilter = Literal["length", "efficiency"]


@dataclass(frozen=True)
class Advantages:
    """`advantages` float64 [P, G]; `informative` bool [P]: groups whose rewards differ."""

    advantages: npt.NDArray[np.float64]
    informative: npt.NDArray[np.bool_]

    @property
    def num_zero_variance(self) -> int:
        """Groups that carry no signal because all their rewards are equal."""
        return int(np.count_nonzero(~self.informative))

    @property
    def informative_share(self) -> float:
        """Share of groups that carry a signal, in [0, 1]."""
        return float(np.mean(self.informative))


def kept_by_filter(
    rewards_PG: npt.ArrayLike, lengths_PG: npt.ArrayLike, keep: int, by: GroupFilter
) -> npt.NDArray[np.bool_]:
    """The `keep` samples of each group that GFPO compares, bool [P, G]: the shortest ("length"), or those of
    the highest reward per token ("efficiency"). Of equals the first. lengths_PG: in tokens, positive.
    """
    rewards_PG, lengths_PG = np.asarray(rewards_PG, np.float64), np.asarray(lengths_PG, np.float64)
    if not 2 <= keep <= rewards_PG.shape[1]:
        raise ValueError(f"keep must lie between 2 and the group's {rewards_PG.shape[1]}, found {keep}")
    if by not in ("length", "efficiency"):
        raise ValueError(f"the filter must be 'length' or 'efficiency', found {by!r}")
    worst_first_PG = lengths_PG if by == "length" else -rewards_PG / lengths_PG
    best_PG = np.argsort(worst_first_PG, axis=1, kind="stable")[:, :keep]
    kept_PG = np.zeros(rewards_PG.shape, dtype=bool)
    np.put_along_axis(kept_PG, best_PG, True, axis=1)
    return kept_PG


def filtered_advantages(
    rewards_PG: npt.ArrayLike, kept_PG: npt.NDArray[np.bool_], norm: AdvantageNorm = "std"
) -> Advantages:
    """`group_advantages` of the kept samples of each group alone, as many in each; 0 for the others."""
    rewards_PG = np.asarray(rewards_PG, dtype=np.float64)
    kept = group_advantages(rewards_PG[kept_PG].reshape(len(rewards_PG), -1), norm)
    advantages_PG = np.zeros_like(rewards_PG)
    advantages_PG[kept_PG] = kept.advantages.ravel()
    return Advantages(advantages_PG, kept.informative)


def group_advantages(rewards_PG: npt.ArrayLike, norm: AdvantageNorm = "std") -> Advantages:
    """Advantages within each row of `rewards_PG` [P, G].

    Zero variance is decided by comparing the rewards themselves, not a rounded standard deviation, so the
    mean's rounding error is never blown up to an advantage of +-1. Raises ValueError for a bad shape,
    `norm` or a reward that is not finite.
    """
    rewards_PG = np.asarray(rewards_PG, dtype=np.float64)
    if rewards_PG.ndim != 2 or 0 in rewards_PG.shape:
        raise ValueError(f"rewards must be [prompts, group], found shape {rewards_PG.shape}")
    if not np.isfinite(rewards_PG).all():
        raise ValueError("rewards must be finite")
    if norm not in ("std", "none", "batch"):
        raise ValueError(f"norm must be 'std', 'none' or 'batch', found {norm!r}")
    std_P1 = rewards_PG.std(axis=1, keepdims=True)
    informative_P = (rewards_PG.max(axis=1) > rewards_PG.min(axis=1)) & (std_P1[:, 0] > 0)
    centred_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    centred_PG[~informative_P] = 0.0
    if norm == "none":
        return Advantages(centred_PG, informative_P)
    if norm == "batch":
        return Advantages(centred_PG / (centred_PG.std() or 1.0), informative_P)
    std_P1[~informative_P] = 1.0
    return Advantages(centred_PG / std_P1, informative_P)
