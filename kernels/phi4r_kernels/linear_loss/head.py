"""The head and its loss in one pass, forward and backward.

    logits = hidden_TD weight_VD^T    loss = sum_t l(logprob_t, entropy_t, w_t, ...)    l: any `Objective`

Shapes: T tokens, D hidden, V this rank's rows of the vocabulary, C tokens of a chunk, N tokens with a weight,
S sequences.

The loss of a token depends on its logits only through its log-prob and entropy, so the gradient of the logits
is known as soon as the logsumexp of their row is. Chunks of tokens go through once:

    logits_CV (GEMM, fp32) -> statistics -> log-prob and entropy [C] -> the objective and, by autograd on
    these vectors, its two derivatives [C] -> gradient, over the logits' memory
    -> grad_hidden = grad_CV weight (GEMM), grad_weight += grad_CV^T hidden (GEMM, fp32)

and autograd's backward only multiplies by the gradient of the sum. 6 N D V FLOPs instead of the 8 N D V of
a head that computes its logits twice; 2 N D V without gradients. An objective that reads sequences (GSPO's
ratio) needs the log-probs of all their tokens first: chunks end at the ends of sequences, and only sequences
longer than a chunk (or spread over ranks) go through a second time, at 8 N D V.

Bytes moved beside the GEMMs, per logit: read twice and written as the gradient's dtype once. Memory held: one
chunk of fp32 logits, and from forward to backward grad_hidden (N D in its dtype) and grad_weight (V D fp32).
The GEMMs bound it at chunks of 4,096 tokens and more: each chunk reads and writes grad_weight once.

Where the vocabulary is cut over ranks, one all-gather of 16 bytes a token joins a chunk's statistics; each
rank's grad_hidden is its part of a sum that the caller reduces (megatron-core's regions do).

The elementwise steps exist twice: Triton kernels (`elementwise_triton`: CUDA, or CPU in Triton's interpreter)
and plain PyTorch (`elementwise_torch`: the reference, and the default on CPU). Cross-entropy and GRPO's
clipped surrogate have one Triton kernel for all steps between the GEMMs (`FusedLoss`).
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from phi4r_kernels.linear_loss.elementwise_torch import combine
from phi4r_kernels.linear_loss.tokens import FusedLoss, Objective, Tokens, cross_entropy
from phi4r_kernels.triton_version import untested

Backend = Literal["auto", "triton", "torch"]

# Rows of what is known of each token; the last two are the derivatives of its loss by the first two.
LOGPROB, ENTROPY, LOSS, COEF, ENTROPY_COEF = range(5)
TERMS = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs")


class LinearLossResult(NamedTuple):
    """loss: scalar, sum_t l_t, the only part that carries a gradient. The others [T], zero where the
    weight is: each token's l_t, log-prob, entropy (zeros unless asked for), and the objective's metrics.
    fp32 (fp64 for fp64 input), equal on all ranks of `group`."""

    loss: Tensor
    loss_T: Tensor
    logprobs_T: Tensor
    entropy_T: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One call, its tokens already compacted: those with a weight, in order.

    rows_N: their rows of `hidden_TD`, None where that is every row. lengths_S: tokens of each sequence, where
    the objective reads sequences. objective: None for log-probs alone.
    """

    hidden_TD: Tensor
    weight_VD: Tensor
    rows_N: Tensor | None
    local_N: Tensor
    weights_N: Tensor
    terms: dict[str, Tensor]
    lengths_S: Tensor | None
    objective: Objective | None
    fused: FusedLoss | None
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

    def softmax(self, logits_CV: Tensor, chunk: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(log-prob, entropy, maximum, log of the sum of exponentials), each [C], over the whole
        vocabulary."""
        stats_4C = self.elementwise.logit_stats(logits_CV, self.local_N[chunk], self.scale, self.with_entropy)
        stats_R4C = stats_4C[None]
        if self.group is not None:
            stats_R4C = stats_4C.new_empty(self.group.size(), *stats_4C.shape)
            dist.all_gather(list(stats_R4C), stats_4C, group=self.group)
        return combine(stats_R4C, self.scale)


@dataclass
class _Found:
    """values_5N: the rows LOGPROB .. ENTROPY_COEF of every token; metrics: the objective's, [N] each;
    entropy_matters: whether the loss depends on the entropy."""

    values_5N: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    entropy_matters: bool = False


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


# --- the objective


def _apply_objective(
    job: _Job,
    found: _Found,
    at: slice | Tensor,
    lengths_S: Tensor | None,
    group: dist.ProcessGroup | None,
    with_grad: bool,
) -> None:
    """Call the objective on the tokens `at`, whose log-probs and entropies are `found`, and fill in their
    loss, its derivatives and the metrics."""
    assert job.objective is not None
    logprobs_C = found.values_5N[LOGPROB, at].detach().clone().requires_grad_(with_grad)
    entropy_C = found.values_5N[ENTROPY, at].detach().clone().requires_grad_(with_grad)
    terms = {name: values_N[at] for name, values_N in job.terms.items()}
    terms.setdefault("old_logprobs", logprobs_C.detach())
    tokens = Tokens(
        policy_logprobs=logprobs_C,
        entropy=entropy_C if job.with_entropy else None,
        weights=job.weights_N[at],
        **{name: terms.pop(name) for name in TERMS if name in terms},
        extras=terms,
        lengths_S=lengths_S,
        group=group,
    )
    with torch.set_grad_enabled(with_grad):
        loss_C, metrics = job.objective(tokens)
        for name, values_C in {"loss": loss_C, **metrics}.items():
            if values_C.shape != logprobs_C.shape:
                raise ValueError(
                    f"the objective's {name} has shape {tuple(values_C.shape)} for {len(logprobs_C)} tokens"
                )
    found.values_5N[LOSS, at] = loss_C.detach()
    for name, values_C in metrics.items():
        kept_N = found.metrics.setdefault(name, torch.zeros_like(found.values_5N[LOSS]))
        kept_N[at] = values_C.detach().to(kept_N.dtype)
    if loss_C.requires_grad:
        inputs = [logprobs_C, entropy_C]
        slopes = torch.autograd.grad(loss_C, inputs, torch.ones_like(loss_C), allow_unused=True)
        for row, slope_C in zip((COEF, ENTROPY_COEF), slopes, strict=True):
            if slope_C is not None:
                found.values_5N[row, at] = slope_C
        found.entropy_matters |= slopes[1] is not None


def _apply_to_spanning(job: _Job, found: _Found, chunks: list[tuple[slice, bool]], with_grad: bool) -> None:
    """The objective of the tokens whose sequences span chunks or ranks: the extra pass over their logits."""
    spanning = [chunk for chunk, spans in chunks if spans]
    if not spanning and job.sequence_group is None:
        return
    assert job.lengths_S is not None
    inside_N = torch.zeros_like(job.local_N, dtype=torch.bool)
    for chunk in spanning:
        softmax = job.softmax(job.logits(job.hidden(chunk)), chunk)
        found.values_5N[LOGPROB, chunk], found.values_5N[ENTROPY, chunk] = softmax[:2]
        inside_N[chunk] = True
    ids_N = torch.arange(len(job.lengths_S), device=inside_N.device).repeat_interleave(job.lengths_S)
    lengths_S = torch.bincount(ids_N[inside_N], minlength=len(job.lengths_S))
    _apply_objective(job, found, inside_N.nonzero()[:, 0], lengths_S, job.sequence_group, with_grad)


def _five_terms(job: _Job) -> Tensor:
    """[5, N]: weights, advantages, and the log-probs of the old, reference and rollout policies, as the fused
    kernel reads them; zeros for what is not given."""
    zeros_N = torch.zeros_like(job.weights_N)
    return torch.stack([job.weights_N, *(job.terms.get(name, zeros_N) for name in TERMS)])


def _run(job: _Job, grad_hidden_TD: Tensor | None, grad_weight_VD: Tensor | None) -> _Found:
    """Go through the chunks; fills the gradients that are given: grad_hidden_TD zeroed, in the hidden states'
    dtype, grad_weight_VD zeroed, fp32."""
    with_grad = grad_hidden_TD is not None or grad_weight_VD is not None
    found = _Found(job.weights_N.new_zeros(5, job.num_tokens))
    chunks = list(_chunks(job))
    if job.lengths_S is not None:
        _apply_to_spanning(job, found, chunks, with_grad)
    fused = getattr(job.elementwise, "loss_and_grad", None)
    if not with_grad or job.fused is None or job.group is not None or job.lengths_S is not None:
        fused = None
    terms_5N = _five_terms(job) if fused is not None else None
    grad_dtype = job.hidden_TD.dtype
    for chunk, spans in chunks:
        hidden_CD = job.hidden(chunk)
        logits_CV = job.logits(hidden_CD)
        local_C = job.local_N[chunk]
        if fused is not None:
            assert terms_5N is not None
            on_policy = "old_logprobs" not in job.terms
            found.values_5N[:, chunk], grad_CV = fused(
                logits_CV, local_C, terms_5N[:, chunk], job.fused, job.scale, on_policy, grad_dtype
            )
        else:
            logprob_C, entropy_C, max_C, log_sum_C = job.softmax(logits_CV, chunk)
            found.values_5N[LOGPROB, chunk], found.values_5N[ENTROPY, chunk] = logprob_C, entropy_C
            if job.objective is not None and not spans:
                lengths_S = None if job.lengths_S is None else _sequence_lengths(job, chunk)
                _apply_objective(job, found, chunk, lengths_S, None, with_grad)
            if with_grad:
                points_5C = torch.stack([max_C, log_sum_C, entropy_C, *found.values_5N[COEF:, chunk]])
                grad_CV = job.elementwise.logit_grad(
                    logits_CV, local_C, points_5C, job.scale, grad_dtype, found.entropy_matters
                )
        if grad_hidden_TD is not None:
            if job.rows_N is None:
                torch.mm(grad_CV, job.weight_VD, out=grad_hidden_TD[chunk])
            else:
                grad_hidden_TD.index_copy_(0, job.rows_N[chunk], torch.mm(grad_CV, job.weight_VD))
        if grad_weight_VD is not None:
            _add_mm(grad_weight_VD, grad_CV.T, hidden_CD)
        # The next chunk's logits take this memory.
        logits_CV = grad_CV = None
    if job.objective is not None and not chunks and job.sequence_group is None:
        _apply_objective(job, found, slice(0, 0), job.lengths_S, None, False)  # for the metrics' names
    if fused is not None:
        loss_N = found.values_5N[LOSS].clone()
        _apply_objective(job, found, slice(None), None, None, False)  # for its metrics
        found.values_5N[LOSS] = loss_N
    if not job.with_entropy:
        found.values_5N[ENTROPY] = 0
    return found


# --- autograd


class _Gradients(torch.autograd.Function):
    """Hands gradients that are already there to autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        loss: Tensor,
        grad_hidden_TD: Tensor | None,
        grad_weight_VD: Tensor | None,
    ) -> Tensor:
        ctx.grads, ctx.weight_dtype = (grad_hidden_TD, grad_weight_VD), weight_VD.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.grads is None:
            raise RuntimeError("linear_loss scales its gradients in place: its backward runs once")
        (grad_hidden_TD, grad_weight_VD), ctx.grads = ctx.grads, None
        if grad_hidden_TD is not None:
            grad_hidden_TD.mul_(grads[0])
        if grad_weight_VD is not None:
            grad_weight_VD.mul_(grads[0])
            grad_weight_VD = grad_weight_VD.to(ctx.weight_dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None


# --- public


def _elementwise(name: Backend, hidden_TD: Tensor) -> ModuleType:
    """The module with the elementwise steps."""
    if name not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', found {name!r}")
    if name == "auto":
        takes = hidden_TD.is_cuda and hidden_TD.dtype != torch.float64
        name = "triton" if takes and not untested() else "torch"
    return importlib.import_module(f"phi4r_kernels.linear_loss.elementwise_{name}")


def _check_shapes(hidden_TD: Tensor, weight_VD: Tensor, per_token: Mapping[str, Tensor | None]) -> None:
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
    weights_T: Tensor,
    terms: Mapping[str, Tensor],
    sequences_T: Tensor | None,
    *,
    vocab_start: int,
    temperature: float,
    chunk_size: int,
    logits_dtype: torch.dtype | None,
    backend: Backend,
    group: dist.ProcessGroup | None,
    sequence_group: dist.ProcessGroup | None = None,
    **options: Any,
) -> _Job:
    """Compact the tokens to the active ones and settle the defaults."""
    per_token = {"targets": targets_T, "weights": weights_T, "sequences": sequences_T, **terms}
    _check_shapes(hidden_TD, weight_VD, per_token)
    if not temperature > 0 or chunk_size < 1:
        raise ValueError(f"temperature {temperature} and chunk_size {chunk_size} must be positive")
    wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
    rows_N: Tensor | None = weights_T.nonzero()[:, 0]
    if len(rows_N) == len(weights_T):
        rows_N = None

    def pick(x_T: Tensor) -> Tensor:
        return x_T if rows_N is None else x_T.index_select(0, rows_N)

    lengths_S = None
    if sequences_T is not None:
        lengths_S = _sequence_counts(pick(sequences_T), sequence_group)
    return _Job(
        hidden_TD=hidden_TD.detach(),
        weight_VD=weight_VD.detach(),
        rows_N=rows_N,
        local_N=pick(targets_T) - vocab_start,
        weights_N=pick(weights_T).detach().to(wide),
        terms={name: pick(values_T).detach().to(wide) for name, values_T in terms.items()},
        lengths_S=lengths_S,
        scale=1.0 / temperature,
        chunk_size=chunk_size,
        logits_dtype=logits_dtype or wide,
        group=group if group is not None and group.size() > 1 else None,
        sequence_group=sequence_group,
        elementwise=_elementwise(backend, hidden_TD),
        **options,
    )


def _spread(job: _Job, values_N: Tensor) -> Tensor:
    """[..., N] -> [..., T], zeros for tokens without a weight."""
    if job.rows_N is None:
        return values_N
    spread = values_N.new_zeros(*values_N.shape[:-1], job.hidden_TD.size(0))
    return spread.index_copy_(-1, job.rows_N, values_N)


def linear_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    *,
    objective: Objective = cross_entropy,
    fused: FusedLoss | None = None,
    terms: Mapping[str, Tensor] | None = None,
    sequences_T: Tensor | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_size: int = 4096,
    with_entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> LinearLossResult:
    """sum_t l_t of softmax(hidden_TD weight_VD^T / temperature) at `targets_T`, ready for backward.

    hidden_TD: fp32, bf16 or fp64 [T, D]. weight_VD: the same dtype [V, D], this rank's rows of the head, the
    first of them row `vocab_start` of the vocabulary; `group` holds the ranks with the others. targets_T:
    int64 [T], ids of the whole vocabulary. weights_T: float [T], of each token in the loss; rows of weight 0
    are left out of every product, and their other values may be anything, NaN included.

    objective: l_t, see `Tokens` for what it reads. terms: per-token values [T] by name: "advantages",
    "old_logprobs" (missing: strictly on-policy), "ref_logprobs", "rollout_logprobs", and whatever else the
    objective reads in `Tokens.extras`. sequences_T: for an objective that reads sequences, int64 [T], ids
    from 0 that never decrease; `sequence_group`: the ranks that hold other tokens of the same sequences.
    fused: the same objective as the fused kernel has it, which then takes the objective's place where it can
    (Triton, one rank for the vocabulary, gradients wanted); metrics come from `objective` always.

    with_entropy: compute the entropy, for the result or because the objective reads it. logits_dtype: fp32
    unless said (bf16 makes ratios noisy by 3-6%). backend: "triton" runs on CUDA, or on CPU with
    TRITON_INTERPRET=1 set before the first use; "auto" is "triton" on CUDA (but for fp64), else "torch".

    Gradients are worked out here, for what requires one, and held until backward, which may run once:
    grad_hidden, this rank's part of a sum over `group`, and grad_weight, added up in fp32. Without gradients
    only the values are computed. Collective over `group` and `sequence_group`.
    Raises ValueError on shapes, dtypes and options that disagree.
    """
    if fused is None and objective is cross_entropy:
        fused = FusedLoss()
    job = _job(
        hidden_TD,
        weight_VD,
        targets_T,
        weights_T,
        terms or {},
        sequences_T,
        vocab_start=vocab_start,
        temperature=temperature,
        chunk_size=chunk_size,
        logits_dtype=logits_dtype,
        backend=backend,
        group=group,
        sequence_group=sequence_group if sequences_T is not None else None,
        objective=objective,
        fused=fused,
        with_entropy=with_entropy,
    )
    wanted = [torch.is_grad_enabled() and leaf.requires_grad for leaf in (hidden_TD, weight_VD)]
    with torch.no_grad():
        grad_hidden_TD = torch.zeros_like(hidden_TD) if wanted[0] else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=job.weights_N.dtype) if wanted[1] else None
        found = _run(job, grad_hidden_TD, grad_weight_VD)
        loss = found.values_5N[LOSS].sum()
        logprobs_T, entropy_T, loss_T = _spread(job, found.values_5N[:COEF])
        metrics = {name: _spread(job, values_N) for name, values_N in found.metrics.items()}
    if any(wanted):
        loss = _Gradients.apply(hidden_TD, weight_VD, loss, grad_hidden_TD, grad_weight_VD)
    return LinearLossResult(loss, loss_T, logprobs_T, entropy_T, metrics)


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
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """(log-probs of `targets_T`, entropies), each [T] as in `LinearLossResult`, no gradients, at 2 N D V.

    select_T: bool [T], the tokens worth computing (others give zeros); None for all. The other arguments are
    those of `linear_loss`.
    """
    job = _job(
        hidden_TD,
        weight_VD,
        targets_T,
        torch.ones_like(targets_T, dtype=torch.bool) if select_T is None else select_T,
        {},
        None,
        vocab_start=vocab_start,
        temperature=temperature,
        chunk_size=chunk_size,
        logits_dtype=logits_dtype,
        backend=backend,
        group=group,
        objective=None,
        fused=None,
        with_entropy=with_entropy,
    )
    logprobs_T, entropy_T = _spread(job, _run(job, None, None).values_5N[:LOSS])
    return logprobs_T, entropy_T
