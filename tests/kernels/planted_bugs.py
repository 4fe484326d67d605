"""Bugs to plant in the kernels (`python -m tests.kernels.drills`), and the tests that must see them."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("attention", "plan", "hopper", "head")


@dataclass(frozen=True)
class Bug:
    """In `file` of phi4r_kernels, `old` (found once) becomes `new`. tests: FILE or FILE::EXPRESSION as
    pytest's -k takes it."""

    part: str
    name: str
    file: str
    old: str
    new: str
    tests: str


def _bugs(part: str, file: str, tests: str, *bugs: tuple[str, str, str]) -> list[Bug]:
    return [Bug(part, name, file, old, new, tests) for name, old, new in bugs]


COLUMNS = """k_col, v_col = head // GROUP * k_head, head // GROUP * v_head
    q = q_desc.load([q_start, head * q_head])
"""
ATTENTION = "tests/kernels/test_attention.py"
BUGS = (
    _bugs(
        "attention",
        "attention_kernels.py",
        ATTENTION,
        (
            "forward: a query sees the key after its own",
            "keys[None, :] <= last[:, None], s, float",
            "keys[None, :] <= last[:, None] + 1, s, float",
        ),
        (
            "forward: a query does not see its own key",
            "keys[None, :] <= last[:, None], s, float",
            "(keys[None, :] < last[:, None]) | (keys[None, :] == 0), s, float",
        ),
        (
            "forward: the end of the document is not masked",
            "rows = q_start + tl.arange(0, BM)\n    last = tl.minimum(rows + offset, k_stop - 1)",
            "rows = q_start + tl.arange(0, BM)\n    last = rows + offset",
        ),
        (
            "forward: the position of a rank's chunk is ignored",
            "rows = q_start + tl.arange(0, BM)\n    last = tl.minimum(rows + offset, k_stop - 1)",
            "rows = q_start + tl.arange(0, BM)\n    last = tl.minimum(rows, k_stop - 1)",
        ),
        (
            "forward: the blocks at the diagonal are not masked",
            "unmasked, k_stop, last, qk_scale, BN, True\n    )\n    inside",
            "unmasked, k_stop, last, qk_scale, BN, False\n    )\n    inside",
        ),
        (
            "forward: the last block of keys is left out",
            "unmasked, k_stop, last, qk_scale, BN, True\n    )\n    inside",
            "unmasked, tl.maximum(k_stop - BN, unmasked + 1), last, qk_scale, BN, True\n    )\n    inside",
        ),
        ("forward: out is not rescaled to a new maximum", "        acc = acc * decay[:, None]\n", ""),
        (
            "forward: the sum is not rescaled to a new maximum",
            "total * decay + tl.sum(p, 1)",
            "total + tl.sum(p, 1)",
        ),
        (
            "forward: no maximum is subtracted",
            "new_peak = tl.maximum(peak, tl.max(s, 1) * qk_scale)",
            "new_peak = tl.zeros_like(peak)",
        ),
        (
            "forward: logsumexp without the maximum",
            "lse = (peak + tl.math.log2(total)) * LN2",
            "lse = tl.math.log2(total) * LN2",
        ),
        (
            "forward: logsumexp in base 2",
            "lse = (peak + tl.math.log2(total)) * LN2",
            "lse = peak + tl.math.log2(total)",
        ),
        (
            "forward: query heads are dealt out to KV heads in turns",
            COLUMNS + "    acc",
            "kv_head = head % (num_heads // GROUP)\n    k_col, v_col = kv_head * k_head, kv_head * v_head\n"
            "    q = q_desc.load([q_start, head * q_head])\n    acc",
        ),
        (
            "forward: values read with the keys' stride",
            COLUMNS + "    acc",
            "k_col, v_col = head // GROUP * k_head, head // GROUP * k_head\n"
            "    q = q_desc.load([q_start, head * q_head])\n    acc",
        ),
        (
            "forward: rows behind a document's end are stored",
            "    inside = rows < q_stop\n    out = acc",
            "    inside = rows < num_queries\n    out = acc",
        ),
        (
            "heads of later sections are those of the first",
            "program // per_section * section + rest % section",
            "rest % section",
        ),
        ("backward: delta is not subtracted in dK", "(dp_t - delta[None, :])", "dp_t"),
        ("backward: delta is not subtracted in dQ", "(dp - delta[:, None])", "dp"),
        (
            "backward: delta reads the gradient as if it were packed",
            "(far * do_row + head * do_head)[:, None]",
            "(far * num_heads + head)[:, None] * H",
        ),
        (
            "backward: a key does not see its own query",
            "keys[:, None] <= (rows + offset)[None, :], p_t",
            "keys[:, None] < (rows + offset)[None, :], p_t",
        ),
        (
            "backward: a key sees the query before its own",
            "keys[:, None] <= (rows + offset)[None, :], p_t",
            "keys[:, None] <= (rows + offset)[None, :] + 1, p_t",
        ),
        (
            "backward: the position of a rank's chunk is ignored",
            "keys[:, None] <= (rows + offset)[None, :], p_t",
            "keys[:, None] <= rows[None, :], p_t",
        ),
        (
            "backward: queries behind a document's end count",
            'lse = tl.load(lse_ptr + head_row + rows, mask=inside, other=float("inf")) * LOG2E\n        s_t',
            "lse = tl.load(lse_ptr + head_row + rows, mask=inside, other=0.0) * LOG2E\n        s_t",
        ),
        (
            "backward: keys behind a document's end count",
            "keys = tl.where(rows < k_stop, rows, NEVER)",
            "keys = rows",
        ),
        (
            "backward: a tile that ends inside its block is not masked",
            "        masked = tl.where(k_stop - k_start < BN, q_stop, masked)\n",
            "",
        ),
        (
            "backward: masking stops a block early",
            "q_start + tl.cdiv(masked, BM) * BM",
            "q_start + masked // BM * BM",
        ),
        (
            "backward: a rank's second chunk is not taken",
            "side, head = entry + 2 + part % 2 * 3,",
            "side, head = entry + 2,",
        ),
        (
            "backward: query heads are dealt out to KV heads in turns",
            "kv_head * GROUP + part // 2\n",
            "kv_head + part // 2 * num_kv_heads\n",
        ),
        (
            "backward: the last query head of a group is left out",
            "tl.range(0, 2 * GROUP)",
            "tl.range(0, 2 * GROUP - 2)",
        ),
        ("backward: dK without the scale", "(dk * scale)", "dk"),
        ("backward: dQ without the scale, deterministic", "(dq * scale)", "dq"),
        ("backward: dQ without the scale, fused", "(sums * scale)", "sums"),
        (
            "backward: dQ is added twice",
            "            dq_desc.atomic_add([sum_row + m, 0], dq)\n",
            "            dq_desc.atomic_add([sum_row + m, 0], dq)\n"
            "            dq_desc.atomic_add([sum_row + m, 0], dq)\n",
        ),
        ("backward: dQ of all heads lands on the first", "[sum_row + m, 0]", "[m, 0]"),
        (
            "backward: dQ reads keys behind the document",
            "    last = tl.minimum(rows + offset, k_stop - 1)\n    " + COLUMNS + "    do",
            "    last = rows + offset\n    " + COLUMNS + "    do",
        ),
        (
            "backward: dQ sees the key after its own",
            "keys[None, :] <= last[:, None], p, 0.0",
            "keys[None, :] <= last[:, None] + 1, p, 0.0",
        ),
        (
            "backward: dQ reads values with the keys' stride",
            COLUMNS + "    do",
            "k_col, v_col = head // GROUP * k_head, head // GROUP * k_head\n"
            "    q = q_desc.load([q_start, head * q_head])\n    do",
        ),
        (
            "backward: dK reads values with the keys' stride",
            "v_desc.load([k_start, kv_head * v_head])",
            "v_desc.load([k_start, kv_head * k_head])",
        ),
    )
    + _bugs(
        "attention",
        "attention.py",
        ATTENTION,
        ("deterministic gradients are summed by atomics", "    if deterministic:\n", "    if False:\n"),
        (
            "a scale that was asked for is ignored in the backward",
            "    delta = _launch_delta(out, do)\n    if",
            "    delta, scale = _launch_delta(out, do), q.size(2) ** -0.5\n    if",
        ),
        (
            "the queries' stride is used for the gradient",
            "do.stride(1), scale, scale * math.log2(math.e),\n        GROUP=group, H=dim, BM=launch",
            "q.stride(1), scale, scale * math.log2(math.e),\n        GROUP=group, H=dim, BM=launch",
        ),
        (
            "layouts that no descriptor can read are not copied",
            "return x if fits and aligned else",
            "return x if fits else",
        ),
        (
            "the logsumexp's fake has the inputs' dtype",
            "q.new_empty(q.size(1), q.size(0), dtype=torch.float32)",
            "q.new_empty(q.size(1), q.size(0))",
        ),
        (
            "sections of heads that do not divide them",
            "if num_kv_heads % d == 0 and d <= fitting",
            "if d <= fitting",
        ),
    )
    + _bugs(
        "plan",
        "attention_plan.py",
        ATTENTION,
        (
            "keys begin at the row's start, not the document's",
            "(lo, hi, piece.offset, piece.k_start, first + 1,",
            "(lo, hi, piece.offset, 0, first + 1,",
        ),
        (
            "one key too many is not masked",
            "piece.k_start, first + 1, last + 1",
            "piece.k_start, first + 2, last + 1",
        ),
        ("the last key is left out", "first + 1, last + 1, 0, 0", "first + 1, max(last, first + 1), 0, 0"),
        (
            "a key tile's first query comes too late",
            "max(piece.q_start, lo - piece.offset)",
            "max(piece.q_start, lo - piece.offset + 1)",
        ),
        ("the second chunk stands where the first does", "stop, q_offsets[1])", "stop, q_offsets[0])"),
        (
            "keys of documents without queries have no tile",
            "    for start, stop in itertools.pairwise(bounds_k):\n",
            "    for start, stop in (b for b in itertools.pairwise(bounds_k) if b[0] in of_document):\n",
        ),
        (
            "short documents start first",
            "np.argsort(table[:, 3] - table[:, 5]",
            "np.argsort(table[:, 5] - table[:, 3]",
        ),
        ("the diagonal is not counted", "(first + last) * count // 2", "(first + last - 2) * count // 2"),
    )
)

HOPPER = "tests/kernels/test_attention_hopper.py::chunks or sections or overflow or 5-True or 5-False"
BUGS += _bugs(
    "hopper",
    "attention_hopper_kernel.py",
    HOPPER,
    (
        "the producer does not wait for an empty key slot",
        "            mbarrier.wait(k_empty.index(slot), free)\n",
        "",
    ),
    (
        "the producer does not wait for an empty value slot",
        "            mbarrier.wait(v_empty.index(slot), free)\n",
        "",
    ),
    (
        "the producer does not wait until the queries were read",
        "        mbarrier.wait(q_empty, (turn & 1) ^ 1)\n",
        "",
    ),
    (
        "empty slots awaited with the other parity",
        "free = (block // STAGES & 1) ^ 1",
        "free = block // STAGES & 1",
    ),
    (
        "queries awaited with the parity of the first turn",
        "mbarrier.wait(q_full, turn & 1)",
        "mbarrier.wait(q_full, 0)",
    ),
    (
        "keys awaited with the parity of the first round",
        "mbarrier.wait(k_full.index(slot), (block + j) // STAGES & 1)",
        "mbarrier.wait(k_full.index(slot), 0)",
    ),
    (
        "the last values are not awaited",
        "        mbarrier.wait(v_full.index(tail), (block - 1) // STAGES & 1)\n",
        "",
    ),
    (
        "the first keys are not awaited",
        "        mbarrier.wait(k_full.index(block % STAGES), block // STAGES & 1)\n",
        "",
    ),
    (
        "the last values' slot is not given back",
        "        mbarrier.arrive(v_empty.index(tail), count=1)\n",
        "",
    ),
    (
        "one consumer's word is enough to empty the keys",
        "mbarrier.init(k_empty.index(slot), count=2)",
        "mbarrier.init(k_empty.index(slot), count=1)",
    ),
    (
        "values read from this block's slot, not from the one before",
        "before = (block + j - 1) % STAGES",
        "before = (block + j) % STAGES",
    ),
    (
        "the slots of a later item begin at 0 again",
        "        block += num_blocks\n        tail = (block - 1) % STAGES",
        "        block = num_blocks\n        tail = (block - 1) % STAGES",
    ),
    (
        "the values' slot is given back before the product is done",
        "        acc, p = warpgroup_mma_wait(0, [acc, p])\n"
        "        mbarrier.arrive(v_empty.index(before), count=1)\n",
        "        mbarrier.arrive(v_empty.index(before), count=1)\n"
        "        acc, p = warpgroup_mma_wait(0, [acc, p])\n",
    ),
    (
        "the last block of keys is left out",
        "num_blocks = gl.cdiv(k_stop - k_start, BN)",
        "num_blocks = gl.maximum((k_stop - k_start) // BN, 1)",
    ),
    (
        "the blocks at the diagonal are not masked",
        "k_start, last, qk_scale, S_LAYOUT, O_LAYOUT, BM, BN, STAGES, True,",
        "k_start, last, qk_scale, S_LAYOUT, O_LAYOUT, BM, BN, STAGES, False,",
    ),
    (
        "a query sees the key after its own",
        "keys[None, :] <= last[:, None]",
        "keys[None, :] <= last[:, None] + 1",
    ),
    (
        "the end of the document is not masked",
        "last = gl.minimum(rows + offset, k_stop - 1)",
        "last = rows + offset",
    ),
    (
        "the position of a rank's chunk is ignored",
        "last = gl.minimum(rows + offset, k_stop - 1)",
        "last = gl.minimum(rows, k_stop - 1)",
    ),
    (
        "out is not rescaled to a new maximum",
        "        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, O_LAYOUT))[:, None]\n",
        "",
    ),
    ("logsumexp without the maximum", "lse = (peak + gl.log2(total)) * LN2", "lse = gl.log2(total) * LN2"),
    (
        "no maximum is subtracted",
        "new_peak = gl.maximum(peak, gl.max(s, 1) * qk_scale)",
        "new_peak = gl.maximum(peak, 0.0)",
    ),
    (
        "both consumers take the first half of the queries",
        "q = q_buf.slice(half * BM, BM)",
        "q = q_buf.slice(0, BM)",
    ),
    (
        "query heads are dealt out to KV heads in turns",
        "k_col, v_col = head // GROUP * k_head, head // GROUP * v_head",
        "k_col, v_col = head % (num_heads // GROUP) * k_head, head % (num_heads // GROUP) * v_head",
    ),
    ("values read with the keys' stride", "head // GROUP * v_head", "head // GROUP * k_head"),
    (
        "rows behind a document's end are stored",
        "mask=(out_rows < q_stop)[:, None]",
        "mask=(out_rows < num_queries)[:, None]",
    ),
    (
        "heads of later sections are those of the first",
        "index // per_section * section + rest % section",
        "rest % section",
    ),
    ("a program takes one item too many", "position < rest, 1, 0", "position < rest, 1, 1"),
    ("a program takes one item too few", "position < rest, 1, 0", "position < rest, 0, 0"),
)

COMBINATIONS = "tests/kernels/test_linear_loss.py::every_combination and off_policy"
LOSS = "tests/kernels/test_linear_loss.py"
BUGS += (
    _bugs(
        "head",
        "linear_loss/elementwise_torch.py",
        COMBINATIONS,
        ("the entropy's gradient without + H", "logp_CV.add_(entropy_C[:, None]).mul_(", "logp_CV.mul_("),
        (
            "the gradient of the logits is not divided by the temperature",
            "coef_C, entropy_coef_C = coef_C * scale, entropy_coef_C * scale",
            "pass",
        ),
    )
    + _bugs(
        "head",
        "linear_loss/tokens.py",
        COMBINATIONS,
        (
            "GSPO: the gradient is not divided by the length",
            "_OverSequences.apply(grads[0].contiguous(), *ctx.options), None",
            "_OverSequences.apply(grads[0].contiguous(), *ctx.options[:2], False), None",
        ),
        (
            "GSPO: the gradient of a token is its own alone",
            "_OverSequences.apply(grads[0].contiguous(), *ctx.options), None",
            "grads[0], None",
        ),
    )
    + _bugs(
        "head",
        "linear_loss/head.py",
        COMBINATIONS,
        (
            "the derivative by the entropy is left out",
            "found.entropy_matters |= slopes[1] is not None",
            "pass",
        ),
        (
            "strictly on-policy, where old log-probs are given",
            'terms.setdefault("old_logprobs", logprobs_C.detach())',
            'terms["old_logprobs"] = logprobs_C.detach()',
        ),
    )
    + _bugs(
        "head",
        "linear_loss/head.py",
        f"{LOSS}::wherever_chunks_end",
        (
            "a sequence longer than a chunk is taken chunk by chunk",
            "yield from ((slice(a, b), True)",
            "yield from ((slice(a, b), False)",
        ),
    )
    + _bugs(
        "head",
        "linear_loss/head.py",
        f"{LOSS}::any_shape",
        (
            "grad_weight is set by each chunk, not added to",
            "        torch.addmm(total, a, b, out=total)\n    elif not",
            "        torch.mm(a, b, out=total)\n    elif not",
        ),
    )
    + _bugs(
        "head",
        "linear_loss/head.py",
        f"{LOSS}::upstream",
        ("the backward forgets the upstream gradient", "            grad_weight_VD.mul_(grads[0])\n", ""),
    )
    + _bugs(
        "head",
        "linear_loss/head.py",
        f"{LOSS}::three_for_a_step or hold_anything",
        (
            "tokens without weight stay in the products",
            "    if len(rows_N) == len(weights_T):",
            "    if len(rows_N) <= len(weights_T):",
        ),
    )
    + _bugs(
        "head",
        "linear_loss/head.py",
        f"{LOSS}::no_full_logits and torch",
        ("logits of all tokens at once", "    size = job.chunk_size\n", "    size = 10**9\n"),
    )
    + _bugs(
        "head",
        "linear_loss/head.py",
        f"{LOSS}::three_for_a_step",
        (
            "log-probs are worked out twice",
            "            logprob_C, entropy_C, max_C, log_sum_C = job.softmax(",
            "            logits_CV = job.logits(hidden_CD)\n"
            "            logprob_C, entropy_C, max_C, log_sum_C = job.softmax(",
        ),
    )
    + _bugs(
        "head",
        "linear_loss/elementwise_triton.py",
        f"{LOSS}::longer_than_a_block",
        (
            "kernel: the sum is not rescaled to a new maximum",
            "        total = keep * total + tl.sum(p, 0)",
            "        total = total + tl.sum(p, 0)",
        ),
        (
            "kernel: the entropy's sum is not shifted",
            "            weighted = keep * (weighted + shift * total) + tl.sum(p * d, 0)",
            "            weighted = keep * weighted + tl.sum(p * d, 0)",
        ),
        (
            "kernel: the target's column is left out of the gradient",
            " + tl.where(columns == target, coef, 0.0)",
            "",
        ),
    )
    + _bugs(
        "head",
        "linear_loss/elementwise_triton.py",
        f"{LOSS}::fused_loss_of_a_token and off_policy",
        (
            "kernel: no bound on log ratios",
            "    value = tl.where(difference > BOUND, BOUND, difference)",
            "    value = difference",
        ),
        (
            "kernel: a clipped ratio keeps its gradient",
            "((ratio >= low) & (ratio <= high)) | (plain < clipped)",
            "((ratio >= low) & (ratio <= high)) | (plain == plain)",
        ),
        (
            "kernel: dual clip stops the value, not the gradient",
            "            slope = tl.where(stopped, 0.0, slope)\n",
            "",
        ),
        (
            "kernel: importance weights are not truncated",
            "tl.where(importance > importance_cap, importance_cap, importance)",
            "importance",
        ),
        (
            "kernel: KL to the reference takes the old policy",
            "held, moving = _bounded(logprob - ref)",
            "held, moving = _bounded(logprob - old)",
        ),
    )
    + _bugs(
        "head",
        "linear_loss/elementwise_triton.py",
        f"{LOSS}::nearby_policies",
        (
            "kernel: k3 as exp(-d) - 1 + d everywhere",
            "tl.where(tl.abs(d) < 0.5, d * d * (0.5 - series), tl.exp(-d) - 1.0 + d)",
            "tl.exp(-d) - 1.0 + d + 0.0 * series",
        ),
    )
)
