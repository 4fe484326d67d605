"""FlashAttention for packed rows: forward and backward, grouped queries, causal or full, documents of any
length.

    out_n = softmax(scale q_n k^T + mask) v     per query head n of the KV head n // (N / K)

Legend: Tq queries, Tk keys, N query heads, K KV heads, H head dimension. q [Tq, N, H], k and v [Tk, K, H] in
bf16 or fp16, arithmetic in fp32, logsumexp [N, Tq] fp32. Which query sees which key is the plan's business
(`attention_plan.make_plan`): documents, causality, and the two chunks of a row that a rank of context
parallelism holds against all of its keys and values.

Cost: 4 H FLOPs per head and visible pair forward, 10 H backward (five products; 14 H where `deterministic`
splits dQ off), against 2 (Tq N + 2 Tk K) H bytes each way: bound by the matrix units from a few hundred
tokens on. The backward keeps q, k, v, out and the logsumexp, and takes 4 Tq N H bytes for fp32 sums of dQ.

On CPU tensors the kernels run in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported): exact
enough to test everything but races, and slow.
"""

from __future__ import annotations

import math
import os

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from phi4r_kernels import attention_hopper, interpreter
from phi4r_kernels import attention_kernels as kernels
from phi4r_kernels.attention_plan import K_TILE, Q_TILE, AttentionPlan
from phi4r_kernels.attention_tiles import HEAD_DIMS, ROWS, Launch, Tiles, tiles_for

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process interprets Triton kernels, on CPU tensors, instead of compiling them."""

L2_BYTES = 32 * 2**20
"""Keys and values that programs running at the same time may share: what is surely left of a 50 MB cache."""

if INTERPRETED:
    interpreter.install()

PATHS = ("auto", "triton", "hopper")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# --- launchers


def _rows(x: Tensor) -> Tensor:
    """x [T, heads, H], copied only where its layout suits no descriptor: unit stride inside a head, heads
    inside a token, everything aligned to 16 bytes."""
    item = x.element_size()
    token, head, dim = x.stride()
    fits = dim == 1 and token >= (x.size(1) - 1) * head + x.size(2) and head >= x.size(2)
    aligned = x.data_ptr() % 16 == 0 and token * item % 16 == 0 and head * item % 16 == 0
    return x if fits and aligned else x.clone(memory_format=torch.contiguous_format)


def _descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """x [T, heads, H] as tokens by columns, read in blocks of [block, H]; head h begins at column
    h x.stride(1)."""
    columns = (x.size(1) - 1) * x.stride(1) + x.size(2)
    return TensorDescriptor(x, [x.size(0), columns], [x.stride(0), 1], [block, x.size(2)])


def _section(num_kv_heads: int, bytes_per_head: int) -> int:
    """How many KV heads to work on at a time, so that what their programs share stays in the L2 cache: the
    largest divisor of num_kv_heads that fits, at least 1."""
    fitting = max(1, L2_BYTES // max(bytes_per_head, 1))
    return max(d for d in range(1, num_kv_heads + 1) if num_kv_heads % d == 0 and d <= fitting)


def _query_section(q: Tensor, k: Tensor) -> int:
    """How many query heads to work on at a time."""
    group = q.size(1) // k.size(1)
    return group * _section(k.size(1), 2 * k.size(0) * q.size(2) * k.element_size())


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, q_tiles: Tensor, scale: float, launch: Launch
) -> tuple[Tensor, Tensor]:
    (num_queries, num_heads, dim), num_kv_heads = q.shape, k.size(1)
    group = num_heads // num_kv_heads
    out = torch.empty(num_queries, num_heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_heads, num_queries, dtype=torch.float32, device=q.device)
    kernels._attention_fwd_kernel[(q_tiles.size(0) * num_heads,)](
        _descriptor(q, Q_TILE), _descriptor(k, launch.block), _descriptor(v, launch.block), out, lse, q_tiles,
        q_tiles.size(0), _query_section(q, k), num_queries, num_heads, q.stride(1), k.stride(1), v.stride(1),
        scale * math.log2(math.e),
        GROUP=group, H=dim, BM=Q_TILE, BN=launch.block,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return out, lse


def _launch_delta(out: Tensor, do: Tensor) -> Tensor:
    num_queries, num_heads, dim = out.shape
    delta = torch.empty(num_heads, num_queries, dtype=torch.float32, device=out.device)
    kernels._attention_delta_kernel[(triton.cdiv(num_queries, ROWS), num_heads)](
        out, do, delta, num_queries, num_heads, do.stride(0), do.stride(1), H=dim, BM=ROWS, num_warps=4
    )
    return delta


def _launch_dkdv(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, k_tiles: Tensor, scale: float,
    launch: Launch, dq_sums: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dK and dV; with `dq_sums` (fp32 zeros [N Tq, H]) also dQ / scale, added into it."""
    (num_queries, num_heads, dim), (num_keys, num_kv_heads) = q.shape, k.shape[:2]
    group = num_heads // num_kv_heads
    dk = torch.empty(num_keys, num_kv_heads, dim, dtype=k.dtype, device=k.device)
    dv = torch.empty(num_keys, num_kv_heads, dim, dtype=v.dtype, device=v.device)
    parts = K_TILE // launch.tile
    dq_desc = None
    if dq_sums is not None:
        dq_desc = TensorDescriptor(dq_sums, list(dq_sums.shape), [dim, 1], [launch.block, dim])
    section = _section(num_kv_heads, 2 * group * num_queries * dim * q.element_size())
    kernels._attention_bwd_kernel[(k_tiles.size(0) * parts * num_kv_heads,)](
        _descriptor(q, launch.block), _descriptor(k, launch.tile), _descriptor(v, launch.tile),
        _descriptor(do, launch.block), dq_desc, dk, dv, lse, delta, k_tiles,
        k_tiles.size(0) * parts, section, num_queries, num_kv_heads,
        q.stride(1), k.stride(1), v.stride(1), do.stride(1), scale, scale * math.log2(math.e),
        GROUP=group, H=dim, BM=launch.block, BN=launch.tile, PARTS=parts, FUSED=dq_sums is not None,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return dk, dv


def _launch_dq(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, q_tiles: Tensor, scale: float,
    launch: Launch,
) -> Tensor:  # fmt: skip
    (num_queries, num_heads, dim), num_kv_heads = q.shape, k.size(1)
    group = num_heads // num_kv_heads
    dq = torch.empty(num_queries, num_heads, dim, dtype=q.dtype, device=q.device)
    section = _query_section(q, k)
    kernels._attention_dq_kernel[(q_tiles.size(0) * num_heads,)](
        _descriptor(q, Q_TILE), _descriptor(k, launch.block), _descriptor(v, launch.block),
        _descriptor(do, Q_TILE), dq, lse, delta, q_tiles, q_tiles.size(0), section, num_queries, num_heads,
        q.stride(1), k.stride(1), v.stride(1), do.stride(1), scale, scale * math.log2(math.e),
        GROUP=group, H=dim, BM=Q_TILE, BN=launch.block,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return dq


def _launch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_tiles: Tensor, k_tiles: Tensor,
    scale: float, deterministic: bool, tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    delta = _launch_delta(out, do)
    if deterministic:
        dk, dv = _launch_dkdv(do, q, k, v, lse, delta, k_tiles, scale, tiles.dkdv, None)
        return _launch_dq(do, q, k, v, lse, delta, q_tiles, scale, tiles.dq), dk, dv
    num_queries, num_heads, dim = q.shape
    sums = torch.zeros(num_heads * num_queries, dim, dtype=torch.float32, device=q.device)
    dk, dv = _launch_dkdv(do, q, k, v, lse, delta, k_tiles, scale, tiles.fused, sums)
    dq = torch.empty(num_queries, num_heads, dim, dtype=q.dtype, device=q.device)
    kernels._attention_dq_cast_kernel[(triton.cdiv(num_queries, ROWS), num_heads)](
        sums, dq, num_queries, num_heads, scale, H=dim, BM=ROWS, num_warps=4
    )
    return dq, dk, dv


# --- torch operators: forward and backward as two opaque ops, with shapes for tracing


@torch.library.custom_op("phi4r_kernels::attention_fwd", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, q_tiles: Tensor, k_tiles: Tensor, scale: float, deterministic: bool,
    path: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = _rows(q), _rows(k), _rows(v)
    if path != "triton" and not (why_not := attention_hopper.reason(q)):
        section = _query_section(q, k)
        return attention_hopper.forward(q, k, v, q_tiles, scale, section)
    if path == "hopper":
        raise ValueError(f"path 'hopper' asked for, but {why_not}")
    return _launch_forward(q, k, v, q_tiles, scale, tiles_for(q.device, q.size(2)).fwd)


@_forward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, q_tiles: Tensor, k_tiles: Tensor, scale: float, deterministic: bool,
    path: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(q.size(1), q.size(0), dtype=torch.float32)


@torch.library.custom_op("phi4r_kernels::attention_bwd", mutates_args=())
def _backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_tiles: Tensor, k_tiles: Tensor,
    scale: float, deterministic: bool, path: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    do, q, k, v = _rows(do), _rows(q), _rows(k), _rows(v)
    tiles = tiles_for(q.device, q.size(2))
    return _launch_backward(do, q, k, v, out, lse, q_tiles, k_tiles, scale, deterministic, tiles)


@_backward_op.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_tiles: Tensor, k_tiles: Tensor,
    scale: float, deterministic: bool, path: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, q_tiles, k_tiles, ctx.scale, ctx.deterministic, ctx.path = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(q, k, v, *output, q_tiles, k_tiles)  # type: ignore[attr-defined]


def _backward(ctx: object, do: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, q_tiles, k_tiles = ctx.saved_tensors  # type: ignore[attr-defined]
    settings = ctx.scale, ctx.deterministic, ctx.path  # type: ignore[attr-defined]
    return *_backward_op(do, q, k, v, out, lse, q_tiles, k_tiles, *settings), None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


# --- the public function


def _check(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, path: str) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.size(2) != k.size(2):
        raise ValueError(
            "expected q [Tq, N, H] and k, v [Tk, K, H], got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.size(2) not in HEAD_DIMS:
        raise ValueError(f"head dimension {q.size(2)}, expected one of {HEAD_DIMS}")
    if k.size(1) == 0 or q.size(1) % k.size(1):
        raise ValueError(f"{q.size(1)} query heads cannot share {k.size(1)} KV heads")
    if (q.size(0), k.size(0)) != (plan.num_queries, plan.num_keys) or q.size(0) == 0:
        raise ValueError(
            f"q holds {q.size(0)} and k {k.size(0)} tokens, the plan {plan.num_queries} and {plan.num_keys}"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(f"expected one dtype of bf16, fp16, fp32, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device == plan.q_tiles.device:
        raise ValueError(
            f"q is on {q.device}, k on {k.device}, v on {v.device}, the plan on {plan.q_tiles.device}"
        )
    if not scale > 0:
        raise ValueError(f"scale must be greater than 0, got {scale}")
    if path not in PATHS:
        raise ValueError(f"path {path!r}, expected one of {PATHS}")
    if INTERPRETED and q.device.type != "cpu":
        raise ValueError(
            f"tensors on {q.device}, but TRITON_INTERPRET=1 interprets the kernels on CPU tensors"
        )
    if not INTERPRETED and (q.device.type != "cuda" or q.dtype == torch.float32):
        raise ValueError(
            f"{q.dtype} on {q.device}: compiled kernels take bf16 and fp16 on CUDA; CPU tensors and fp32 "
            "need the interpreter (TRITON_INTERPRET=1 before triton is imported)"
        )


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    deterministic: bool = False,
    path: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(out [Tq, N, H] in q's dtype, logsumexp of the scaled scores fp32 [N, Tq]) of one packed row.

    q [Tq, N, H]; k, v [Tk, K, H], K dividing N; bf16 or fp16 (fp32 in the interpreter); H in HEAD_DIMS; any
    strides (layouts a descriptor cannot read are copied). plan: from `make_plan`, for these Tq and Tk and on
    this device. scale: of the scores, 1 / sqrt(H) if None. Differentiable in q, k and v, not through the
    logsumexp. deterministic: gradients equal to the last bit from run to run, for 7 products instead of 5
    (else only dQ, summed by atomics, may differ). path: "triton" for the portable kernels, "hopper" for the
    forward of `attention_hopper` or ValueError, "auto" for the fastest that fits. Values must be finite: one
    document's NaN may reach the next. ValueError on anything else.
    """
    scale = 1.0 / math.sqrt(q.size(-1)) if scale is None else scale
    _check(q, k, v, plan, scale, path)
    out, lse = _forward_op(q, k, v, plan.q_tiles, plan.k_tiles, scale, deterministic, path)
    return out, lse.detach()


# --- reference


def flash_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`flash_attention` in plain PyTorch, in its input's dtype (float64 too), document by document; the
    logsumexp is in that dtype."""
    scale = 1.0 / math.sqrt(q.size(-1)) if scale is None else scale
    group = q.size(1) // k.size(1)
    k_NTH, v_NTH = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    outs, lses = [], []
    for piece in plan.pieces:
        q_NTH = q[piece.q_start : piece.q_stop].transpose(0, 1)
        keys = slice(piece.k_start, piece.k_stop)
        scores = (q_NTH @ k_NTH[:, keys].transpose(1, 2)) * scale
        if plan.causal:
            position = torch.arange(piece.q_start, piece.q_stop, device=q.device) + piece.offset
            later = torch.arange(piece.k_start, piece.k_stop, device=q.device) > position[:, None]
            scores = scores.masked_fill(later, float("-inf"))
        outs.append((scores.softmax(-1) @ v_NTH[:, keys]).transpose(0, 1))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)
