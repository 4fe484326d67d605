"""The elementwise half of the linear loss in plain PyTorch: the reference, and what runs on CPU.

Everything between the matrix products of `phi4r_kernels.linear_loss`: statistics of a chunk of logits, the
loss of each token with its derivatives, the gradient of the logits. `linear_loss_triton` has the same three
functions; the formulas stand here.

Shapes: C tokens of a chunk, V this rank's slice of the vocabulary, R ranks that share the vocabulary. With x
a raw logit, m the maximum of its row over all ranks and d = (x - m) / temperature:

    log_sum = log sum e^d             logprob = d_target - log_sum
    entropy = log_sum - sum(d e^d) / sum e^d
    d logprob / d x_j = (1[j = target] - p_j) / temperature
    d entropy / d x_j = -p_j (log p_j + entropy) / temperature

Per token, with log ratios bounded by MAX_LOG_RATIO (no gradient beyond), r = e^ratio, A its advantage, w its
weight, i = min(pi_old / pi_rollout, importance_cap) or 1:

    cross_entropy:   l = -w logprob
    policy:          s = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
                     s = max(s, dual_clip A)  where A < 0
    or "cispo":      s = c A logprob,  c = clip(r, 1 - clip_low, 1 + clip_high) without gradient
                     l = w (-i s + kl_coef KL - entropy_coef entropy)
    ratio "token":     log r = logprob - old
    ratio "sequence":  log r = mean of (logprob - old) over the sequence's tokens that have a weight (GSPO)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

# exp of anything larger says nothing more, and would give NaN gradients where a clip should give zero.
MAX_LOG_RATIO = 20.0

# Rows of the tensors between the steps: data of each token, and what is known after the statistics.
WEIGHT, ADVANTAGE, OLD, REF, ROLLOUT = range(5)
LOGPROB, ENTROPY, LOSS, LOG_RATIO, MAX, LOG_SUM, COEF, ENTROPY_COEF = range(8)


@dataclass(frozen=True)
class LossSpec:
    """What is minimised, token by token (formulas above). The defaults are the cross-entropy.

    surrogate: "clip" or "cispo". clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
    dual_clip: c > 1, or 0 for none. kl_reference: the policy of the KL term. kl_estimator: k1 = d,
    k2 = d^2 / 2, k3 = exp(-d) - 1 + d of d = logprob - reference. importance_cap: 0 for no importance
    weights. ratio: per token or per sequence.
    """

    kind: Literal["cross_entropy", "policy"] = "cross_entropy"
    surrogate: Literal["clip", "cispo"] = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    kl_coef: float = 0.0
    kl_reference: Literal["old", "ref"] = "old"
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    importance_cap: float = 0.0
    ratio: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        allowed = {
            "kind": ("cross_entropy", "policy"),
            "surrogate": ("clip", "cispo"),
            "kl_reference": ("old", "ref"),
            "kl_estimator": ("k1", "k2", "k3"),
            "ratio": ("token", "sequence"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, found {getattr(self, name)!r}")
        if self.surrogate == "cispo" and (self.ratio == "sequence" or self.dual_clip):
            raise ValueError("surrogate 'cispo' has ratios of tokens and no dual_clip")


# --- statistics of the logits


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


# --- the loss of a token


def _bounded(difference_C: Tensor) -> tuple[Tensor, Tensor]:
    """(log ratio within MAX_LOG_RATIO, 1.0 where it has a gradient)."""
    inside_C = (difference_C.abs() <= MAX_LOG_RATIO).to(difference_C.dtype)
    return difference_C.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), inside_C


def _surrogate(log_ratio_C: Tensor, advantage_C: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """(s, ds / d log r)."""
    low, high = 1.0 - spec.clip_low, 1.0 + spec.clip_high
    ratio_C = log_ratio_C.exp()
    plain_C, clipped_C = ratio_C * advantage_C, ratio_C.clamp(low, high) * advantage_C
    value_C = torch.minimum(plain_C, clipped_C)
    moves_C = ((ratio_C >= low) & (ratio_C <= high)) | (plain_C < clipped_C)
    if spec.dual_clip:
        bound_C = spec.dual_clip * advantage_C
        stopped_C = (advantage_C < 0) & (value_C < bound_C)
        value_C, moves_C = torch.where(stopped_C, bound_C, value_C), moves_C & ~stopped_C
    return value_C, torch.where(moves_C, plain_C, 0.0)


def _kl(log_ratio_C: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """(estimate, its derivative by the log ratio)."""
    if spec.kl_estimator == "k1":
        return log_ratio_C, torch.ones_like(log_ratio_C)
    if spec.kl_estimator == "k2":
        return 0.5 * log_ratio_C.square(), log_ratio_C
    inverse_C = torch.expm1(-log_ratio_C)
    return inverse_C + log_ratio_C, -inverse_C


def _importance(logprob_C: Tensor, terms_5C: Tensor, spec: LossSpec, on_policy: bool) -> Tensor | float:
    """min(pi_old / pi_rollout, importance_cap): data, without gradient."""
    if not spec.importance_cap:
        return 1.0
    old_C = logprob_C if on_policy else terms_5C[OLD]
    return _bounded(old_C - terms_5C[ROLLOUT])[0].exp().clamp(max=spec.importance_cap)


def token_values(
    stats_R4C: Tensor,
    terms_5C: Tensor,
    spec: LossSpec,
    scale: float,
    on_policy: bool,
    sequence_2C: Tensor | None = None,
) -> Tensor:
    """[8, C]: LOGPROB, ENTROPY, LOSS, LOG_RATIO for the caller; MAX, LOG_SUM and the derivatives of the loss
    by logprob (COEF) and by entropy (ENTROPY_COEF) for `logit_grad`.

    on_policy: the old policy is this very policy. sequence_2C: for ratio "sequence", each token's log ratio
    and derivative from `sequence_terms`.
    """
    logprob_C, entropy_C, max_C, log_sum_C = combine(stats_R4C, scale)
    weight_C, advantage_C = terms_5C[WEIGHT], terms_5C[ADVANTAGE]
    if spec.kind == "cross_entropy":
        loss_C, coef_C, log_ratio_C = -weight_C * logprob_C, -weight_C, torch.zeros_like(logprob_C)
    else:
        old_C = logprob_C if on_policy else terms_5C[OLD]
        token_ratio_C, inside_C = _bounded(logprob_C - old_C)
        log_ratio_C = token_ratio_C if sequence_2C is None else sequence_2C[0]
        if spec.surrogate == "cispo":
            slope_C = log_ratio_C.exp().clamp(1.0 - spec.clip_low, 1.0 + spec.clip_high) * advantage_C
            surrogate_C, moves_C = slope_C * logprob_C, torch.ones_like(inside_C)
        else:
            surrogate_C, slope_C = _surrogate(log_ratio_C, advantage_C, spec)
            moves_C = inside_C
        pull_C = -weight_C * _importance(logprob_C, terms_5C, spec, on_policy)
        loss_C = pull_C * surrogate_C
        coef_C = pull_C * slope_C * moves_C if sequence_2C is None else sequence_2C[1]
        if spec.kl_coef:
            held = (
                (token_ratio_C, inside_C)
                if spec.kl_reference == "old"
                else _bounded(logprob_C - terms_5C[REF])
            )
            kl_C, kl_slope_C = _kl(held[0], spec)
            loss_C = loss_C + weight_C * spec.kl_coef * kl_C
            coef_C = coef_C + weight_C * spec.kl_coef * kl_slope_C * held[1]
    entropy_coef_C = -spec.entropy_coef * weight_C
    if spec.entropy_coef:
        loss_C = loss_C + entropy_coef_C * entropy_C
    return torch.stack([logprob_C, entropy_C, loss_C, log_ratio_C, max_C, log_sum_C, coef_C, entropy_coef_C])


def sequence_terms(
    logprob_C: Tensor,
    terms_5C: Tensor,
    lengths_S: Tensor,
    spec: LossSpec,
    on_policy: bool,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """[2, C]: each token's log ratio, shared by its sequence, and the derivative of the policy term by its
    logprob, which moves the ratio of the whole sequence.

    The tokens stand sequence after sequence. lengths_S: int64 [S], tokens of each sequence here (0 allowed);
    `group`: ranks that hold other tokens of the same S sequences. Sums are in float64, in order.
    """
    old_C = logprob_C if on_policy else terms_5C[OLD]

    def sums(values_C: Tensor) -> Tensor:
        total_S = torch.segment_reduce(values_C.double(), "sum", lengths=lengths_S, unsafe=True, initial=0)
        if group is not None:
            dist.all_reduce(total_S, group=group)
        return total_S

    count_S = sums(torch.ones_like(logprob_C)).clamp(min=1)
    mean_S, inside_S = _bounded(sums(logprob_C - old_C) / count_S)
    log_ratio_C = mean_S.repeat_interleave(lengths_S).to(logprob_C.dtype)
    _, slope_C = _surrogate(log_ratio_C, terms_5C[ADVANTAGE], spec)
    pull_C = -terms_5C[WEIGHT] * _importance(logprob_C, terms_5C, spec, on_policy)
    shared_S = sums(pull_C * slope_C) / count_S * inside_S
    return torch.stack([log_ratio_C, shared_S.repeat_interleave(lengths_S).to(logprob_C.dtype)])


# --- the gradient of the logits


def logit_grad(
    logits_CV: Tensor,
    local_C: Tensor,
    values_8C: Tensor,
    scale: float,
    dtype: torch.dtype,
    with_entropy: bool,
) -> Tensor:
    """d loss / d logits [C, V] in `dtype`; the logits are overwritten. with_entropy: the loss has an entropy
    term."""
    size = logits_CV.size(1)
    here_C = (local_C >= 0) & (local_C < size)
    _, entropy_C, _, _, max_C, log_sum_C, coef_C, entropy_coef_C = values_8C
    coef_C, entropy_coef_C = coef_C * scale, entropy_coef_C * scale
    logits_CV = logits_CV.to(values_8C.dtype)
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
