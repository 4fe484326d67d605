"""The forward of packed attention for Hopper, in Gluon: one warp copies, two warpgroups multiply.

Same formula, tables and outputs as `attention_kernels._attention_fwd_kernel`. A program stays on its
multiprocessor and takes its share of the query tiles, one after another. Its twelve warps are

    2 x 4  consumers: 64 queries each, 240 registers a thread; q k^T and p v by asynchronous wgmma
    1      producer: copies queries, keys and values into shared memory by TMA, as far ahead as there is room
    3      idle: warps come in groups of four

so that copies never wait for arithmetic. Within a consumer q k^T of one block of keys and p v of the block
before it are in flight together, and the softmax of the one runs under the p v of the other. A ring of STAGES
key blocks and one of STAGES value blocks connect them: `full` barriers are passed when a copy has arrived,
`empty` ones when both consumers have read a block. The n-th use of a ring's slot waits for parity
(n / STAGES) mod 2; a fresh barrier lets a wait for parity 1 pass.

Shared memory, H = 128: 32 KB queries, 2 x 2 x 32 KB keys and values, 16 KB in which outputs are rearranged,
96 bytes of barriers: 180,320 bytes. Gluon cannot be interpreted.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _share(num_items):
    """How many of the items this program takes: programs go up and down the list in turns (0 1 2 2 1 0 0 1
    2), so that with heavy items first everybody's sum is about the same."""
    programs, program = gl.num_programs(0), gl.program_id(0)
    rounds, rest = num_items // programs, num_items % programs
    position = gl.where(rounds % 2 == 0, program, programs - 1 - program)
    return rounds + gl.where(position < rest, 1, 0)


@gluon.jit
def _item(turn, num_tiles, section, tiles_ptr):
    """(entry of the tile table, head) of this program's `turn`-th item: sections of heads whose keys and
    values share the L2 cache, inside a section all heads of the heaviest tile first."""
    programs, program = gl.num_programs(0), gl.program_id(0)
    index = turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)
    per_section = num_tiles * section
    rest = index % per_section
    return tiles_ptr + rest // section * 8, index // per_section * section + rest % section


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty, tiles_ptr,
    num_tiles, section, num_heads, q_head, k_head, v_head,
    GROUP: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: for every item its queries, then keys and values block by block."""
    block = 0
    for turn in range(_share(num_tiles * num_heads)):
        entry, head = _item(turn, num_tiles, section, tiles_ptr)
        q_start, k_start, k_stop = gl.load(entry), gl.load(entry + 3), gl.load(entry + 5)
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [q_start, head * q_head], q_full, q_buf)
        k_col, v_col = head // GROUP * k_head, head // GROUP * v_head
        for n in range(k_start, k_stop, BN):
            slot = block % STAGES
            free = (block // STAGES & 1) ^ 1
            mbarrier.wait(k_empty.index(slot), free)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [n, k_col], k_full.index(slot), k_buf.index(slot))
            mbarrier.wait(v_empty.index(slot), free)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [n, v_col], v_full.index(slot), v_buf.index(slot))
            block += 1


@gluon.jit
def _softmax(s, peak, total, n, last, qk_scale, S_LAYOUT: gl.constexpr, MASKED: gl.constexpr):
    """(p, decay, peak, total): weights of a block of keys from n on, relative to the new running maximum, and
    by how much what was summed before shrinks. Row i sees keys up to last[i]; its first block shows it at
    least one, so the maximum is finite."""
    if MASKED:
        keys = n + gl.arange(0, s.shape[1], gl.SliceLayout(0, S_LAYOUT))
        s = gl.where(keys[None, :] <= last[:, None], s, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(s, 1) * qk_scale)
    p = gl.exp2(s * qk_scale - new_peak[:, None])
    decay = gl.exp2(peak - new_peak)
    return p, decay, new_peak, total * decay + gl.sum(p, 1)


@gluon.jit
def _consume_blocks(
    acc, p, peak, total, q, k_buf, v_buf, k_full, k_empty, v_full, v_empty, begin, end, block, k_start, last,
    qk_scale, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Blocks begin..end of a tile, whose block 0 is the `block`-th of the program: scores of this block and
    p v of the block before it are in flight together. p: weights of block begin - 1, not yet in acc."""
    for j in range(begin, end):
        slot = (block + j) % STAGES
        before = (block + j - 1) % STAGES
        mbarrier.wait(k_full.index(slot), (block + j) // STAGES & 1)
        s = warpgroup_mma(
            q, k_buf.index(slot).permute((1, 0)), gl.zeros([BM, BN], gl.float32, S_LAYOUT),
            use_acc=False, is_async=True,
        )  # fmt: skip
        mbarrier.wait(v_full.index(before), (block + j - 1) // STAGES & 1)
        acc = warpgroup_mma(p, v_buf.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, [s])
        mbarrier.arrive(k_empty.index(slot), count=1)
        weights, decay, peak, total = _softmax(
            s, peak, total, k_start + j * BN, last, qk_scale, S_LAYOUT, MASKED
        )
        acc, p = warpgroup_mma_wait(0, [acc, p])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, O_LAYOUT))[:, None]
        p = gl.convert_layout(weights.to(p.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
    return acc, p, peak, total


@gluon.jit
def _consume(
    half: gl.constexpr, q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    out_ptr, lse_ptr, tiles_ptr, num_tiles, section, num_queries, num_heads, qk_scale,
    H: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer: rows half * BM .. of every item's query tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // H, H // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = q_buf.dtype
    q = q_buf.slice(half * BM, BM)
    block = 0
    for turn in range(_share(num_tiles * num_heads)):
        entry, head = _item(turn, num_tiles, section, tiles_ptr)
        q_start, q_stop, offset = gl.load(entry), gl.load(entry + 1), gl.load(entry + 2)
        k_start, k_full_stop, k_stop = gl.load(entry + 3), gl.load(entry + 4), gl.load(entry + 5)
        num_blocks = gl.cdiv(k_stop - k_start, BN)
        num_full = gl.maximum((k_full_stop - k_start) // BN, 1)
        rows = q_start + half * BM + gl.arange(0, BM, gl.SliceLayout(1, S_LAYOUT))
        last = gl.minimum(rows + offset, k_stop - 1)

        peak = gl.full([BM], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        total = gl.zeros([BM], gl.float32, gl.SliceLayout(1, S_LAYOUT))
        mbarrier.wait(q_full, turn & 1)
        mbarrier.wait(k_full.index(block % STAGES), block // STAGES & 1)
        s = warpgroup_mma(
            q, k_buf.index(block % STAGES).permute((1, 0)), gl.zeros([BM, BN], gl.float32, S_LAYOUT),
            use_acc=False, is_async=True,
        )  # fmt: skip
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_empty.index(block % STAGES), count=1)
        weights, _, peak, total = _softmax(s, peak, total, k_start, last, qk_scale, S_LAYOUT, True)
        p = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
        acc = gl.zeros([BM, H], gl.float32, O_LAYOUT)
        acc, p, peak, total = _consume_blocks(
            acc, p, peak, total, q, k_buf, v_buf, k_full, k_empty, v_full, v_empty, 1, num_full, block,
            k_start, last, qk_scale, S_LAYOUT, O_LAYOUT, BM, BN, STAGES, False,
        )  # fmt: skip
        acc, p, peak, total = _consume_blocks(
            acc, p, peak, total, q, k_buf, v_buf, k_full, k_empty, v_full, v_empty, num_full, num_blocks,
            block, k_start, last, qk_scale, S_LAYOUT, O_LAYOUT, BM, BN, STAGES, True,
        )  # fmt: skip
        # All scores are there: the next item's queries may come while this one is written.
        mbarrier.arrive(q_empty, count=1)
        block += num_blocks
        tail = (block - 1) % STAGES
        mbarrier.wait(v_full.index(tail), (block - 1) // STAGES & 1)
        acc = warpgroup_mma(p, v_buf.index(tail), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, [acc, p])
        mbarrier.arrive(v_empty.index(tail), count=1)

        lse = (peak + gl.log2(total)) * LN2
        gl.store(lse_ptr + head.to(gl.int64) * num_queries + rows, lse, mask=rows < q_stop)
        out = acc / gl.convert_layout(total, gl.SliceLayout(1, O_LAYOUT))[:, None]
        out = gl.convert_layout(out.to(dtype), STORE)
        out_rows = q_start + half * BM + gl.arange(0, BM, gl.SliceLayout(1, STORE))
        cells = (out_rows.to(gl.int64) * num_heads + head)[:, None] * H
        cells = cells + gl.arange(0, H, gl.SliceLayout(0, STORE))[None, :]
        gl.store(out_ptr + cells, out, mask=(out_rows < q_stop)[:, None])


@gluon.jit
def _attention_fwd_hopper_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, tiles_ptr,
    num_tiles, section, num_queries, num_heads, q_head, k_head, v_head, qk_scale,
    GROUP: gl.constexpr, H: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """out [Tq, N, H] and lse [N, Tq] (natural logarithm) of all items, shared out among the programs. Launch
    with 4 warps: those of the first consumer; the others are added."""
    HALF: gl.constexpr = BM // 2
    q_buf = gl.allocate_shared_memory(q_desc.dtype, [BM, H], q_desc.layout)
    k_buf = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, H], k_desc.layout)
    v_buf = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BN, H], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_empty.index(slot), count=2)
    fence_async_shared()
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consume, (
                first, q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                out_ptr, lse_ptr, tiles_ptr, num_tiles, section, num_queries, num_heads, qk_scale,
                H, HALF, BN, STAGES,
            )),
            (_consume, (
                second, q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                out_ptr, lse_ptr, tiles_ptr, num_tiles, section, num_queries, num_heads, qk_scale,
                H, HALF, BN, STAGES,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, tiles_ptr, num_tiles, section, num_heads, q_head, k_head, v_head, GROUP, BN, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
