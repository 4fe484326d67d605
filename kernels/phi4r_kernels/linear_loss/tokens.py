"""What an objective sees, and the one objective that the fused kernel states a second time.

Shapes: C tokens (those of a chunk, all with a weight), S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

# exp of anything larger says nothing more, and would give NaN gradients where a clip should give zero.
MAX_LOG_RATIO = 20.0


class _OverSequences(torch.autograd.Function):
    """Each token's value becomes the sum or mean over its sequence. Both are symmetric, so that their
    gradient is the same operation. Sums are in float64, in order, and over all ranks of `group`."""

    @staticmethod
    def forward(
        ctx: Any, values_C: Tensor, lengths_S: Tensor, group: dist.ProcessGroup | None, mean: bool
    ) -> Tensor:
        ctx.options = lengths_S, group, mean
        total_S = torch.segment_reduce(values_C.double(), "sum", lengths=lengths_S, unsafe=True, initial=0)
        count_S = lengths_S.double()
        if group is not None:
            dist.all_reduce(total_S, group=group)
            dist.all_reduce(count_S, group=group)
        result_S = total_S / count_S.clamp(min=1) if mean else total_S
        return result_S.repeat_interleave(lengths_S).to(values_C.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _OverSequences.apply(grads[0].contiguous(), *ctx.options), None, None, None


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of a loss, each field [C], all fp32 or fp64; tokens without a weight are left out.

    policy_logprobs, entropy: of the policy, the only ones that carry a gradient; entropy is None where the
    call did not ask for it. weights: w_t of each token in the loss.
    old_logprobs: of the policy that sampled; without gradient the policy's own where none are given (strictly
    on-policy). ref_logprobs, rollout_logprobs, advantages, extras: as they were given to the head.
    lengths_S: tokens of each sequence, int64, in order; `group`: the ranks that hold others of their tokens.
    """

    policy_logprobs: Tensor
    entropy: Tensor | None
    weights: Tensor
    old_logprobs: Tensor
    advantages: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    lengths_S: Tensor | None = None
    group: dist.ProcessGroup | None = None

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[C]: the sum of `values` [C] over each token's sequence, with its gradient."""
        return self._over_sequences(values, mean=False)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """[C]: the mean of `values` [C] over each token's sequence, with its gradient."""
        return self._over_sequences(values, mean=True)

    def _over_sequences(self, values: Tensor, mean: bool) -> Tensor:
        if self.lengths_S is None:
            raise ValueError("the objective reads sequences, which the call did not give (sequences_T)")
        result: Tensor = _OverSequences.apply(values, self.lengths_S, self.group, mean)
        return result


Objective = Callable[[Tokens], tuple[Tensor, dict[str, Tensor]]]
"""The loss l_t of each token [C], its weight included, and metrics [C] by name. The head minimises sum_t l_t,
whose derivatives by log-prob and entropy come from autograd; metrics need none."""


def cross_entropy(tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
    """l_t = -w_t logprob_t."""
    return -tokens.weights * tokens.policy_logprobs, {}


@dataclass(frozen=True)
class FusedLoss:
    """What the fused Triton kernel minimises in place of calling the objective; the two must be the same
    function. The defaults are the cross-entropy.

    policy: GRPO's clipped surrogate, which `_token_loss` in `elementwise_triton` states: ratios of tokens
    clipped to [1 - clip_low, 1 + clip_high], with dual_clip c > 1 (0: none), times
    min(pi_old / pi_rollout, importance_cap) (0: no such weights), kl_coef times a KL estimate to the old or
    reference policy, and entropy_coef times the entropy.
    """

    policy: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    kl_coef: float = 0.0
    kl_reference: Literal["old", "ref"] = "old"
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    importance_cap: float = 0.0
