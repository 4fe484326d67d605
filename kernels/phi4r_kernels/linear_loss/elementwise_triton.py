"""The elementwise steps of the linear loss as Triton kernels; formulas in `elementwise_torch`.

Shapes: C tokens of a chunk, V this rank's slice of the vocabulary, R ranks that share it. A program owns
whole rows of logits, so no sum depends on the order of programs.

Bytes per logit, fp32 logits and bf16 gradients: 4 read for the statistics, 4 read and 2 written for the
gradient; memory bounds all of it (at 2.25 exponentials a logit). For a `FusedLoss` without tensor
parallelism one kernel does both passes, and its grid of one program per SM is meant to keep the rows in
flight in L2 (132 x 401 KB at V = 100,352), so that the second read seldom reaches HBM.

The gradient goes over the logits' memory. bf16 gradients of fp32 logits take the first half of their row:
block j is written where block j / 2 was, which all threads have read, as a barrier separates each block's
loads from its stores.

The running maximum is kept per lane, and lanes meet once per row: no barrier in the loop over the vocabulary.
Differences are taken to the maximum before scaling, so that the rounding of a large logit cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi4r_kernels.linear_loss.tokens import MAX_LOG_RATIO, FusedLoss

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
BOUND = tl.constexpr(MAX_LOG_RATIO)
# Below any logit; finite, so that (NOTHING - NOTHING) and 0 * NOTHING are 0 and not NaN.
NOTHING = tl.constexpr(-1.0e30)
DEPTH = tl.constexpr(4)


# --- kernels


@triton.jit
def _row_stats(row, size, scale, ENTROPY: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr):
    """(m, sum e^d, sum d e^d) of one row, d = (x - m) scale; a lane rescales its sums per DEPTH logits."""
    scale2 = scale * LOG2E
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    largest = tl.full([LANES], NOTHING, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, size, DEPTH * LANES, num_stages=STAGES):
        columns = start + tile
        inside = columns < size
        x = tl.load(row + columns, mask=inside, other=NOTHING, eviction_policy="evict_last").to(tl.float32)
        new = tl.maximum(largest, tl.max(x, 0))
        shift = (largest - new) * scale2
        keep = tl.exp2(shift)
        d = (x - new[None, :]) * scale2
        p = tl.where(inside, tl.exp2(d), 0.0)
        if ENTROPY:
            weighted = keep * (weighted + shift * total) + tl.sum(p * d, 0)
        total = keep * total + tl.sum(p, 0)
        largest = new
    m = tl.max(largest, 0)
    shift = (largest - m) * scale2
    keep = tl.exp2(shift)
    if ENTROPY:
        weighted = keep * (weighted + shift * total)
    return m, tl.sum(keep * total, 0), tl.sum(weighted, 0) * LN2


@triton.jit
def _row_grad(
    row, grad_row, size, target, m, log_sum, entropy, coef, entropy_coef, scale,
    ENTROPY: tl.constexpr, OVERLAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write d loss / d logits of one row. OVERLAP: into the first half of the row itself."""
    scale2 = scale * LOG2E
    log2_sum = log_sum * LOG2E
    coef = coef * scale
    entropy_coef = entropy_coef * scale
    columns = tl.arange(0, BLOCK)
    x = tl.load(row + columns, mask=columns < size, other=NOTHING, eviction_policy="evict_first")
    for _ in tl.range(0, size, BLOCK):
        # The next block is on its way while this one is worked on; the barrier rules out num_stages.
        ahead = columns + BLOCK
        following = tl.load(row + ahead, mask=ahead < size, other=NOTHING, eviction_policy="evict_first")
        logp2 = (x.to(tl.float32) - m) * scale2 - log2_sum
        grad = -coef
        if ENTROPY:
            grad = grad - entropy_coef * (logp2 * LN2 + entropy)
        grad = tl.exp2(logp2) * grad + tl.where(columns == target, coef, 0.0)
        if OVERLAP:
            tl.debug_barrier()
        tl.store(grad_row + columns, grad.to(grad_row.dtype.element_ty), mask=columns < size)
        x = following
        columns = ahead


@triton.jit
def _bounded(difference):
    """(log ratio within its bound, 1.0 where it has a gradient); NaN stays NaN."""
    value = tl.where(difference > BOUND, BOUND, difference)
    value = tl.where(difference < -BOUND, -BOUND, value)
    return value, tl.where(tl.abs(difference) <= BOUND, 1.0, 0.0)


@triton.jit
def _k3(d):
    """exp(-d) - 1 + d; near 0 by its series, where the difference would cancel."""
    series = d * (1.0 / 362880.0)
    series = d * (1.0 / 40320.0 - series)
    series = d * (1.0 / 5040.0 - series)
    series = d * (1.0 / 720.0 - series)
    series = d * (1.0 / 120.0 - series)
    series = d * (1.0 / 24.0 - series)
    series = d * (1.0 / 6.0 - series)
    return tl.where(tl.abs(d) < 0.5, d * d * (0.5 - series), tl.exp(-d) - 1.0 + d)


@triton.jit
def _kl(d, KL: tl.constexpr):
    """(estimate, derivative); KL: 1, 2, 3 for k1, k2, k3."""
    if KL == 1:
        value = d
        slope = d * 0.0 + 1.0
    elif KL == 2:
        value = 0.5 * d * d
        slope = d
    else:
        value = _k3(d)
        slope = d - value
    return value, slope


@triton.jit
def _token_loss(
    logprob, entropy, terms, terms_stride, at,
    clip_low, clip_high, dual_clip, kl_coef, entropy_coef, importance_cap,
    POLICY: tl.constexpr, ON_POLICY: tl.constexpr, DUAL: tl.constexpr, KL: tl.constexpr,
    KL_TO_REF: tl.constexpr, CAPPED: tl.constexpr, ENTROPY_LOSS: tl.constexpr,
):  # fmt: skip
    """(w l, its derivatives by log-prob and entropy) of the token `at`, for a `FusedLoss`."""
    weight = tl.load(terms + at)
    loss = -weight * logprob
    coef = -weight
    if POLICY:
        advantage = tl.load(terms + terms_stride + at)
        old = logprob
        if not ON_POLICY:
            old = tl.load(terms + 2 * terms_stride + at)
        log_ratio, moving = _bounded(logprob - old)
        ratio = tl.exp(log_ratio)
        low = 1.0 - clip_low
        high = 1.0 + clip_high
        plain = ratio * advantage
        clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
        value = tl.where(plain < clipped, plain, clipped)
        slope = tl.where(((ratio >= low) & (ratio <= high)) | (plain < clipped), plain, 0.0) * moving
        if DUAL:
            bound = dual_clip * advantage
            stopped = (advantage < 0) & (value < bound)
            value = tl.where(stopped, bound, value)
            slope = tl.where(stopped, 0.0, slope)
        pull = -weight
        if CAPPED:
            rollout = tl.load(terms + 4 * terms_stride + at)
            importance = tl.exp(_bounded(old - rollout)[0])
            pull = pull * tl.where(importance > importance_cap, importance_cap, importance)
        loss = pull * value
        coef = pull * slope
        if KL > 0:
            held = log_ratio
            if KL_TO_REF:
                ref = tl.load(terms + 3 * terms_stride + at)
                held, moving = _bounded(logprob - ref)
            kl, kl_slope = _kl(held, KL)
            loss += weight * kl_coef * kl
            coef += weight * kl_coef * kl_slope * moving
    by_entropy = -weight * entropy_coef
    if ENTROPY_LOSS:
        loss += by_entropy * entropy
    return loss, coef, by_entropy


@triton.jit
def _target_logit(row, target, size):
    """The target's raw logit, 0 where another rank has it."""
    here = (target >= 0) & (target < size)
    return tl.load(row + target, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _stats_kernel(
    logits, targets, stats, count, size, stride, scale,
    ENTROPY: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Row `program_id` of logits [C, V] to a column of stats [4, C]."""
    at = tl.program_id(0)
    row = logits + tl.cast(at, tl.int64) * stride
    target = _target_logit(row, tl.load(targets + at), size)
    m, total, weighted = _row_stats(row, size, scale, ENTROPY, LANES, STAGES)
    tl.store(stats + at, m)
    tl.store(stats + count + at, total)
    tl.store(stats + 2 * count + at, weighted)
    tl.store(stats + 3 * count + at, target)


@triton.jit
def _grad_kernel(
    logits, grads, targets, points, count, size, stride, grad_stride, scale,
    ENTROPY: tl.constexpr, OVERLAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row `program_id` of logits [C, V] to its gradient, at the column of points [5, C]."""
    at = tl.program_id(0)
    column = points + at
    _row_grad(
        logits + tl.cast(at, tl.int64) * stride, grads + tl.cast(at, tl.int64) * grad_stride, size,
        tl.load(targets + at), tl.load(column), tl.load(column + count), tl.load(column + 2 * count),
        tl.load(column + 3 * count), tl.load(column + 4 * count), scale,
        ENTROPY, OVERLAP, BLOCK,
    )  # fmt: skip


@triton.jit
def _loss_and_grad_kernel(
    logits, grads, targets, terms, values, count, size, stride, grad_stride, terms_stride, scale,
    clip_low, clip_high, dual_clip, kl_coef, entropy_coef, importance_cap,
    POLICY: tl.constexpr, ON_POLICY: tl.constexpr, DUAL: tl.constexpr, KL: tl.constexpr,
    KL_TO_REF: tl.constexpr, CAPPED: tl.constexpr, ENTROPY_LOSS: tl.constexpr,
    OVERLAP: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Statistics, loss and gradient of every num_programs-th row: the whole vocabulary is on this rank."""
    for at in range(tl.program_id(0), count, tl.num_programs(0)):
        row = logits + tl.cast(at, tl.int64) * stride
        target = tl.load(targets + at)
        target_logit = _target_logit(row, target, size)
        m, total, weighted = _row_stats(row, size, scale, True, LANES, STAGES)
        log_sum = tl.log(total)
        logprob = (target_logit - m) * scale - log_sum
        entropy = log_sum - weighted / total
        loss, coef, by_entropy = _token_loss(
            logprob, entropy, terms, terms_stride, at,
            clip_low, clip_high, dual_clip, kl_coef, entropy_coef, importance_cap,
            POLICY, ON_POLICY, DUAL, KL, KL_TO_REF, CAPPED, ENTROPY_LOSS,
        )  # fmt: skip
        tl.store(values + at, logprob)
        tl.store(values + count + at, entropy)
        tl.store(values + 2 * count + at, loss)
        tl.store(values + 3 * count + at, coef)
        tl.store(values + 4 * count + at, by_entropy)
        _row_grad(
            row, grads + tl.cast(at, tl.int64) * grad_stride, size, target,
            m, log_sum, entropy, coef, by_entropy, scale, ENTROPY_LOSS, OVERLAP, DEPTH * LANES,
        )  # fmt: skip


# --- launchers, as operators that torch.compile and CUDA graphs can see through


class Launch(NamedTuple):
    """lanes: columns side by side; a block is DEPTH times as many."""

    lanes: int
    num_warps: int
    num_stages: int

    @property
    def block(self) -> int:
        return self.lanes * DEPTH.value


def launch_of(size: int, arch: int) -> Launch:
    """Four lanes a thread; rows shorter than a block take a smaller one. Compiled for sm_80 (arch 80), a
    third stage spills."""
    lanes = min(2048, triton.next_power_of_2(triton.cdiv(size, DEPTH.value)))
    return Launch(lanes, max(1, lanes // 128), 3 if arch >= 90 else 2)


def _arch(device: torch.device) -> int:
    """Compute capability in tens and units; the interpreter's is Hopper's."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def _num_programs(device: torch.device, count: int) -> int:
    """One program per SM, see the module's docstring; a few in the interpreter."""
    if device.type != "cuda":
        return min(count, 3)
    return min(count, torch.cuda.get_device_properties(device).multi_processor_count)


def _check(logits_CV: Tensor) -> None:
    if not logits_CV.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError("elementwise 'triton' needs a CUDA device, or TRITON_INTERPRET=1 set at the start")
    if logits_CV.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"elementwise 'triton' takes fp32 or bf16 logits, found {logits_CV.dtype}")
    assert logits_CV.stride(1) == 1


def _numbers(fused: FusedLoss) -> list[float]:
    return [
        fused.clip_low, fused.clip_high, fused.dual_clip, fused.kl_coef, fused.entropy_coef,
        fused.importance_cap,
    ]  # fmt: skip


_FLAGS = ("POLICY", "ON_POLICY", "DUAL", "KL", "KL_TO_REF", "CAPPED", "ENTROPY_LOSS")


def _flags(fused: FusedLoss, on_policy: bool) -> list[int]:
    kl = int(fused.kl_estimator[1]) if fused.kl_coef else 0
    return [fused.policy, on_policy, fused.dual_clip != 0, kl, fused.kl_reference == "ref",
            fused.importance_cap > 0, fused.entropy_coef != 0]  # fmt: skip


def _constants(flags: Sequence[int]) -> dict[str, Any]:
    return {name: value if name == "KL" else bool(value) for name, value in zip(_FLAGS, flags, strict=True)}


def constants_of(fused: FusedLoss, on_policy: bool) -> dict[str, Any]:
    """The constexprs that a loss compiles to."""
    return _constants(_flags(fused, on_policy))


def _gradient_of(logits_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of the logits seen as their gradient [C, V] in `dtype`."""
    if logits_CV.dtype == dtype:
        return logits_CV
    assert (logits_CV.dtype, dtype) == (torch.float32, torch.bfloat16)
    return logits_CV.view(dtype)[:, : logits_CV.size(1)]


@torch.library.custom_op("phi4r_kernels::linear_loss_stats", mutates_args=())
def _stats_op(logits: Tensor, targets: Tensor, scale: float, with_entropy: bool) -> Tensor:
    count, size = logits.shape
    stats = logits.new_empty(4, count, dtype=torch.float32)
    launch = launch_of(size, _arch(logits.device))
    if count:
        _stats_kernel[(count,)](
            logits, targets, stats, count, size, logits.stride(0), scale,
            ENTROPY=with_entropy, LANES=launch.lanes, STAGES=launch.num_stages, num_warps=launch.num_warps,
        )  # fmt: skip
    return stats


@_stats_op.register_fake
def _(logits: Tensor, targets: Tensor, scale: float, with_entropy: bool) -> Tensor:
    return logits.new_empty(4, logits.size(0), dtype=torch.float32)


@torch.library.custom_op("phi4r_kernels::linear_loss_grad", mutates_args=("logits",))
def _grad_op(
    logits: Tensor, targets: Tensor, points: Tensor, scale: float, low: bool, with_entropy: bool
) -> None:
    count, size = logits.shape
    grads = _gradient_of(logits, torch.bfloat16 if low else logits.dtype)
    launch = launch_of(size, _arch(logits.device))
    if count:
        _grad_kernel[(count,)](
            logits, grads, targets, points, count, size, logits.stride(0), grads.stride(0), scale,
            ENTROPY=with_entropy, OVERLAP=grads.dtype != logits.dtype, BLOCK=launch.block,
            num_warps=launch.num_warps,
        )  # fmt: skip


@_grad_op.register_fake
def _(logits: Tensor, targets: Tensor, points: Tensor, scale: float, low: bool, with_entropy: bool) -> None:
    return None


@torch.library.custom_op("phi4r_kernels::linear_loss_and_grad", mutates_args=("logits",))
def _loss_and_grad_op(
    logits: Tensor,
    targets: Tensor,
    terms: Tensor,
    scale: float,
    low: bool,
    numbers: Sequence[float],
    flags: Sequence[int],
) -> Tensor:
    count, size = logits.shape
    values = logits.new_empty(5, count, dtype=torch.float32)
    grads = _gradient_of(logits, torch.bfloat16 if low else logits.dtype)
    launch = launch_of(size, _arch(logits.device))
    if count:
        _loss_and_grad_kernel[(_num_programs(logits.device, count),)](
            logits, grads, targets, terms, values, count, size, logits.stride(0), grads.stride(0),
            terms.stride(0), scale, *numbers, **_constants(flags), OVERLAP=grads.dtype != logits.dtype,
            LANES=launch.lanes, STAGES=launch.num_stages, num_warps=launch.num_warps,
        )  # fmt: skip
    return values


@_loss_and_grad_op.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    terms: Tensor,
    scale: float,
    low: bool,
    numbers: Sequence[float],
    flags: Sequence[int],
) -> Tensor:
    return logits.new_empty(5, logits.size(0), dtype=torch.float32)


# --- the functions of `elementwise_torch`, and the one that joins them


def logit_stats(logits_CV: Tensor, local_C: Tensor, scale: float, with_entropy: bool) -> Tensor:
    """`elementwise_torch.logit_stats`."""
    _check(logits_CV)
    return _stats_op(logits_CV, local_C, scale, with_entropy)


def logit_grad(
    logits_CV: Tensor,
    local_C: Tensor,
    points_5C: Tensor,
    scale: float,
    dtype: torch.dtype,
    with_entropy: bool,
) -> Tensor:
    """`elementwise_torch.logit_grad`, over the memory of the logits."""
    _check(logits_CV)
    _grad_op(logits_CV, local_C, points_5C, scale, dtype == torch.bfloat16, with_entropy)
    return _gradient_of(logits_CV, dtype)


def loss_and_grad(
    logits_CV: Tensor,
    local_C: Tensor,
    terms_5C: Tensor,
    fused: FusedLoss,
    scale: float,
    on_policy: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """All steps in one kernel, for a vocabulary that is not cut: (values [5, C], gradient [C, V]).

    terms_5C: weights, advantages, and log-probs of the old, reference and rollout policies. values_5C:
    log-prob, entropy, weighted loss, and its derivatives by log-prob and by entropy.
    """
    _check(logits_CV)
    low = dtype == torch.bfloat16
    numbers, flags = _numbers(fused), _flags(fused, on_policy)
    values_5C = _loss_and_grad_op(logits_CV, local_C, terms_5C, scale, low, numbers, flags)
    return values_5C, _gradient_of(logits_CV, dtype)
