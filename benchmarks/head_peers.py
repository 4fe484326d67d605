"""The LM head with its loss, by everybody: hidden [T, D], weight [V, D], a batch -> (loss, dX, dW).

Every one computes the token-mean clipped surrogate (mode grpo), that with a KL to a reference policy and an
entropy bonus (grpo_full), cross-entropy, or log-probs without a backward (logprobs), from one `Batch`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import compile_exactly
from benchmarks.suite import SkippedError

MODES = ("grpo", "grpo_full", "cross_entropy", "logprobs")
CLIP = 0.2
KL_COEF, ENTROPY_COEF = 1e-3, 1e-3
CHUNK = 4096
SEQUENCES = 8

Head = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""(hidden, weight) -> (loss, dX, dW), or (log-probs,) in mode logprobs."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""(hidden, weight) -> loss, with its graph."""


@dataclass(frozen=True)
class Batch:
    """targets int64 [T]; old and reference log-probs fp32 [T]; advantages fp32 [T], one value per sequence,
    of which there are eight of equal length."""

    targets: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.targets.numel()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All four, in the order of the fields."""
        return self.targets, self.old_logprobs, self.ref_logprobs, self.advantages

    def part(self, start: int, stop: int) -> Batch:
        """Tokens start .. stop - 1."""
        return Batch(*(x[start:stop] for x in self.tensors))


@torch.no_grad()
def random_problem(
    num_tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: str, seed: int
) -> tuple[Tensor, Tensor, Batch]:
    """hidden [T, D], weight [V, D] and a batch such as sampling gives.

    Each hidden state leans towards its target's row, so that a target has a probability between a few per
    cent and nearly one: kernels that skip small probabilities get no more to skip than in training. Ratios
    are about 1, 0.6 or 1.6, so that what is clipped does not hang on rounding.
    """
    random = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(vocab, hidden, device=device, generator=random).mul_(hidden**-0.5).to(dtype)
    targets = torch.randint(0, vocab, (num_tokens,), device=device, generator=random)
    x = torch.randn(num_tokens, hidden, device=device, generator=random)
    lean = torch.log(torch.tensor(float(vocab))) + torch.randn(
        num_tokens, 1, device=device, generator=random
    ).mul(2)
    x = (x + lean * weight[targets].float()).to(dtype)
    logprobs = token_logprobs(x, weight, targets)
    noise = torch.randn(2, num_tokens, device=device, generator=random).mul_(0.02)
    step = torch.randint(-1, 2, (num_tokens,), device=device, generator=random) * 0.5
    advantages = torch.randn(SEQUENCES, device=device, generator=random)
    batch = Batch(
        targets,
        logprobs - step + noise[0],
        logprobs + noise[1],
        advantages.repeat_interleave(num_tokens // SEQUENCES),
    )
    return x.requires_grad_(), weight.requires_grad_(), batch


def token_logprobs(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs fp32 [T] of the targets, a chunk of tokens at a time."""
    parts = []
    for start in range(0, len(x), 1024):
        logits = (x[start : start + 1024] @ weight.t()).float()
        parts.append(-F.cross_entropy(logits, targets[start : start + 1024], reduction="none"))
    return torch.cat(parts)


def loss_sum(logits: Tensor, batch: Batch, mode: str) -> Tensor:
    """The sum of the tokens' losses from their logits [T, V]: the definition every peer is held to."""
    if mode == "cross_entropy":
        return F.cross_entropy(logits, batch.targets, reduction="sum")
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, batch.targets[:, None])[:, 0]
    ratio = (chosen - batch.old_logprobs).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    loss = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    if mode == "grpo_full":
        gap = batch.ref_logprobs - chosen
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        loss = loss + KL_COEF * (gap.expm1() - gap) - ENTROPY_COEF * entropy
    return loss.sum()


def reference(x: Tensor, weight: Tensor, batch: Batch, mode: str) -> tuple[Tensor, ...]:
    """The answer in float64, 512 tokens at a time; (dX, dW), or (log-probs,)."""
    x64, w64 = x.detach().double(), weight.detach().double()
    if mode == "logprobs":
        logprobs = [
            -F.cross_entropy(part @ w64.t(), targets, reduction="none")
            for part, targets in zip(x64.split(512), batch.targets.split(512))
        ]
        return (torch.cat(logprobs),)
    grad_w = torch.zeros_like(w64)
    grads_x = []
    for start in range(0, len(x64), 512):
        part = x64[start : start + 512].requires_grad_()
        leaf = w64.detach().requires_grad_()
        loss = loss_sum(part @ leaf.t(), batch.part(start, start + 512), mode) / batch.num_tokens
        grad_x, grad = torch.autograd.grad(loss, (part, leaf))
        grads_x.append(grad_x)
        grad_w += grad
    return torch.cat(grads_x), grad_w


def _with_gradients(loss_of: Loss) -> Head:
    def call(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        loss = loss_of(x, weight)
        return (loss.detach(), *torch.autograd.grad(loss, (x, weight)))

    return call


# --- torch


def naive_loss(batch: Batch, mode: str) -> Loss:
    """All logits at once; at least fp32."""

    def call(x: Tensor, weight: Tensor) -> Tensor:
        logits = x @ weight.t()
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return loss_sum(wide, batch, mode) / batch.num_tokens

    return call


def naive(batch: Batch, mode: str) -> Head:
    """All logits at once, autograd."""

    def call(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            logits = (x @ weight.t()).float()
            return (logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0],)

    return call if mode == "logprobs" else _with_gradients(naive_loss(batch, mode))


@cache
def _compiled() -> Callable[..., Any]:
    def chunk_loss(x: Tensor, weight: Tensor, mode: str, *batch: Tensor) -> Tensor:
        return loss_sum((x @ weight.t()).float(), Batch(*batch), mode)

    return compile_exactly(chunk_loss)


def compiled_chunks(batch: Batch, mode: str) -> Head:
    """What a few lines give: a compiled loss of 4,096 tokens at a time, its backward at once, gradients of
    the weight added up."""
    if batch.targets.device.type != "cuda":
        raise SkippedError("compiling for CPU takes longer than it is worth here")
    if mode == "logprobs":
        raise SkippedError("a loss with its backward is not logprobs")
    compiled = _compiled()

    def call(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        grad_x, grad_w, total = torch.empty_like(x), None, torch.zeros((), device=x.device)
        for start in range(0, batch.num_tokens, CHUNK):
            stop = min(start + CHUNK, batch.num_tokens)
            part = x.detach()[start:stop].requires_grad_()
            loss = compiled(part, weight, mode, *batch.part(start, stop).tensors) / batch.num_tokens
            grad_x[start:stop], grad = torch.autograd.grad(loss, (part, weight))
            grad_w = grad if grad_w is None else grad_w.add_(grad)
            total += loss.detach()
        assert grad_w is not None
        return total, grad_x, grad_w

    return call


def bare_gemms(batch: Batch, mode: str) -> Head:
    """No loss at all: the three matrix products (one for logprobs) of 8,192 tokens at a time. The bound."""

    def call(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            grad_x, grad_w = torch.empty_like(x), torch.empty_like(weight)
            for start in range(0, batch.num_tokens, 2 * CHUNK):
                part = x[start : start + 2 * CHUNK]
                logits = part @ weight.t()
                if mode != "logprobs":
                    torch.mm(logits, weight, out=grad_x[start : start + 2 * CHUNK])
                    torch.mm(logits.t(), part, out=grad_w)
        return grad_x, grad_w

    return call


# --- packages


def _liger_grpo(batch: Batch, mode: str, precision: str) -> Head:
    if mode != "grpo":
        raise SkippedError(f"Liger's GRPO loss is not {mode}")
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    except ImportError:
        raise SkippedError("liger-kernel is not installed") from None
    on_gpu = batch.targets.device.type == "cuda"
    function = LigerFusedLinearGRPOLoss(
        beta=0.0, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="dapo", use_ref_model=False, compiled=on_gpu
    )
    rows = (SEQUENCES, batch.num_tokens // SEQUENCES)
    targets, old = batch.targets.view(rows), batch.old_logprobs.view(rows)
    advantages, mask = batch.advantages.view(rows)[:, 0].contiguous(), torch.ones_like(old)

    def call(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            hidden = x.view(*rows, -1)
            loss, _ = function(hidden, weight, targets, mask, advantages, old_per_token_logps=old)
            return (loss.detach(), *torch.autograd.grad(loss, (x, weight)))
        finally:
            torch.set_float32_matmul_precision(before)

    return call


def liger_ce(batch: Batch, mode: str) -> Head:
    """Liger's fused linear cross-entropy."""
    if mode != "cross_entropy":
        raise SkippedError(f"Liger's cross-entropy is not {mode}")
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        raise SkippedError("liger-kernel is not installed") from None
    if batch.targets.device.type != "cuda":
        raise SkippedError("a Triton kernel needs a GPU")
    function = LigerFusedLinearCrossEntropyLoss()
    return _with_gradients(lambda x, weight: function(weight, x, batch.targets))


def cut_cross_entropy(batch: Batch, mode: str) -> Head:
    """Apple's cut cross-entropy, which recomputes, and skips gradients below a threshold."""
    if mode not in ("cross_entropy", "logprobs"):
        raise SkippedError(f"cut-cross-entropy is not {mode}")
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        raise SkippedError("cut-cross-entropy is not installed") from None
    if batch.targets.device.type != "cuda":
        raise SkippedError("a Triton kernel needs a GPU")

    def call(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (-linear_cross_entropy(x, weight, batch.targets, reduction="none"),)

    if mode == "logprobs":
        return call
    return _with_gradients(lambda x, weight: linear_cross_entropy(x, weight, batch.targets))


# --- ours


def ours_loss(batch: Batch, mode: str, chunk_size: int = CHUNK) -> Loss:
    """One pass: logits, loss and gradients of a chunk of tokens at a time. On CPU with PyTorch's elementwise
    steps, on a GPU with ours."""
    from phi4r_kernels.linear_loss import cross_entropy, linear_loss

    from phi4r.configs.sections import ObjectiveConfig
    from phi4r.objectives.objective import PolicyObjective

    weights = torch.full_like(batch.old_logprobs, 1 / batch.num_tokens)
    arguments: dict[str, Any] = {"objective": cross_entropy}
    if mode in ("grpo", "grpo_full"):
        settings = ObjectiveConfig(clip_low=CLIP, clip_high=CLIP, kl_coef=0.0, entropy_coef=0.0)
        terms = {"advantages": batch.advantages, "old_logprobs": batch.old_logprobs}
        if mode == "grpo_full":
            terms["ref_logprobs"] = batch.ref_logprobs
            settings = replace(
                settings, kl_coef=KL_COEF, kl_reference="ref", kl_estimator="k3", entropy_coef=ENTROPY_COEF
            )
        made = PolicyObjective.make(settings)
        arguments = {"objective": made, "fused": made.fused, "terms": terms}
        arguments["with_entropy"] = mode == "grpo_full"

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return linear_loss(x, weight, batch.targets, weights, chunk_size=chunk_size, **arguments).loss

    return call


def ours(batch: Batch, mode: str, chunk_size: int = CHUNK) -> Head:
    """`ours_loss` with its gradients, or ours without a backward."""
    from phi4r_kernels.linear_loss import linear_logprobs

    def call(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (linear_logprobs(x, weight, batch.targets, chunk_size=chunk_size)[0],)

    return call if mode == "logprobs" else _with_gradients(ours_loss(batch, mode, chunk_size))


def ours_8k(batch: Batch, mode: str) -> Head:
    """Ours with chunks of 8,192 tokens: less traffic for dW, twice the logits."""
    if batch.num_tokens <= CHUNK:
        raise SkippedError("one chunk holds everything")
    return ours(batch, mode, 2 * CHUNK)


PEERS: dict[str, Callable[[Batch, str], Head]] = {
    "ours": ours,
    "ours_chunk8192": ours_8k,
    "compiled_chunks": compiled_chunks,
    "naive": naive,
    "liger_grpo_fp32": lambda batch, mode: _liger_grpo(batch, mode, "highest"),
    "liger_grpo_tf32": lambda batch, mode: _liger_grpo(batch, mode, "high"),
    "liger_ce": liger_ce,
    "cut_cross_entropy": cut_cross_entropy,
}
