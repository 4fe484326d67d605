"""Triton kernels of packed attention: forward, dK/dV (with or without dQ), dQ alone, and two small ones.

Formula, per query head n of KV head n // GROUP, in fp32 whatever the inputs:

    s = scale q k^T,  lse = log sum exp s,  p = exp(s - lse),  out = p v
    delta = sum(out do),  dp = do v^T,  ds = p (dp - delta)
    dv = p^T do,  dk = scale ds^T q,  dq = scale ds k

exp is exp2 with scale log2(e) folded into one factor. Programs take tiles from the plan's tables (see
`attention_plan`), so that a program never meets two documents; only tiles on the diagonal or at the end of a
document are masked, per row by the last key it may see. In the tables of an attention that is not causal
every query stands far behind the last key, so the kernels know nothing of it.

q, k, v and do come as 2-D descriptors: rows are tokens, columns the heads; Hopper and newer load them by TMA,
for Ampere Triton turns them into masked loads. What is loaded beyond a document's end belongs to the next
one: it is finite and meets a p or ds of exactly 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(2**31 - 1)
"""A key position no query has reached."""


# --- kernels


@triton.jit
def _tile_and_head(num_tiles, section):
    """(tile, head) of this program: sections of heads whose keys and values share the L2 cache, inside a
    section all heads of the heaviest tile first."""
    program = tl.program_id(0)
    per_section = num_tiles * section
    rest = program % per_section
    return rest // section, program // per_section * section + rest % section


@triton.jit
def _attention_fwd_keys(
    acc, total, peak, q, k_desc, v_desc, k_col, v_col, begin, end, last, qk_scale,
    BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add keys begin..end to the running (acc, total, peak) of a query tile; row i sees up to last[i]."""
    for n in tl.range(begin, end, BN):
        k = k_desc.load([n, k_col])
        s = tl.dot(q, k.T)
        if MASKED:
            keys = n + tl.arange(0, BN)
            s = tl.where(keys[None, :] <= last[:, None], s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1) * qk_scale)
        p = tl.math.exp2(s * qk_scale - new_peak[:, None])
        decay = tl.math.exp2(peak - new_peak)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        v = v_desc.load([n, v_col])
        acc = tl.dot(p.to(v.dtype), v, acc)
        peak = new_peak
    return acc, total, peak


@triton.jit
def _attention_fwd_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, tiles_ptr,
    num_tiles, section, num_queries, num_heads, q_head, k_head, v_head, qk_scale,
    GROUP: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One query tile of one query head: out [Tq, N, H] and lse [N, Tq] (natural logarithm). q_head, k_head,
    v_head: columns from one head to the next."""
    tile, head = _tile_and_head(num_tiles, section)
    entry = tiles_ptr + tile * 8
    q_start, q_stop, offset = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    k_start, k_full, k_stop = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    rows = q_start + tl.arange(0, BM)
    last = tl.minimum(rows + offset, k_stop - 1)
    k_col, v_col = head // GROUP * k_head, head // GROUP * v_head
    q = q_desc.load([q_start, head * q_head])
    acc = tl.zeros([BM, H], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    unmasked = k_start + (k_full - k_start) // BN * BN
    acc, total, peak = _attention_fwd_keys(
        acc, total, peak, q, k_desc, v_desc, k_col, v_col, k_start, unmasked, last, qk_scale, BN, False
    )
    acc, total, peak = _attention_fwd_keys(
        acc, total, peak, q, k_desc, v_desc, k_col, v_col, unmasked, k_stop, last, qk_scale, BN, True
    )
    inside = rows < q_stop
    out = acc / total[:, None]
    cells = (rows.to(tl.int64) * num_heads + head)[:, None] * H + tl.arange(0, H)[None, :]
    tl.store(out_ptr + cells, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    lse = (peak + tl.math.log2(total)) * LN2
    tl.store(lse_ptr + head.to(tl.int64) * num_queries + rows, lse, mask=inside)


@triton.jit
def _attention_delta_kernel(
    out_ptr, do_ptr, delta_ptr, num_queries, num_heads, do_row, do_head,
    H: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """delta [N, Tq] = sum over H of out do, in fp32."""
    rows, head = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    inside, dims, far = rows < num_queries, tl.arange(0, H), rows.to(tl.int64)
    out_cells = (far * num_heads + head)[:, None] * H + dims[None, :]
    do_cells = (far * do_row + head * do_head)[:, None] + dims[None, :]
    out = tl.load(out_ptr + out_cells, mask=inside[:, None], other=0.0).to(tl.float32)
    do = tl.load(do_ptr + do_cells, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(delta_ptr + head.to(tl.int64) * num_queries + rows, tl.sum(out * do, 1), mask=inside)


@triton.jit
def _attention_bwd_queries(
    dk, dv, k, v, q_desc, do_desc, dq_desc, lse_ptr, delta_ptr, q_col, do_col, head_row, sum_row,
    begin, end, q_stop, offset, keys, qk_scale,
    BM: tl.constexpr, FUSED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add queries begin..end of one head to dk and dv of a key tile and, if FUSED, its dQ to dq_desc."""
    for m in tl.range(begin, end, BM):
        rows = m + tl.arange(0, BM)
        inside = rows < q_stop
        q = q_desc.load([m, q_col])
        lse = tl.load(lse_ptr + head_row + rows, mask=inside, other=float("inf")) * LOG2E
        s_t = tl.dot(k, q.T)
        p_t = tl.math.exp2(s_t * qk_scale - lse[None, :])
        if MASKED:
            p_t = tl.where(keys[:, None] <= (rows + offset)[None, :], p_t, 0.0)
        do = do_desc.load([m, do_col])
        dv = tl.dot(p_t.to(do.dtype), do, dv)
        dp_t = tl.dot(v, do.T)
        delta = tl.load(delta_ptr + head_row + rows, mask=inside, other=0.0)
        ds_t = (p_t * (dp_t - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds_t, q, dk)
        if FUSED:
            dq = tl.dot(ds_t.T, k)
            dq_desc.atomic_add([sum_row + m, 0], dq)
    return dk, dv


@triton.jit
def _attention_bwd_kernel(
    q_desc, k_desc, v_desc, do_desc, dq_desc, dk_ptr, dv_ptr, lse_ptr, delta_ptr, tiles_ptr,
    num_tiles, section, num_queries, num_kv_heads, q_head, k_head, v_head, do_head, scale, qk_scale,
    GROUP: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """dK and dV [Tk, K, H] of BN keys of one KV head, one of the PARTS of a key tile, summed over the group's
    query heads in place; num_tiles counts the parts.
    FUSED: its part of dQ / scale is added to dq_desc, fp32 [N Tq, H], by one TMA reduction a step (5 products
    in all); rows beyond q_stop get zeros added. Else dq_desc is None."""
    tile, kv_head = _tile_and_head(num_tiles, section)
    entry = tiles_ptr + tile // PARTS * 8
    k_start = tl.load(entry) + tile % PARTS * BN
    k_stop = tl.minimum(tl.load(entry + 1), k_start + BN)
    rows = k_start + tl.arange(0, BN)
    keys = tl.where(rows < k_stop, rows, NEVER)
    k = k_desc.load([k_start, kv_head * k_head])
    v = v_desc.load([k_start, kv_head * v_head])
    dk = tl.zeros([BN, H], tl.float32)
    dv = tl.zeros([BN, H], tl.float32)
    for part in tl.range(0, 2 * GROUP):
        side, head = entry + 2 + part % 2 * 3, kv_head * GROUP + part // 2
        q_start, q_stop, offset = tl.load(side), tl.load(side + 1), tl.load(side + 2)
        head_row = head.to(tl.int64) * num_queries
        q_stop = tl.where(k_start < k_stop, q_stop, q_start)
        # Blocks whose first query stands at or behind the tile's last key are not masked; a tile that ends
        # inside its block always is.
        masked = tl.maximum(k_stop - 1 - offset - q_start, 0)
        masked = tl.minimum(q_start + tl.cdiv(masked, BM) * BM, q_stop)
        masked = tl.where(k_stop - k_start < BN, q_stop, masked)
        dk, dv = _attention_bwd_queries(
            dk, dv, k, v, q_desc, do_desc, dq_desc, lse_ptr, delta_ptr, head * q_head, head * do_head,
            head_row, head * num_queries, q_start, masked, q_stop, offset, keys, qk_scale, BM, FUSED, True,
        )  # fmt: skip
        dk, dv = _attention_bwd_queries(
            dk, dv, k, v, q_desc, do_desc, dq_desc, lse_ptr, delta_ptr, head * q_head, head * do_head,
            head_row, head * num_queries, masked, q_stop, q_stop, offset, keys, qk_scale, BM, FUSED, False,
        )  # fmt: skip
    cells = (rows.to(tl.int64) * num_kv_heads + kv_head)[:, None] * H + tl.arange(0, H)[None, :]
    inside = (rows < k_stop)[:, None]
    tl.store(dk_ptr + cells, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + cells, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _attention_dq_keys(
    dq, q, do, lse, delta, k_desc, v_desc, k_col, v_col, begin, end, last, qk_scale,
    BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add keys begin..end to dQ / scale of a query tile."""
    for n in tl.range(begin, end, BN):
        k = k_desc.load([n, k_col])
        p = tl.math.exp2(tl.dot(q, k.T) * qk_scale - lse[:, None])
        if MASKED:
            keys = n + tl.arange(0, BN)
            p = tl.where(keys[None, :] <= last[:, None], p, 0.0)
        v = v_desc.load([n, v_col])
        dp = tl.dot(do, v.T)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq)
    return dq


@triton.jit
def _attention_dq_kernel(
    q_desc, k_desc, v_desc, do_desc, dq_ptr, lse_ptr, delta_ptr, tiles_ptr,
    num_tiles, section, num_queries, num_heads, q_head, k_head, v_head, do_head, scale, qk_scale,
    GROUP: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dQ [Tq, N, H] of one query tile of one query head, in one order: the deterministic backward's second
    half."""
    tile, head = _tile_and_head(num_tiles, section)
    entry = tiles_ptr + tile * 8
    q_start, q_stop, offset = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    k_start, k_full, k_stop = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    rows = q_start + tl.arange(0, BM)
    inside = rows < q_stop
    last = tl.minimum(rows + offset, k_stop - 1)
    k_col, v_col = head // GROUP * k_head, head // GROUP * v_head
    q = q_desc.load([q_start, head * q_head])
    do = do_desc.load([q_start, head * do_head])
    head_row = head.to(tl.int64) * num_queries
    lse = tl.load(lse_ptr + head_row + rows, mask=inside, other=float("inf")) * LOG2E
    delta = tl.load(delta_ptr + head_row + rows, mask=inside, other=0.0)
    dq = tl.zeros([BM, H], tl.float32)
    unmasked = k_start + (k_full - k_start) // BN * BN
    dq = _attention_dq_keys(
        dq, q, do, lse, delta, k_desc, v_desc, k_col, v_col, k_start, unmasked, last, qk_scale, BN, False
    )
    dq = _attention_dq_keys(
        dq, q, do, lse, delta, k_desc, v_desc, k_col, v_col, unmasked, k_stop, last, qk_scale, BN, True
    )
    cells = (rows.to(tl.int64) * num_heads + head)[:, None] * H + tl.arange(0, H)[None, :]
    tl.store(dq_ptr + cells, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _attention_dq_cast_kernel(
    sum_ptr, dq_ptr, num_queries, num_heads, scale, H: tl.constexpr, BM: tl.constexpr
):
    """dQ [Tq, N, H] = scale times the fp32 sums [N, Tq, H] of the fused backward."""
    rows, head = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    inside, dims, far = (rows < num_queries)[:, None], tl.arange(0, H)[None, :], rows.to(tl.int64)
    sums = tl.load(sum_ptr + (head.to(tl.int64) * num_queries + far)[:, None] * H + dims, mask=inside)
    cells = (far * num_heads + head)[:, None] * H + dims
    tl.store(dq_ptr + cells, (sums * scale).to(dq_ptr.dtype.element_ty), mask=inside)
