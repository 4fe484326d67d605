r"""The objective of a run: a surrogate with its corrections and penalties (technical report, section 4.2).

As the report prints it, with r_t = pi(o_t) / pi_old(o_t):

    J = E[ 1/G sum_i 1/|o_i| sum_t min(r_t A_i, clip(r_t, 1-eps, 1+eps) A_i) ] - beta KL(pi || pi_old) +
    gamma H(pi)

Here, per token, with any surrogate s_t of `phi4r.objectives.surrogates` in place of the clipped ratio:

    l_t = -i_t s_t + beta KL_t - gamma H_t        loss = sum_t w_t l_t / count

w_t and the whole number count come from `normalization_weights`; i_t corrects for a sampler that computes
other log-probs than the trainer. Both sums are reduced over ranks before the division, so the loss never
depends on how tokens were cut into microbatches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from phi4r_kernels.linear_loss import FusedLoss, Tokens
from torch import Tensor

from phi4r.configs.sections import SURROGATE_SETTINGS, ObjectiveConfig
from phi4r.core.registry import resolve
from phi4r.objectives.surrogates import Surrogate
from phi4r.objectives.terms import importance, kl_penalty, off_policy_mask

SurrogateFunction = Callable[[Tokens, ObjectiveConfig], Surrogate]
SURROGATES: Mapping[str, SurrogateFunction | str] = {
    name: f"phi4r.objectives.surrogates:{name}" for name in SURROGATE_SETTINGS
}


def _callable(found: Any) -> SurrogateFunction:
    if not callable(found):
        raise TypeError(f"it is a {type(found).__name__}, expected a function of (tokens, settings)")
    return found


@functools.cache
def surrogate_of(settings: ObjectiveConfig) -> SurrogateFunction:
    """The function that `objective.surrogate` names. Raises ConfigError on one line."""
    return resolve("surrogate", settings.surrogate, SURROGATES, key="objective.surrogate", fit=_callable)


@dataclass(frozen=True)
class PolicyObjective:
    """l_t with its weight: what the head takes as its objective. Made by `make`."""

    settings: ObjectiveConfig
    surrogate: SurrogateFunction

    @classmethod
    def make(cls, settings: ObjectiveConfig) -> PolicyObjective:
        """The objective in force. Raises ConfigError for a surrogate that cannot be found."""
        return cls(settings, surrogate_of(settings))

    def __call__(self, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        settings, weights = self.settings, tokens.weights
        value, metrics = self.surrogate(tokens, settings)
        pull = -weights
        if settings.importance_cap:
            correction = importance(tokens, settings)
            pull, metrics = pull * correction, metrics | {"importance": correction}
        if settings.off_policy_limit:
            kept = off_policy_mask(tokens, settings)
            pull, metrics = pull * kept, metrics | {"off_policy_masked": 1.0 - kept}
        if settings.top_entropy < 1:
            pull = pull * tokens.extras["top_entropy"]
        loss = pull * value
        if settings.kl_coef and not settings.kl_in_reward:
            loss = loss + weights * settings.kl_coef * kl_penalty(tokens, settings)
        if settings.entropy_coef:
            assert tokens.entropy is not None
            bonus = -settings.entropy_coef * tokens.extras.get("entropy_weights", weights)
            if settings.top_entropy < 1:
                bonus = bonus * tokens.extras["top_entropy"]
            loss = loss + bonus * tokens.entropy
        return loss, metrics

    @property
    def fused(self) -> FusedLoss | None:
        """The same in the fused kernel's terms, where it has them: GRPO's clipped surrogate of tokens."""
        beyond = ("surrogate", "ratio", "importance_mode", "importance_floor", "importance_level",
                  "off_policy_limit", "top_entropy", "entropy_mean", "kl_ratio")  # fmt: skip
        settings = self.settings
        if any(getattr(settings, name) != getattr(ObjectiveConfig, name) for name in beyond):
            return None
        return FusedLoss(
            policy=True,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
            kl_coef=0.0 if settings.kl_in_reward else settings.kl_coef,
            kl_reference=settings.kl_reference,
            kl_estimator=settings.kl_estimator,
            entropy_coef=settings.entropy_coef,
            importance_cap=settings.importance_cap,
        )
