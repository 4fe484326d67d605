"""Surrogates s_t: what is maximised in place of A_t r_t, one function each.

A surrogate takes the tokens of a chunk (`Tokens`: vectors [C]) and the settings of section `objective`, and
returns s_t [C] and metrics [C] by name, which are logged as means over tokens. Gradients come from autograd.
The first paragraph of its docstring is its formula, as `phi4r rl RECIPE --explain` prints it; {low}, {high}
and {objective.NAME} stand for the bounds of the clip and for settings. Which settings each one reads is in
`phi4r.configs.section_objective`. A surrogate of one's own is named by import path, `package.module:name`.
"""

from __future__ import annotations

import torch
from phi4r_kernels.linear_loss import Tokens
from torch import Tensor

from phi4r.configs.sections import ObjectiveConfig
from phi4r.objectives.terms import bounded, log_ratio

Surrogate = tuple[Tensor, dict[str, Tensor]]


def bounds(settings: ObjectiveConfig) -> tuple[float, float]:
    """What ratios are clipped to."""
    return 1.0 - settings.clip_low, 1.0 + settings.clip_high


def _advantages(tokens: Tokens) -> Tensor:
    assert tokens.advantages is not None, "an objective needs advantages"
    return tokens.advantages


def clip(tokens: Tokens, settings: ObjectiveConfig) -> Surrogate:
    """s_t = min(r_t A_t, clip(r_t, {low:g}, {high:g}) A_t)

    PPO and GRPO; with ratio = "sequence" GSPO (arXiv 2507.18071), and with it and sums over tokens LUSPO. The
    dual clip bounds the loss of negative advantages at large ratios.
    """
    advantages, (low, high) = _advantages(tokens), bounds(settings)
    ratio, negative = log_ratio(tokens, settings).exp(), advantages < 0
    value = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    dual_clipped = torch.zeros_like(negative)
    if settings.dual_clip:
        bound = settings.dual_clip * advantages
        dual_clipped = negative & (value < bound)
        value = torch.where(dual_clipped, bound, value)
    return value, {
        "ratio": ratio,
        "clipped_low": negative & (ratio < low),
        "clipped_high": (advantages > 0) & (ratio > high),
        "dual_clipped": dual_clipped,
    }


def cispo(tokens: Tokens, settings: ObjectiveConfig) -> Surrogate:
    """s_t = clip(r_t, {low:g}, {high:g}) A_t log pi(o_t),  the clipped ratio without gradient

    arXiv 2506.13585: tokens beyond a clip still move. Its authors clip above only: clip_low = 1.
    """
    low, high = bounds(settings)
    ratio = log_ratio(tokens, settings).exp()
    value = ratio.detach().clamp(low, high) * _advantages(tokens) * tokens.policy_logprobs
    return value, {"ratio": ratio, "clipped_low": ratio < low, "clipped_high": ratio > high}


def sapo(tokens: Tokens, settings: ObjectiveConfig) -> Surrogate:
    """s_t = A_t 4/tau sigmoid(tau (r_t - 1)),  tau = {objective.sapo_positive:g} where A_t > 0, else \
{objective.sapo_negative:g}

    arXiv 2511.20347: a soft gate in place of the clip.
    """
    advantages, ratio = _advantages(tokens), log_ratio(tokens, settings).exp()
    positive, negative = (advantages.new_tensor(t) for t in (settings.sapo_positive, settings.sapo_negative))
    tau = torch.where(advantages > 0, positive, negative)
    return advantages * torch.sigmoid(tau * (ratio - 1.0)) * (4.0 / tau), {"ratio": ratio}


def gmpo(tokens: Tokens, settings: ObjectiveConfig) -> Surrogate:
    """s_t = A_t exp(mean over the response of c_t),  c_t = d_t, clipped to [-{objective.clip_low:g}, \
{objective.clip_high:g}] where that lowers A_t c_t,  d_t = log pi(o_t) - log pi_old(o_t)

    arXiv 2507.20673: the geometric mean of ratios, each clipped in its logarithm.
    """
    advantages = _advantages(tokens)
    difference, sign = bounded(tokens.policy_logprobs - tokens.old_logprobs), torch.sign(advantages)
    clipped = difference.clamp(-settings.clip_low, settings.clip_high)
    ratio = tokens.sequence_mean(sign * torch.minimum(sign * difference, sign * clipped)).exp()
    return advantages * ratio, {
        "ratio": ratio,
        "clipped_low": (advantages < 0) & (difference < -settings.clip_low),
        "clipped_high": (advantages > 0) & (difference > settings.clip_high),
    }


def clip_cov(tokens: Tokens, settings: ObjectiveConfig) -> Surrogate:
    """s_t = min(r_t A_t, clip(r_t, {low:g}, {high:g}) A_t), 0 for {objective.cov_share:g} of the tokens, \
drawn from those with {objective.cov_low:g} < (A_t - mean A)(log pi(o_t) - mean log pi) < \
{objective.cov_high:g}

    arXiv 2505.22617: tokens that would lower the entropy most get no gradient. They are drawn before the
    step's first update.
    """
    value, metrics = clip(tokens, settings)
    selected = tokens.extras["selected"]
    return value * (1.0 - selected), metrics | {"selected": selected}


def kl_cov(tokens: Tokens, settings: ObjectiveConfig) -> Surrogate:
    """s_t = r_t A_t, minus {objective.cov_kl_coef:g} |log pi(o_t) - log pi_old(o_t)| for the \
{objective.cov_share:g} of the tokens with the largest (A_t - mean A)(log pi(o_t) - mean log pi)

    arXiv 2505.22617: tokens that would lower the entropy most are held back. They are chosen before the
    step's first update.
    """
    difference = log_ratio(tokens, settings)
    selected = tokens.extras["selected"]
    value = difference.exp() * _advantages(tokens) - settings.cov_kl_coef * difference.abs() * selected
    return value, {"ratio": difference.exp(), "selected": selected}
