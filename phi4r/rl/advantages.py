"""Advantages of a group of samples of one prompt (GRPO; technical report, section 4.2). numpy float64.

    std:        A_i = (R_i - mean R) / std R   std over the group's G samples, divided by G (population)
    sample_std: the same, divided by G - 1
    none:       A_i =  R_i - mean R            (Dr. GRPO: no division, so prompts keep their own scale)
    batch:      A_i = (R_i - mean R) / std B   std of all centred rewards B of the step
    tokens:     A_i = (R_i - mean R - m) / s   m and s: mean and sample deviation of the centred rewards over
                                               the step's tokens (REINFORCE++-baseline, arXiv 2501.03262)

Other baselines: the mean of the group's other rewards (RLOO, arXiv 2402.14740), which is the centred reward
times G / (G - 1); the mean of R weighted by the answers' lengths (OPO, arXiv 2505.23585).

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

from phi4r.configs.sections import ObjectiveConfig

AdvantageNorm = Literal["std", "sample_std", "none", "batch", "tokens"]
Baseline = Literal["mean", "rloo", "opo"]
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


def group_advantages(
    rewards_PG: npt.ArrayLike,
    norm: AdvantageNorm = "std",
    baseline: Baseline = "mean",
    lengths_PG: npt.ArrayLike | None = None,
) -> Advantages:
    """Advantages within each row of `rewards_PG` [P, G]. lengths_PG: in tokens, for norm "tokens" and
    baseline "opo".

    Zero variance is decided by comparing the rewards themselves, not a rounded standard deviation, so the
    mean's rounding error is never blown up to an advantage of +-1. Raises ValueError for a bad shape,
    `norm`, `baseline` or a reward that is not finite.
    """
    rewards_PG = np.asarray(rewards_PG, dtype=np.float64)
    if rewards_PG.ndim != 2 or 0 in rewards_PG.shape:
        raise ValueError(f"rewards must be [prompts, group], found shape {rewards_PG.shape}")
    if not np.isfinite(rewards_PG).all():
        raise ValueError("rewards must be finite")
    if norm not in ("std", "sample_std", "none", "batch", "tokens"):
        raise ValueError(f"norm must be 'std', 'sample_std', 'none', 'batch' or 'tokens', found {norm!r}")
    lengths_PG = np.ones_like(rewards_PG) if lengths_PG is None else np.asarray(lengths_PG, np.float64)
    std_P1 = rewards_PG.std(axis=1, keepdims=True)
    informative_P = (rewards_PG.max(axis=1) > rewards_PG.min(axis=1)) & (std_P1[:, 0] > 0)
    centred_PG = rewards_PG - _baseline(rewards_PG, lengths_PG, baseline)
    centred_PG[~informative_P] = 0.0
    if norm == "none":
        return Advantages(centred_PG, informative_P)
    if norm == "batch":
        return Advantages(centred_PG / (centred_PG.std() or 1.0), informative_P)
    if norm == "tokens":
        shifted_PG = centred_PG - np.average(centred_PG, weights=lengths_PG)
        square = (lengths_PG * shifted_PG**2).sum() / max(lengths_PG.sum() - 1, 1)
        return Advantages(shifted_PG / (np.sqrt(square) or 1.0), informative_P)
    if norm == "sample_std":
        std_P1 = rewards_PG.std(axis=1, keepdims=True, ddof=1) if rewards_PG.shape[1] > 1 else std_P1
    std_P1[~informative_P] = 1.0
    return Advantages(centred_PG / std_P1, informative_P)


def _baseline(
    rewards_PG: npt.NDArray[np.float64], lengths_PG: npt.NDArray[np.float64], baseline: Baseline
) -> npt.NDArray[np.float64]:
    """What is subtracted from each reward: [P, 1] or [P, G]."""
    mean_P1 = rewards_PG.mean(axis=1, keepdims=True)
    if baseline == "mean":
        return mean_P1
    if baseline == "opo":
        return np.average(rewards_PG, axis=1, weights=lengths_PG)[:, None]
    if baseline == "rloo":
        size = rewards_PG.shape[1]
        return (size * mean_P1 - rewards_PG) / max(size - 1, 1)
    raise ValueError(f"baseline must be 'mean', 'rloo' or 'opo', found {baseline!r}")


def advantages_of(
    rewards_PG: npt.ArrayLike, lengths_PG: npt.ArrayLike, objective: ObjectiveConfig
) -> Advantages:
    """The advantages that section `objective` asks for. lengths_PG: in tokens."""
    if objective.group_keep:
        kept_PG = kept_by_filter(rewards_PG, lengths_PG, objective.group_keep, objective.group_filter)
        return filtered_advantages(rewards_PG, kept_PG, objective.advantage_norm)
    return group_advantages(rewards_PG, objective.advantage_norm, objective.baseline, lengths_PG)
