"""The linear loss written out: whole logits, autograd, and ratios of sequences one sequence at a time.

`written_out` shares no code with `phi4r_kernels` and `phi4r.objectives`. Run in float64 it is the reference;
in float32 it shows what rounding costs a plain implementation, from which budgets are derived.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from phi4r_kernels.linear_loss import FusedLoss, LinearLossResult, Objective, cross_entropy, linear_loss
from torch import Tensor

from phi4r.configs.sections import ObjectiveConfig
from phi4r.objectives.objective import PolicyObjective


@dataclass(frozen=True)
class LossSpec:
    """A loss of these tests: the cross-entropy, or the objective of these settings."""

    kind: str = "cross_entropy"
    surrogate: str = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    kl_coef: float = 0.0
    kl_reference: Any = "old"
    kl_estimator: Any = "k3"
    entropy_coef: float = 0.0
    importance_cap: float = 0.0
    ratio: Any = "token"

    def objective(self) -> tuple[Objective, FusedLoss | None]:
        """As the head takes it, and as the fused kernel has it."""
        if self.kind == "cross_entropy":
            return cross_entropy, FusedLoss()
        settings = {name: value for name, value in vars(self).items() if name != "kind"}
        made = PolicyObjective.make(ObjectiveConfig(**settings))
        return made, made.fused


@dataclass(frozen=True)
class Batch:
    """Inputs of one call, in the dtype under test. hidden [T, D], weight [V, D], the rest [T]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    weights: Tensor
    advantages: Tensor
    old: Tensor
    ref: Tensor
    rollout: Tensor
    sequences: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        """Every float in `dtype`, with leaves that take gradients."""
        moved = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in vars(self).items()
        }
        for name in ("hidden", "weight"):
            moved[name] = moved[name].detach().clone().requires_grad_()
        return Batch(**moved)


def make_batch(
    num_tokens: int, dim: int, vocab: int, seed: int = 0, *, dtype: torch.dtype = torch.float64,
    sequence_lengths: list[int] | None = None, temperature: float = 1.0,
) -> Batch:  # fmt: skip
    """Random inputs: about a third of the tokens without weight, ratios beyond both clips."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    hidden, weight = normal(num_tokens, dim).to(dtype).double(), normal(vocab, dim).to(dtype).double()
    targets = torch.randint(0, vocab, (num_tokens,), generator=random)
    logp = (hidden @ weight.T / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    active = torch.rand(num_tokens, generator=random) > 0.3
    if sequence_lengths is None:
        sequence_lengths = [num_tokens]
    ids = torch.arange(len(sequence_lengths)).repeat_interleave(torch.tensor(sequence_lengths).long())
    others = [(logp + 0.4 * normal(num_tokens)).to(torch.float32).double() for _ in range(3)]
    data = [torch.rand(num_tokens, generator=random).double() * active, normal(num_tokens)]
    weights, advantages = (value.to(torch.float32).double() for value in data)
    batch = Batch(hidden, weight, targets, weights, advantages, *others, ids)
    return (
        replace(batch, hidden=hidden.to(dtype), weight=weight.to(dtype)) if dtype != torch.float64 else batch
    )


def written_out(
    batch: Batch, spec: LossSpec, temperature: float = 1.0, on_policy: bool = False, low_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, log-probs, entropies) from the whole matrix of logits; low_grad rounds its gradient to bf16."""
    logits = batch.hidden @ batch.weight.T
    if low_grad:
        logits.register_hook(lambda grad: grad.bfloat16().to(grad.dtype))
    logp_TV = (logits / temperature).log_softmax(-1)
    logp = logp_TV.gather(1, batch.targets[:, None])[:, 0]
    entropy = -(logp_TV.exp() * logp_TV).sum(-1)
    total = logp.new_zeros(())
    chosen = batch.weights != 0
    for sequence in batch.sequences.unique().tolist():
        of_it = (chosen & (batch.sequences == sequence)).nonzero()[:, 0]
        if len(of_it) == 0:
            continue
        pi, w, A = logp[of_it], batch.weights[of_it], batch.advantages[of_it]
        if spec.kind == "cross_entropy":
            total = total - (w * pi).sum()
            continue
        old = pi.detach() if on_policy else batch.old[of_it]
        log_ratio = pi - old if spec.ratio == "token" else (pi - old).mean().expand(len(of_it))
        r = log_ratio.exp()
        clipped = r.clamp(1 - spec.clip_low, 1 + spec.clip_high)
        s = torch.minimum(r * A, clipped * A) if spec.surrogate == "clip" else clipped.detach() * A * pi
        if spec.dual_clip:
            s = torch.where(A < 0, torch.maximum(s, spec.dual_clip * A), s)
        if spec.importance_cap:
            s = s * (old - batch.rollout[of_it]).exp().clamp(max=spec.importance_cap).detach()
        d = pi - (old if spec.kl_reference == "old" else batch.ref[of_it])
        kl = {"k1": d, "k2": d * d / 2, "k3": torch.expm1(-d) + d}[spec.kl_estimator]
        total = total + (w * (-s + spec.kl_coef * kl - spec.entropy_coef * entropy[of_it])).sum()
    zero = torch.zeros_like(logp)
    return total, logp.where(chosen, zero), entropy.where(chosen, zero)


def call(batch: Batch, spec: LossSpec, *, on_policy: bool = False, **options: Any) -> LinearLossResult:
    """`linear_loss` of a batch."""
    objective, fused = spec.objective()
    terms = {"advantages": batch.advantages, "ref_logprobs": batch.ref, "rollout_logprobs": batch.rollout}
    if not on_policy:
        terms["old_logprobs"] = batch.old
    sequences_T = batch.sequences if spec.kind == "policy" and spec.ratio == "sequence" else None
    options = dict(with_entropy=True, sequences_T=sequences_T) | options
    return linear_loss(
        batch.hidden, batch.weight, batch.targets, batch.weights, objective=objective, fused=fused,
        terms=terms, **options,
    )  # fmt: skip


def gradients(loss: Tensor, batch: Batch) -> list[Tensor]:
    """Of hidden and weight."""
    return list(torch.autograd.grad(loss, (batch.hidden, batch.weight)))


def measured(batch: Batch, spec: LossSpec, temperature: float, on_policy: bool, **kind: Any) -> list[Tensor]:
    """[loss, log-probs, entropies, gradient of hidden, of weight] written out, detached."""
    values = written_out(batch, spec, temperature, on_policy, **kind)
    return [value.detach() for value in values] + gradients(values[0], batch)


def assert_within_budget(
    ours: list[Tensor], batch: Batch, spec: LossSpec, temperature: float, on_policy: bool
) -> None:
    """|ours - fp64| <= 2 |plain - fp64| + 16 ulps of the largest entry, tensor by tensor: a plain fp32
    implementation rounds as often, and 16 is more than the roundings in which the two differ. The terms of
    the loss cancel, so its ulps are those of its tokens' log-probs times their weights. bf16 inputs: the
    plain one keeps fp32 logits and rounds their gradient and its own gradients to bf16, as the head does."""
    exact = measured(batch.to(torch.float64), spec, temperature, on_policy)
    low = batch.hidden.dtype == torch.bfloat16
    plain = measured(batch.to(torch.float32), spec, temperature, on_policy, low_grad=low)
    sizes = [value.abs().max() for value in exact]
    sizes[0] = sizes[1] * batch.weights.sum()
    for index, name in enumerate(("loss", "logprobs", "entropy", "grad_hidden", "grad_weight")):
        rounded = plain[index].bfloat16() if low and index >= 3 else plain[index]
        ulp = torch.finfo(rounded.dtype).eps * sizes[index]
        budget = 2 * (rounded.double() - exact[index]).abs().max() + 16 * ulp
        error = (ours[index].double() - exact[index]).abs().max()
        assert error <= budget, f"{name}: {error:.3g} > {budget:.3g}"
