"""The terms that surrogates, penalties and corrections of an objective are made of.

Functions of `Tokens`, whose fields are vectors [C] of the tokens of a chunk, and of the settings of section
`objective`. Only the policy's log-probs and entropies carry a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from phi4r_kernels.linear_loss import Tokens
from phi4r_kernels.linear_loss.tokens import MAX_LOG_RATIO
from torch import Tensor

from phi4r.configs.sections import ObjectiveConfig

Normalization = Literal["token", "sequence", "constant"]


def bounded(log_ratio: Tensor) -> Tensor:
    """Within +-MAX_LOG_RATIO, without gradient beyond; NaN stays NaN."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def log_ratio(tokens: Tokens, settings: ObjectiveConfig) -> Tensor:
    """log r_t [C]: of the token, or (GSPO) the mean over its response, log pi - log pi_old."""
    difference = tokens.policy_logprobs - tokens.old_logprobs
    return bounded(tokens.sequence_mean(difference) if settings.ratio == "sequence" else difference)


def kl_estimate(log_ratio: Tensor, estimator: str) -> Tensor:
    """Estimate of KL(pi || q) from d = log pi - log q of each sampled token.

    k1 = d                    unbiased; its gradient is that of log pi, which is zero only on average
    k2 = d^2 / 2              biased; on policy its gradient is an unbiased estimate of the KL's gradient
    k3 = exp(-d) - 1 + d      unbiased and never negative; on policy its gradient is that of KL(q || pi)

    Against pi_old, k2 and k3 have no gradient at r = 1, that is in the first update on each rollout.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kl_estimator must be 'k1', 'k2' or 'k3', found {estimator!r}")


def kl_penalty(tokens: Tokens, settings: ObjectiveConfig) -> Tensor:
    """KL_t [C] to the old or the reference policy, times r_t with `kl_ratio`."""
    other = tokens.old_logprobs if settings.kl_reference == "old" else tokens.ref_logprobs
    assert other is not None
    estimate = kl_estimate(bounded(tokens.policy_logprobs - other), settings.kl_estimator)
    return estimate * log_ratio(tokens, settings).exp() if settings.kl_ratio else estimate


def importance(tokens: Tokens, settings: ObjectiveConfig) -> Tensor:
    """i_t [C]: pi_old / pi_rollout, of the token or its response, truncated to [floor, cap], or 0 beyond
    them. Data: no gradient."""
    assert tokens.rollout_logprobs is not None
    difference = tokens.old_logprobs - tokens.rollout_logprobs
    if settings.importance_level == "sequence":
        difference = tokens.sequence_sum(difference)
    elif settings.importance_level == "mean":
        difference = tokens.sequence_mean(difference)
    ratio = bounded(difference).exp()
    floor, cap = settings.importance_floor, settings.importance_cap
    if settings.importance_mode == "mask":
        return torch.where((ratio < floor) | (ratio > cap), 0.0, ratio)
    return ratio.clamp(floor, cap)


def off_policy_mask(tokens: Tokens, settings: ObjectiveConfig) -> Tensor:
    """[C]: 0 for responses of negative advantage whose tokens became less likely than when they were sampled
    by more than `off_policy_limit` nats on average, else 1."""
    assert tokens.rollout_logprobs is not None
    assert tokens.advantages is not None
    drift = tokens.sequence_mean(tokens.rollout_logprobs - tokens.policy_logprobs.detach())
    return ((tokens.advantages >= 0) | (drift <= settings.off_policy_limit)).to(drift.dtype)


def normalization_weights(
    response_lengths: Sequence[int] | npt.NDArray[np.integer], mode: Normalization, constant: int = 0
) -> tuple[npt.NDArray[np.float64], int]:
    """(weight of each token of each response float64 [B], count) with loss = sum_t w_t l_t / count.

        token:     w = 1          count = sum of the lengths       (what the paper's run used)
        sequence:  w = 1/|o_i|    count = number of responses      (as printed)
        constant:  w = 1/L_max    count = number of responses      (Dr. GRPO); `constant` is L_max in tokens

    The count covers the responses given here: a data-parallel rank counts its own, and the counts are
    summed. Raises ValueError for an empty response, an unknown mode, or a constant that is not positive.
    """
    lengths_B = np.asarray(response_lengths, dtype=np.int64)
    if lengths_B.ndim != 1 or (lengths_B <= 0).any():
        raise ValueError("response lengths must be a vector of positive numbers of tokens")
    num_responses = len(lengths_B)
    if mode == "token":
        return np.ones(num_responses), int(lengths_B.sum())
    if mode == "sequence":
        return 1.0 / lengths_B, num_responses
    if mode == "constant":
        if constant <= 0:
            raise ValueError(f"constant normalization needs a positive number of tokens, found {constant}")
        return np.full(num_responses, 1.0 / constant), num_responses
    raise ValueError(f"normalization must be 'token', 'sequence' or 'constant', found {mode!r}")
