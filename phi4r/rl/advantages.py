"""Advantages of a group of samples of one prompt (GRPO; technical report, section 4.2). numpy float64.

    std:   A_i = (R_i - mean R) / std R      std over the group's G samples, divided by G (population)
    none:  A_i =  R_i - mean R               (Dr. GRPO: no division, so prompts keep their own scale)

A group whose rewards are all equal has nothing to compare: its advantages are 0 and it is reported, not
dropped.

Shapes: `P` prompts, `G` samples of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

AdvantageNorm = Literal["std", "none"]


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
    if norm not in ("std", "none"):
        raise ValueError(f"norm must be 'std' or 'none', found {norm!r}")
    std_P1 = rewards_PG.std(axis=1, keepdims=True)
    informative_P = (rewards_PG.max(axis=1) > rewards_PG.min(axis=1)) & (std_P1[:, 0] > 0)
    centred_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    centred_PG[~informative_P] = 0.0
    if norm == "none":
        return Advantages(centred_PG, informative_P)
    std_P1[~informative_P] = 1.0
    return Advantages(centred_PG / std_P1, informative_P)
