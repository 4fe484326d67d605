"""The head and its loss in one pass, forward and backward: log-prob, entropy, KL and clipped surrogate.

    logits = hidden_TD weight_VD^T    loss = sum_t l(logprob_t, entropy_t)    formulas: `linear_loss_torch`

Shapes: T tokens, D hidden, V this rank's rows of the vocabulary, C tokens of a chunk, N tokens with a weight,
S sequences.

The loss of a token depends on its logits only through its log-prob and entropy, so the gradient of the logits
is known as soon as the logsumexp of their row is. Chunks of tokens go through once:

    logits_CV (GEMM, fp32) -> statistics -> loss and derivatives -> gradient, over the logits' memory
    -> grad_hidden = grad_CV weight (GEMM), grad_weight += grad_CV^T hidden (GEMM, fp32)

and autograd's backward only multiplies by the gradient of the sum. 6 N D V FLOPs instead of the 8 N D V of
a head that computes its logits twice; 2 N D V without gradients. GSPO's ratio of a sequence needs the
log-probs of all its tokens first: chunks end at the ends of sequences, and only sequences longer than a chunk
(or spread over ranks) go through a second time, at 8 N D V.

Bytes moved beside the GEMMs, per logit: read twice and written as the gradient's dtype once. Memory held: one
chunk of fp32 logits, and from forward to backward grad_hidden (N D in its dtype) and grad_weight (V D fp32).
The GEMMs bound it at chunks of 4,096 tokens and more: each chunk reads and writes grad_weight once.

Where the vocabulary is cut over ranks, one all-gather of 16 bytes a token joins a chunk's statistics; each
rank's grad_hidden is its part of a sum that the caller reduces (megatron-core's regions do).

The elementwise steps exist twice: Triton kernels (`linear_loss_triton`: CUDA, or CPU in Triton's interpreter)
and plain PyTorch (`linear_loss_torch`: the reference, and the default on CPU).
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from phi4r_kernels import linear_loss_torch as reference
from phi4r_kernels.linear_loss_torch import ADVANTAGE, OLD, REF, ROLLOUT, WEIGHT, LossSpec
from phi4r_kernels.triton_version import untested

__all__ = ["LinearLossResult", "LossSpec", "linear_logprobs", "linear_loss"]

Elementwise = Literal["auto", "triton", "torch"]


class LinearLossResult(NamedTuple):
    """loss: scalar, sum_t l_t, the only part that carries a gradient. The others [T], zero where the weight
    is: each token's l_t, log-prob, entropy (zeros unless asked for or in the loss), and the log of the ratio
    that entered the surrogate. fp32 (fp64 for fp64 input), equal on all ranks of `group`."""

    loss: Tensor
    loss_T: Tensor
    logprobs_T: Tensor
    entropy_T: Tensor
    log_ratio_T: Tensor


@dataclass(frozen=True)
class _Job:
    """One call, its tokens already compacted: those with a weight, in order.

    rows_N: their rows of `hidden_TD`, None where that is every row. lengths_S: tokens of each sequence, for
    sequence-level ratios only.
    """

    hidden_TD: Tensor
    weight_VD: Tensor
    rows_N: Tensor | None
    local_N: Tensor
    terms_5N: Tensor
    lengths_S: Tensor | None
    spec: LossSpec
    on_policy: bool
    with_entropy: bool
    scale: float
    chunk_size: int
    logits_dtype: torch.dtype
    group: dist.ProcessGroup | None
    sequence_group: dist.ProcessGroup | None
    elementwise: ModuleType

    @property
    def num_tokens(self) -> int:
        return self.local_N.size(0)

    def hidden(self, chunk: slice) -> Tensor:
        """Hidden states [C, D] of a chunk."""
        if self.rows_N is None:
            return self.hidden_TD[chunk]
        return self.hidden_TD.index_select(0, self.rows_N[chunk])

    def logits(self, hidden_CD: Tensor) -> Tensor:
        return _mm(hidden_CD, self.weight_VD.T, self.logits_dtype)

    def stats(self, logits_CV: Tensor, chunk: slice) -> Tensor:
        """Statistics [R, 4, C] of a chunk's logits on all ranks that share the vocabulary."""
        stats_4C = self.elementwise.logit_stats(logits_CV, self.local_N[chunk], self.scale, self.with_entropy)
        if self.group is None:
            return stats_4C[None]
        stats_R4C = stats_4C.new_empty(self.group.size(), *stats_4C.shape)
        dist.all_gather(list(stats_R4C), stats_4C, group=self.group)
        return stats_R4C


# --- matrix products: fp32 accumulation, and results that are not rounded back


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


@functools.cache
def _adds_in_place(device: torch.device) -> bool:
    """Whether this torch adds a bf16 product to an fp32 matrix in one cuBLAS call."""
    total, part = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    try:
        torch.addmm(total, part, part, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return bool((total == 17).all())


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif not a.is_cuda:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), out=total)
    elif _adds_in_place(a.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


# --- chunks


def _chunks(job: _Job) -> Iterator[tuple[slice, bool]]:
    """(tokens, whether some of their sequences have other tokens elsewhere)."""
    size = job.chunk_size
    if job.lengths_S is None or job.sequence_group is not None:
        for lo in range(0, job.num_tokens, size):
            yield slice(lo, min(lo + size, job.num_tokens)), job.lengths_S is not None
        return
    lo = hi = 0
    for length in job.lengths_S.tolist():
        if hi + length - lo > size and hi > lo:
            yield slice(lo, hi), False
            lo = hi
        hi += length
        if length > size:
            # Equal pieces: a short last one would waste a whole GEMM's tail.
            num_pieces = -(-length // size)
            bounds = [lo + length * piece // num_pieces for piece in range(num_pieces + 1)]
            yield from ((slice(a, b), True) for a, b in itertools.pairwise(bounds))
            lo = hi
    if hi > lo:
        yield slice(lo, hi), False


def _sequence_lengths(job: _Job, chunk: slice) -> Tensor:
    """lengths_S within a chunk that ends where sequences end."""
    assert job.lengths_S is not None
    ends_S = job.lengths_S.cumsum(0)
    starts_S = ends_S - job.lengths_S
    return ends_S.clamp(chunk.start, chunk.stop) - starts_S.clamp(chunk.start, chunk.stop)


def _spanning_terms(job: _Job, chunks: Sequence[tuple[slice, bool]]) -> Tensor | None:
    """Log ratio and derivative [2, N] of the tokens whose sequences span chunks or ranks: the extra pass."""
    spanning = [chunk for chunk, spans in chunks if spans]
    if not spanning and job.sequence_group is None:
        return None
    logprobs_N = torch.zeros_like(job.terms_5N[WEIGHT])
    inside_N = torch.zeros_like(logprobs_N, dtype=torch.bool)
    for chunk in spanning:
        stats_R4C = job.stats(job.logits(job.hidden(chunk)), chunk)
        logprobs_N[chunk] = reference.combine(stats_R4C, job.scale)[0]
        inside_N[chunk] = True
    assert job.lengths_S is not None
    # Sequences that fit a chunk take part with zeros and are worked out again with their chunk.
    terms_5N = job.terms_5N.where(inside_N, 0.0)
    return reference.sequence_terms(
        logprobs_N, terms_5N, job.lengths_S, job.spec, job.on_policy, job.sequence_group
    )


def _values(job: _Job, stats_R4C: Tensor, chunk: slice, spans: bool, spanning_2N: Tensor | None) -> Tensor:
    """`token_values` of a chunk, its sequence-level ratios worked out first where there are any."""
    terms_5C = job.terms_5N[:, chunk]
    if job.lengths_S is None:
        return job.elementwise.token_values(stats_R4C, terms_5C, job.spec, job.scale, job.on_policy)
    if spans:
        assert spanning_2N is not None
        sequence_2C = spanning_2N[:, chunk]
    else:
        logprob_C = reference.combine(stats_R4C, job.scale)[0]
        lengths_S = _sequence_lengths(job, chunk)
        sequence_2C = reference.sequence_terms(logprob_C, terms_5C, lengths_S, job.spec, job.on_policy, None)
    return reference.token_values(stats_R4C, terms_5C, job.spec, job.scale, job.on_policy, sequence_2C)


def _run(job: _Job, grad_hidden_TD: Tensor | None, grad_weight_VD: Tensor | None) -> Tensor:
    """Go through the chunks; returns [4, N] (log-prob, entropy, loss, log ratio) and fills the gradients that
    are given: grad_hidden_TD zeroed, in the hidden states' dtype, grad_weight_VD zeroed, fp32."""
    with_grad = grad_hidden_TD is not None or grad_weight_VD is not None
    result_4N = job.terms_5N.new_empty(4, job.num_tokens)
    chunks = list(_chunks(job))
    spanning_2N = _spanning_terms(job, chunks) if job.lengths_S is not None else None
    fused = getattr(job.elementwise, "loss_and_grad", None)
    for chunk, spans in chunks:
        hidden_CD = job.hidden(chunk)
        logits_CV = job.logits(hidden_CD)
        local_C = job.local_N[chunk]
        grad_dtype = job.hidden_TD.dtype
        if with_grad and fused is not None and job.group is None and job.lengths_S is None:
            values_8C, grad_CV = fused(
                logits_CV, local_C, job.terms_5N[:, chunk], job.spec, job.scale, job.on_policy, grad_dtype
            )
        else:
            values_8C = _values(job, job.stats(logits_CV, chunk), chunk, spans, spanning_2N)
            if with_grad:
                grad_CV = job.elementwise.logit_grad(
                    logits_CV, local_C, values_8C, job.scale, grad_dtype, job.spec.entropy_coef != 0
                )
        result_4N[:, chunk] = values_8C[:4]
        if grad_hidden_TD is not None:
            if job.rows_N is None:
                torch.mm(grad_CV, job.weight_VD, out=grad_hidden_TD[chunk])
            else:
                grad_hidden_TD.index_copy_(0, job.rows_N[chunk], torch.mm(grad_CV, job.weight_VD))
        if grad_weight_VD is not None:
            _add_mm(grad_weight_VD, grad_CV.T, hidden_CD)
        # The next chunk's logits take this memory.
        logits_CV = grad_CV = None
    if not job.with_entropy:
        result_4N[reference.ENTROPY] = 0
    return result_4N


def _spread(job: _Job, values_4N: Tensor) -> Tensor:
    """[4, N] -> [4, T], zeros for tokens without a weight."""
    if job.rows_N is None:
        return values_4N
    return values_4N.new_zeros(4, job.hidden_TD.size(0)).index_copy_(1, job.rows_N, values_4N)


# --- autograd


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, job: _Job) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden_TD = torch.zeros_like(hidden_TD) if need_hidden else None
        grad_weight_VD = (
            torch.zeros(weight_VD.shape, dtype=job.terms_5N.dtype, device=weight_VD.device)
            if need_weight
            else None
        )
        values_4N = _run(job, grad_hidden_TD, grad_weight_VD)
        ctx.grads, ctx.weight_dtype = (grad_hidden_TD, grad_weight_VD), weight_VD.dtype
        values_4T = _spread(job, values_4N)
        ctx.mark_non_differentiable(values_4T)
        return values_4N[reference.LOSS].sum(), values_4T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if ctx.grads is None:
            raise RuntimeError("linear_loss scales its gradients in place: its backward runs once")
        (grad_hidden_TD, grad_weight_VD), ctx.grads = ctx.grads, None
        if grad_hidden_TD is not None:
            grad_hidden_TD.mul_(grads[0])
        if grad_weight_VD is not None:
            grad_weight_VD.mul_(grads[0])
            grad_weight_VD = grad_weight_VD.to(ctx.weight_dtype)
        return grad_hidden_TD, grad_weight_VD, None


# --- public


def _backend(name: Elementwise, hidden_TD: Tensor) -> ModuleType:
    """The module with the elementwise steps."""
    if name not in ("auto", "triton", "torch"):
        raise ValueError(f"elementwise must be 'auto', 'triton' or 'torch', found {name!r}")
    if name == "auto":
        takes = hidden_TD.is_cuda and hidden_TD.dtype != torch.float64
        name = "triton" if takes and not untested() else "torch"
    return importlib.import_module(f"phi4r_kernels.linear_loss_{name}")


def _check_shapes(hidden_TD: Tensor, weight_VD: Tensor, **per_token: Tensor | None) -> None:
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.size(1) != weight_VD.size(1):
        raise ValueError(
            f"hidden {tuple(hidden_TD.shape)} and weight {tuple(weight_VD.shape)} do not multiply"
        )
    if hidden_TD.dtype != weight_VD.dtype or hidden_TD.dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float64,
    ):
        raise ValueError(f"hidden is {hidden_TD.dtype} and weight {weight_VD.dtype}: one of fp32, bf16, fp64")
    for name, values_T in per_token.items():
        if values_T is not None and values_T.shape != hidden_TD.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(values_T.shape)} for {hidden_TD.size(0)} tokens")


def _sequence_counts(sequences_N: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Tokens per sequence id, int64 [S]; S is the same on all ranks of `group`."""
    if (sequences_N.diff() < 0).any():
        raise ValueError("sequences must not decrease: the tokens of a sequence stand together")
    num = sequences_N.max().reshape(1) + 1 if len(sequences_N) else sequences_N.new_zeros(1)
    if group is not None:
        dist.all_reduce(num, op=dist.ReduceOp.MAX, group=group)
    return torch.bincount(sequences_N, minlength=int(num))


def _job(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    active_T: Tensor,
    terms: dict[int, Tensor | None],
    sequences_T: Tensor | None,
    *,
    vocab_start: int,
    temperature: float,
    chunk_size: int,
    logits_dtype: torch.dtype | None,
    elementwise: Elementwise,
    group: dist.ProcessGroup | None,
    sequence_group: dist.ProcessGroup | None = None,
    **options: Any,
) -> _Job:
    """Compact the tokens to the active ones and settle the defaults."""
    if not temperature > 0 or chunk_size < 1:
        raise ValueError(f"temperature {temperature} and chunk_size {chunk_size} must be positive")
    wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
    rows_N: Tensor | None = active_T.nonzero()[:, 0]
    if len(rows_N) == len(active_T):
        rows_N = None

    def pick(x_T: Tensor) -> Tensor:
        return x_T if rows_N is None else x_T.index_select(0, rows_N)

    local_N = pick(targets_T) - vocab_start
    terms_5N = torch.zeros(5, len(local_N), dtype=wide, device=hidden_TD.device)
    for row, values_T in terms.items():
        if values_T is not None:
            terms_5N[row] = pick(values_T)
    lengths_S = None
    if sequences_T is not None:
        lengths_S = _sequence_counts(pick(sequences_T), sequence_group)
    return _Job(
        hidden_TD=hidden_TD.detach(),
        weight_VD=weight_VD.detach(),
        rows_N=rows_N,
        local_N=local_N,
        terms_5N=terms_5N,
        lengths_S=lengths_S,
        scale=1.0 / temperature,
        chunk_size=chunk_size,
        logits_dtype=logits_dtype or wide,
        group=group if group is not None and group.size() > 1 else None,
        sequence_group=sequence_group,
        elementwise=_backend(elementwise, hidden_TD),
        **options,
    )


def linear_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    *,
    spec: LossSpec,
    advantages_T: Tensor | None = None,
    old_logprobs_T: Tensor | None = None,
    ref_logprobs_T: Tensor | None = None,
    rollout_logprobs_T: Tensor | None = None,
    sequences_T: Tensor | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_size: int = 4096,
    with_entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
    elementwise: Elementwise = "auto",
) -> LinearLossResult:
    """sum_t l_t of softmax(hidden_TD weight_VD^T / temperature) at `targets_T`, ready for backward.

    hidden_TD: fp32, bf16 or fp64 [T, D]. weight_VD: the same dtype [V, D], this rank's rows of the head, the
    first of them row `vocab_start` of the vocabulary; `group` holds the ranks with the others. targets_T:
    int64 [T], ids of the whole vocabulary. weights_T: float [T], w_t of the loss; rows of weight 0 are left
    out of every product, and their other values may be anything, NaN included.

    spec: what is minimised. kind "policy" takes advantages_T, and old_logprobs_T of the policy that sampled
    (None: it is this very policy, the ratio is 1 with the gradient of the log-prob); ref_logprobs_T for a KL
    to "ref"; rollout_logprobs_T (the sampler's own) for importance_cap; sequences_T, int64 [T], ids from 0
    that never decrease, for ratio "sequence", with `sequence_group`, the ranks that hold other tokens of the
    same sequences.

    logits_dtype: fp32 unless said (bf16 makes ratios noisy by 3-6%). elementwise: "triton" runs on CUDA, or
    on CPU with TRITON_INTERPRET=1 set before the first use; "auto" is "triton" on CUDA (but for fp64), else
    "torch".

    Gradients are worked out here, for what requires one, and held until backward, which may run once:
    grad_hidden, this rank's part of a sum over `group`, and grad_weight, added up in fp32. Without gradients
    only the log-probs are computed. Collective over `group` and `sequence_group`.
    Raises ValueError on shapes, dtypes and options that disagree.
    """
    _check_shapes(
        hidden_TD, weight_VD, targets=targets_T, weights=weights_T, advantages=advantages_T,
        old_logprobs=old_logprobs_T, ref_logprobs=ref_logprobs_T, rollout_logprobs=rollout_logprobs_T,
        sequences=sequences_T,
    )  # fmt: skip
    policy = spec.kind == "policy"
    by_sequence = policy and spec.ratio == "sequence"
    needed = {
        "advantages_T": (advantages_T, policy),
        "ref_logprobs_T": (ref_logprobs_T, policy and spec.kl_coef != 0 and spec.kl_reference == "ref"),
        "rollout_logprobs_T": (rollout_logprobs_T, policy and spec.importance_cap > 0),
        "sequences_T": (sequences_T, by_sequence),
    }
    for name, (values_T, is_needed) in needed.items():
        if is_needed and values_T is None:
            raise ValueError(f"{name} is missing, which {spec} needs")
    terms = {
        WEIGHT: weights_T,
        ADVANTAGE: advantages_T,
        OLD: old_logprobs_T,
        REF: ref_logprobs_T,
        ROLLOUT: rollout_logprobs_T,
    }
    job = _job(
        hidden_TD,
        weight_VD,
        targets_T,
        weights_T != 0,
        terms,
        sequences_T if by_sequence else None,
        vocab_start=vocab_start,
        temperature=temperature,
        chunk_size=chunk_size,
        logits_dtype=logits_dtype,
        elementwise=elementwise,
        group=group,
        sequence_group=sequence_group if by_sequence else None,
        spec=spec,
        on_policy=old_logprobs_T is None,
        with_entropy=with_entropy or spec.entropy_coef != 0,
    )
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
        loss, values_4T = _LinearLoss.apply(hidden_TD, weight_VD, job)
    else:
        values_4N = _run(job, None, None)
        loss, values_4T = values_4N[reference.LOSS].sum(), _spread(job, values_4N)
    logprobs_T, entropy_T, loss_T, log_ratio_T = values_4T
    return LinearLossResult(loss, loss_T, logprobs_T, entropy_T, log_ratio_T)


@torch.no_grad()
def linear_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    select_T: Tensor | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_size: int = 4096,
    with_entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
    elementwise: Elementwise = "auto",
) -> tuple[Tensor, Tensor]:
    """(log-probs of `targets_T`, entropies), each [T] as in `LinearLossResult`, no gradients, at 2 N D V.

    select_T: bool [T], the tokens worth computing (others give zeros); None for all. The other arguments are
    those of `linear_loss`.
    """
    _check_shapes(hidden_TD, weight_VD, targets=targets_T, select=select_T)
    active_T = torch.ones_like(targets_T, dtype=torch.bool) if select_T is None else select_T
    job = _job(
        hidden_TD,
        weight_VD,
        targets_T,
        active_T,
        {},
        None,
        vocab_start=vocab_start,
        temperature=temperature,
        chunk_size=chunk_size,
        logits_dtype=logits_dtype,
        elementwise=elementwise,
        group=group,
        spec=LossSpec(),
        on_policy=True,
        with_entropy=with_entropy,
    )
    logprobs_T, entropy_T, _, _ = _spread(job, _run(job, None, None))
    return logprobs_T, entropy_T
