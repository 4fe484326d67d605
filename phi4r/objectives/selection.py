"""Tokens chosen among all of a step, by the policy before its first update. numpy, [N] response tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from phi4r.configs.sections import ObjectiveConfig

Vector = npt.NDArray[np.floating]
Chosen = npt.NDArray[np.bool_]


def top_entropy(entropy_N: Vector, share: float) -> Chosen:
    """The `share` of the tokens with the largest entropy (arXiv 2506.01939): those at or above its
    quantile."""
    return entropy_N >= np.quantile(entropy_N, 1.0 - share)


def covariances(logprobs_N: Vector, advantages_N: Vector) -> Vector:
    """(log pi - mean)(A - mean): how much each token's update lowers the entropy (arXiv 2505.22617)."""
    return (logprobs_N - logprobs_N.mean()) * (advantages_N - advantages_N.mean())


def by_covariance(
    logprobs_N: Vector, advantages_N: Vector, settings: ObjectiveConfig, random: np.random.Generator
) -> Chosen:
    """`cov_share` of the tokens, at least one: for kl_cov those of largest covariance, for clip_cov drawn
    from those between cov_low and cov_high, of which there may be fewer."""
    covariance_N = covariances(logprobs_N.astype(np.float64), advantages_N.astype(np.float64))
    number = max(1, int(settings.cov_share * len(covariance_N)))
    if settings.surrogate == "kl_cov":
        order = np.argsort(-covariance_N, kind="stable")
    else:
        inside_N = (covariance_N > settings.cov_low) & (covariance_N < settings.cov_high)
        order = random.permutation(np.flatnonzero(inside_N))
    chosen_N = np.zeros(len(covariance_N), dtype=bool)
    chosen_N[order[:number]] = True
    return chosen_N
