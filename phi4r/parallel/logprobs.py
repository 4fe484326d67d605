"""The one vocabulary-parallel path from hidden states to log-probabilities and entropy (design contract 3).

Cross-entropy, policy / old / reference log-probs and the entropy bonus all come from `linear_logprobs`. It
walks over the tokens in chunks and never holds a [tokens, vocabulary] matrix: forward keeps one logsumexp and
one entropy per token, and backward computes each chunk's logits again. Shapes: T tokens, D hidden, V this
rank's slice of the vocabulary, C chunk.

    z = h W^T / temperature        lse = log sum_j exp z_j          (j over all ranks)
    logprob = z_target - lse       entropy = lse - sum_j p_j z_j    (p_j = exp(z_j - lse))
    d logprob / d z_j = 1[j = target] - p_j        d entropy / d z_j = -p_j (z_j - lse + entropy)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """This rank's slice [start, start + size) of the vocabulary and the group that holds the others (None:
    alone)."""

    start: int
    size: int
    group: dist.ProcessGroup | None = None

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(x, op=op, group=self.group)
        return x


def _chunk_logits(h_CD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    """fp32 logits [C, V]; bf16 inputs multiply with fp32 accumulation and are not rounded back."""
    if h_CD.dtype == torch.float32:
        logits_CV = h_CD @ weight_VD.T
    elif h_CD.is_cuda:
        logits_CV = torch.mm(h_CD, weight_VD.T, out_dtype=torch.float32)
    elif h_CD.dtype == torch.float64:
        logits_CV = h_CD @ weight_VD.T
    else:
        logits_CV = h_CD.float() @ weight_VD.T.float()
    return logits_CV.div_(temperature) if temperature != 1.0 else logits_CV


def _local_targets(targets_C: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """(index into this shard, clamped; whether the target lives here)."""
    local_C = targets_C - shard.start
    here_C = (local_C >= 0) & (local_C < shard.size)
    return local_C.clamp(0, shard.size - 1), here_C


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        temperature: float,
        chunk_size: int,
        shard: VocabShard,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        stats_dtype = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        num_tokens = hidden_TD.size(0)
        lse_T = torch.empty(num_tokens, dtype=stats_dtype, device=hidden_TD.device)
        logprob_T, entropy_T = torch.empty_like(lse_T), torch.zeros_like(lse_T)
        for lo in range(0, num_tokens, chunk_size):
            c = slice(lo, min(lo + chunk_size, num_tokens))
            logits_CV = _chunk_logits(hidden_TD[c], weight_VD, temperature)
            local_C, here_C = _local_targets(targets_T[c], shard)
            target_C = logits_CV.gather(1, local_C[:, None])[:, 0].where(here_C, 0.0)
            max_C = shard.all_reduce(logits_CV.amax(1), dist.ReduceOp.MAX)
            exp_CV = (logits_CV - max_C[:, None]).exp_()
            sums = [exp_CV.sum(1), target_C]
            if with_entropy:
                sums.append((exp_CV * logits_CV).sum(1))
            stats = shard.all_reduce(torch.stack(sums))
            lse_T[c] = max_C + stats[0].log()
            logprob_T[c] = stats[1] - lse_T[c]
            if with_entropy:
                entropy_T[c] = lse_T[c] - stats[2] / stats[0]
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, lse_T, entropy_T)
        ctx.options = (temperature, chunk_size, shard, with_entropy)
        return logprob_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprob_T, grad_entropy_T = grads
        hidden_TD, weight_VD, targets_T, lse_T, entropy_T = ctx.saved_tensors
        temperature, chunk_size, shard, with_entropy = ctx.options
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_weight_VD = torch.zeros(weight_VD.shape, dtype=lse_T.dtype, device=weight_VD.device)
        for lo in range(0, hidden_TD.size(0), chunk_size):
            c = slice(lo, min(lo + chunk_size, hidden_TD.size(0)))
            logits_CV = _chunk_logits(hidden_TD[c], weight_VD, temperature)
            local_C, here_C = _local_targets(targets_T[c], shard)
            logp_CV = logits_CV.sub_(lse_T[c, None])
            p_CV = logp_CV.exp()
            coef_C = -grad_logprob_T[c]
            if with_entropy:
                coef_CV = coef_C[:, None] - grad_entropy_T[c, None] * (logp_CV + entropy_T[c, None])
                grad_CV = p_CV.mul_(coef_CV)
            else:
                grad_CV = p_CV.mul_(coef_C[:, None])
            grad_CV.scatter_add_(1, local_C[:, None], grad_logprob_T[c].where(here_C, 0.0)[:, None])
            if temperature != 1.0:
                grad_CV.div_(temperature)
            if hidden_TD.is_cuda and hidden_TD.dtype == torch.bfloat16:
                grad_low = grad_CV.bfloat16()
                grad_hidden_TD[c] = grad_low @ weight_VD
                grad_weight_VD += torch.mm(grad_low.T, hidden_TD[c], out_dtype=torch.float32)
            else:
                grad_hidden_TD[c] = (grad_CV @ weight_VD.to(grad_CV.dtype)).to(hidden_TD.dtype)
                grad_weight_VD.addmm_(grad_CV.T, hidden_TD[c].to(grad_CV.dtype))
        return grad_hidden_TD, grad_weight_VD.to(weight_VD.dtype), None, None, None, None, None


def linear_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    chunk_size: int = 4096,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of `targets_T` and entropy of softmax(hidden_TD @ weight_VD.T / temperature).

    hidden_TD: [T, D]; weight_VD: [V, D], this rank's rows of the head; targets_T: int64 [T], global token
    ids. Returns (logprobs, entropy), each [T] in fp32 (fp64 for fp64 input), equal on all ranks of
    `shard.group`; entropy is zeros unless `with_entropy`. In backward the gradient of `hidden_TD` is this
    rank's part: sum it over the group. Peak extra memory is about 3 chunk_size x V values.
    Raises ValueError on shapes that disagree.
    """
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.size(1) != weight_VD.size(1):
        raise ValueError(
            f"hidden {tuple(hidden_TD.shape)} and weight {tuple(weight_VD.shape)} do not multiply"
        )
    if targets_T.shape != hidden_TD.shape[:1]:
        raise ValueError(f"{targets_T.size(0)} targets for {hidden_TD.size(0)} tokens")
    if weight_VD.size(0) != shard.size:
        raise ValueError(f"the weight has {weight_VD.size(0)} rows, the vocabulary shard {shard.size}")
    return _LinearLogprobs.apply(
        hidden_TD, weight_VD, targets_T, temperature, chunk_size, shard, with_entropy
    )
