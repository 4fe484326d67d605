r"""The GRPO objective as a sum over tokens and a count (technical report, section 4.2). Pure functions of
tensors.

As printed, with r_t = pi(o_t) / pi_old(o_t):

    J = E[ 1/G sum_i 1/|o_i| sum_t min(r_t A_i, clip(r_t, 1-eps, 1+eps) A_i) ] - beta KL(pi || pi_old) +
    gamma H(pi)

Here, per token, with separate clips and the dual clip c for negative advantages:

    s_t = min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
    s_t = max(s_t, c A_t)                  where A_t < 0 and c > 1: bounds the loss when r_t is large
    or (CISPO, arXiv 2506.13585) s_t = c_t A_t log pi(o_t), c_t the clipped ratio without gradient, so that
    tokens beyond a clip still move
    l_t = -i_t s_t + beta KL_t - gamma H_t
    loss = sum_t w_t l_t / count           w_t and count from `normalization_weights`, count a whole number

r_t is the token's ratio, or (GSPO) one for all tokens of a response, exp of the mean of log pi - log pi_old.
i_t is 1, or min(pi_old / pi_rollout, importance_cap) where the sampler computes other log-probs than the
trainer.

Both sums are reduced over ranks before the division, so the loss never depends on how tokens were cut into
microbatches.

KL_t estimates KL(pi || q) from the sampled token, with d = log pi - log q and q the old or a frozen
reference policy:

    k1 = d                    unbiased; its gradient is that of log pi, which is zero only on average
    k2 = d^2 / 2              biased; on policy its gradient is an unbiased estimate of the KL's gradient
    k3 = exp(-d) - 1 + d      unbiased and never negative; on policy its gradient is that of KL(q || pi)

Against pi_old, k2 and k3 have no gradient at r = 1, that is in the first update on each rollout.

Shape suffix: `T` packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Normalization = Literal["token", "sequence", "constant"]
KLReference = Literal["old", "ref"]
KLEstimator = Literal["k1", "k2", "k3"]
RatioOf = Literal["token", "sequence"]
SurrogateName = Literal["clip", "cispo"]

# exp of anything larger says nothing more, and would give NaN gradients where a clip should give zero.
MAX_LOG_RATIO = 20.0


class ObjectiveSettings(Protocol):
    """The fields of `phi4r.configs.sections.ObjectiveConfig` that the loss reads."""

    @property
    def surrogate(self) -> SurrogateName:
        """What clipping does."""

    @property
    def clip_low(self) -> float:
        """Ratios are clipped below at 1 - clip_low."""

    @property
    def clip_high(self) -> float:
        """Ratios are clipped above at 1 + clip_high."""

    @property
    def dual_clip(self) -> float:
        """c > 1, or 0 for none."""

    @property
    def normalization(self) -> Normalization:
        """What the sum over tokens is divided by."""

    @property
    def kl_coef(self) -> float:
        """beta."""

    @property
    def kl_reference(self) -> KLReference:
        """The policy that the KL term holds on to."""

    @property
    def kl_estimator(self) -> KLEstimator:
        """How the KL term is estimated from the sampled token."""

    @property
    def entropy_coef(self) -> float:
        """gamma."""

    @property
    def ratio(self) -> RatioOf:
        """Whose ratio is clipped."""

    @property
    def importance_cap(self) -> float:
        """Bound on pi_old / pi_rollout, or 0 for no such weights."""


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


def kl_estimate(log_ratio_T: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token estimate of KL(pi || q) from d = log pi - log q of the sampled token. See the module
    docstring.
    """
    if estimator == "k1":
        return log_ratio_T
    if estimator == "k2":
        return 0.5 * log_ratio_T.square()
    if estimator == "k3":
        return torch.expm1(-log_ratio_T) + log_ratio_T
    raise ValueError(f"kl_estimator must be 'k1', 'k2' or 'k3', found {estimator!r}")


@dataclass(frozen=True)
class _Surrogate:
    """Per-token surrogate s_t [T] and which bound is active for each token (bool [T])."""

    value: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    dual_clipped: Tensor


def _clipped_surrogate(
    ratio_T: Tensor, policy_logprobs_T: Tensor, advantages_T: Tensor, settings: ObjectiveSettings
) -> _Surrogate:
    low, high = 1.0 - settings.clip_low, 1.0 + settings.clip_high
    negative_T = advantages_T < 0
    dual_clipped_T = torch.zeros_like(negative_T)
    if settings.surrogate == "cispo":
        clipped_T = ratio_T.detach().clamp(low, high)
        return _Surrogate(
            clipped_T * advantages_T * policy_logprobs_T,
            clipped_low=ratio_T < low,
            clipped_high=ratio_T > high,
            dual_clipped=dual_clipped_T,
        )
    value_T = torch.minimum(ratio_T * advantages_T, ratio_T.clamp(low, high) * advantages_T)
    if settings.dual_clip:
        bound_T = settings.dual_clip * advantages_T
        dual_clipped_T = negative_T & (value_T < bound_T)
        value_T = torch.where(dual_clipped_T, bound_T, value_T)
    return _Surrogate(
        value_T,
        clipped_low=negative_T & (ratio_T < low),
        clipped_high=(advantages_T > 0) & (ratio_T > high),
        dual_clipped=dual_clipped_T,
    )


def _log_ratio(policy_T: Tensor, other_T: Tensor, active_T: Tensor) -> Tensor:
    """log pi - log q, bounded, and 0 (without gradient) where the token does not count."""
    difference_T = torch.where(active_T, policy_T - other_T, torch.zeros_like(policy_T))
    return difference_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def token_loss(
    policy_logprobs_T: Tensor,
    entropy_T: Tensor,
    old_logprobs_T: Tensor | None,
    ref_logprobs_T: Tensor | None,
    advantages_T: Tensor,
    weights_T: Tensor,
    settings: ObjectiveSettings,
    *,
    rollout_logprobs_T: Tensor | None = None,
    sequence_log_ratio_T: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(sum_t w_t l_t, sums for the metrics) over the packed tokens of one microbatch.

    All inputs are float [T], aligned with the target token. `policy_logprobs_T` and `entropy_T` carry
    gradients; the others are data. `old_logprobs_T`: the sampler's policy; None if it is this very policy
    (strictly on-policy: the ratio is 1 with the gradient of the log-prob). `ref_logprobs_T`: the frozen
    reference, needed when `kl_reference` is "ref" and `kl_coef` is not 0 (ValueError), otherwise only
    logged. `weights_T`: w_t of `normalization_weights`, 0 for tokens that are not part of a response, whose
    other values may be anything, NaN included. `rollout_logprobs_T`: the sampler's own, for `importance_cap`.
    `sequence_log_ratio_T`: log r_t where the ratio is of sequences, which these tokens alone may not tell.

    Metrics, detached scalars that may be summed over microbatches and ranks:
      divided by the normalization count: `loss`, `policy_loss`, `kl_loss`, `entropy_loss` (each as it
      enters the loss); divided by `num_tokens`: `entropy`, `kl_old`, `kl_ref` (both k3), `ratio`,
      `ratio_squared`, `clipped_low`, `clipped_high`, `dual_clipped`, `abs_log_ratio`.
    """
    if settings.kl_reference not in ("old", "ref"):
        raise ValueError(f"kl_reference must be 'old' or 'ref', found {settings.kl_reference!r}")
    if settings.kl_reference == "ref" and settings.kl_coef and ref_logprobs_T is None:
        raise ValueError("kl_reference = 'ref' with kl_coef > 0 needs the reference policy's log-probs")
    if settings.ratio == "sequence" and sequence_log_ratio_T is None:
        raise ValueError("ratio = 'sequence' needs the log ratios of the sequences")
    if settings.importance_cap and rollout_logprobs_T is None:
        raise ValueError("importance_cap > 0 needs the sampler's log-probs")
    active_T = weights_T != 0
    zeros_T = torch.zeros_like(policy_logprobs_T)
    old_T = policy_logprobs_T.detach() if old_logprobs_T is None else old_logprobs_T
    log_ratio_T = _log_ratio(policy_logprobs_T, old_T, active_T)
    ratio_T = log_ratio_T.exp()
    if settings.ratio == "sequence":
        assert sequence_log_ratio_T is not None
        ratio_T = torch.where(active_T, sequence_log_ratio_T, zeros_T).exp()
    surrogate = _clipped_surrogate(
        ratio_T,
        torch.where(active_T, policy_logprobs_T, zeros_T),
        torch.where(active_T, advantages_T, zeros_T),
        settings,
    )
    entropy_T = torch.where(active_T, entropy_T, zeros_T)

    ref_log_ratio_T = (
        None if ref_logprobs_T is None else _log_ratio(policy_logprobs_T, ref_logprobs_T, active_T)
    )
    policy_loss_T = -surrogate.value
    if settings.importance_cap:
        assert rollout_logprobs_T is not None
        importance_T = _log_ratio(old_T, rollout_logprobs_T, active_T).exp()
        policy_loss_T = importance_T.clamp(max=settings.importance_cap) * policy_loss_T
    loss_T = policy_loss_T
    kl_loss_T = entropy_loss_T = zeros_T
    if settings.kl_coef:
        held_T = log_ratio_T if settings.kl_reference == "old" else ref_log_ratio_T
        assert held_T is not None
        kl_loss_T = settings.kl_coef * kl_estimate(held_T, settings.kl_estimator)
        loss_T = loss_T + kl_loss_T
    if settings.entropy_coef:
        entropy_loss_T = -settings.entropy_coef * entropy_T
        loss_T = loss_T + entropy_loss_T
    loss_sum = (weights_T * loss_T).sum()

    with torch.no_grad():
        metrics = {
            "loss": loss_sum.detach(),
            "policy_loss": (weights_T * policy_loss_T).sum(),
            "kl_loss": (weights_T * kl_loss_T).sum(),
            "entropy_loss": (weights_T * entropy_loss_T).sum(),
            "num_tokens": active_T.sum(),
            "entropy": entropy_T.sum(),
            "kl_old": kl_estimate(log_ratio_T, "k3").sum(),
            "ratio": (ratio_T * active_T).sum(),
            "ratio_squared": (ratio_T.square() * active_T).sum(),
            "abs_log_ratio": log_ratio_T.abs().sum(),
            "clipped_low": surrogate.clipped_low.sum(),
            "clipped_high": surrogate.clipped_high.sum(),
            "dual_clipped": surrogate.dual_clipped.sum(),
        }
        if ref_log_ratio_T is not None:
            metrics["kl_ref"] = kl_estimate(ref_log_ratio_T, "k3").sum()
    return loss_sum, {name: value.detach() for name, value in metrics.items()}


@dataclass(frozen=True)
class Objective:
    """The objective with its settings: what the loop holds on to."""

    settings: ObjectiveSettings

    @property
    def needs_ref(self) -> bool:
        """Whether the loss, not only the log, needs the frozen reference's log-probs."""
        return self.settings.kl_reference == "ref" and self.settings.kl_coef != 0

    def token_loss(
        self,
        policy_logprobs_T: Tensor,
        entropy_T: Tensor,
        old_logprobs_T: Tensor | None,
        ref_logprobs_T: Tensor | None,
        advantages_T: Tensor,
        weights_T: Tensor,
        **more: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`token_loss` with these settings."""
        return token_loss(
            policy_logprobs_T,
            entropy_T,
            old_logprobs_T,
            ref_logprobs_T,
            advantages_T,
            weights_T,
            self.settings,
            **more,
        )

    def formula(self) -> str:
        """The loss with these settings as text, one definition a line, terms that are off left out."""
        return formula(self.settings)


def formula(settings: ObjectiveSettings) -> str:
    """The loss in plain text, with the numbers of `settings`, for `--explain` and reports."""
    low, high = 1.0 - settings.clip_low, 1.0 + settings.clip_high
    terms = "-s_t"
    one = "r_t = pi(o_t) / pi_old(o_t)"
    lines = [
        one
        if settings.ratio == "token"
        else "r_t = exp(mean over the response of log pi(o) - log pi_old(o))",
        f"s_t = min(r_t A_t, clip(r_t, {low:g}, {high:g}) A_t)"
        if settings.surrogate == "clip"
        else f"s_t = clip(r_t, {low:g}, {high:g}) A_t log pi(o_t),  the clipped ratio without gradient",
    ]
    if settings.dual_clip:
        lines.append(f"s_t = max(s_t, {settings.dual_clip:g} A_t) where A_t < 0")
    if settings.importance_cap:
        terms = "-i_t s_t"
        lines.append(f"i_t = min(pi_old(o_t) / pi_rollout(o_t), {settings.importance_cap:g})")
    if settings.kl_coef:
        terms += f" + {settings.kl_coef:g} KL_t"
        estimate = {"k1": "d_t", "k2": "d_t^2 / 2", "k3": "exp(-d_t) - 1 + d_t"}[settings.kl_estimator]
        lines.append(f"KL_t = {estimate},  d_t = log pi(o_t) - log pi_{settings.kl_reference}(o_t)")
    if settings.entropy_coef:
        terms += f" - {settings.entropy_coef:g} H_t"
        lines.append("H_t = entropy of pi at token t")
    total = {
        "token": "loss = sum_i sum_t l_t / sum_i |o_i|",
        "sequence": "loss = 1/n sum_i 1/|o_i| sum_t l_t",
        "constant": "loss = 1/n sum_i 1/L_max sum_t l_t",
    }[settings.normalization]
    return "\n".join([*lines, f"l_t = {terms}", total])
