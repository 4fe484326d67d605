"""The elementwise steps of the linear loss in plain PyTorch: the reference, and what runs on CPU.

Statistics of a chunk of logits, and the gradient of the logits given the derivatives of the loss by log-prob
and entropy. `elementwise_triton` has the same two functions; the formulas stand here.

Shapes: C tokens of a chunk, V this rank's slice of the vocabulary, R ranks that share the vocabulary. With x
a raw logit, m the maximum of its row over all ranks and d = (x - m) / temperature:

    log_sum = log sum e^d             logprob = d_target - log_sum
    entropy = log_sum - sum(d e^d) / sum e^d
    d logprob / d x_j = (1[j = target] - p_j) / temperature
    d entropy / d x_j = -p_j (log p_j + entropy) / temperature
"""

from __future__ import annotations

import torch
from torch import Tensor


def logit_stats(logits_CV: Tensor, local_C: Tensor, scale: float, with_entropy: bool) -> Tensor:
    """[4, C]: m, sum e^d, sum d e^d (zeros unless `with_entropy`) and the target's raw logit (0 where another
    rank has it), m being this rank's maximum.

    local_C: int64, the target's column in this slice; outside [0, V) on another rank. scale: 1 / temperature.
    """
    size = logits_CV.size(1)
    here_C = (local_C >= 0) & (local_C < size)
    logits_CV = logits_CV.to(_wide(logits_CV))
    target_C = logits_CV.gather(1, local_C.clamp(0, size - 1)[:, None])[:, 0].where(here_C, 0.0)
    max_C = logits_CV.amax(1)
    d_CV = logits_CV - max_C[:, None]
    if scale != 1.0:
        d_CV.mul_(scale)
    exp_CV = d_CV.exp()
    sum_C = exp_CV.sum(1)
    weighted_C = exp_CV.mul_(d_CV).sum(1) if with_entropy else torch.zeros_like(sum_C)
    return torch.stack([max_C, sum_C, weighted_C, target_C])


def combine(stats_R4C: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, m, log_sum), each [C], from the statistics of all ranks."""
    max_RC, sum_RC, weighted_RC, target_RC = stats_R4C.unbind(1)
    max_C = max_RC.amax(0)
    shift_RC = (max_RC - max_C) * scale
    share_RC = shift_RC.exp()
    sum_C = (share_RC * sum_RC).sum(0)
    weighted_C = (share_RC * (weighted_RC + shift_RC * sum_RC)).sum(0)
    log_sum_C = sum_C.log()
    logprob_C = (target_RC.sum(0) - max_C) * scale - log_sum_C
    return logprob_C, log_sum_C - weighted_C / sum_C, max_C, log_sum_C


def logit_grad(
    logits_CV: Tensor,
    local_C: Tensor,
    points_5C: Tensor,
    scale: float,
    dtype: torch.dtype,
    with_entropy: bool,
) -> Tensor:
    """d loss / d logits [C, V] in `dtype`; the logits are overwritten.

    points_5C: m, log_sum, entropy, and the derivatives of the loss by log-prob and by entropy, of which the
    last counts only `with_entropy`.
    """
    size = logits_CV.size(1)
    here_C = (local_C >= 0) & (local_C < size)
    max_C, log_sum_C, entropy_C, coef_C, entropy_coef_C = points_5C
    coef_C, entropy_coef_C = coef_C * scale, entropy_coef_C * scale
    logits_CV = logits_CV.to(points_5C.dtype)
    logp_CV = logits_CV.sub_(max_C[:, None])
    if scale != 1.0:
        logp_CV.mul_(scale)
    logp_CV.sub_(log_sum_C[:, None])
    grad_CV = logp_CV.exp()
    if with_entropy:
        grad_CV.mul_(logp_CV.add_(entropy_C[:, None]).mul_(-entropy_coef_C[:, None]).sub_(coef_C[:, None]))
    else:
        grad_CV.mul_(-coef_C[:, None])
    grad_CV.scatter_add_(1, local_C.clamp(0, size - 1)[:, None], coef_C.where(here_C, 0.0)[:, None])
    return grad_CV.to(dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
