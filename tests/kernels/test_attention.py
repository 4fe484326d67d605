"""Packed attention in Triton's interpreter, outputs and gradients, against float64.

Budget: an output may be off by twice what the same formula in plain PyTorch and the same dtype is off by (in
the largest norm), plus one ulp of the largest value. Uninitialised memory is NaN in all of these tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phi4r_kernels import attention
from phi4r_kernels.attention import flash_attention, flash_attention_ref
from phi4r_kernels.attention_plan import K_TILE, Q_TILE, AttentionPlan, make_plan
from phi4r_kernels.attention_tiles import TILES
from torch import Tensor

from phi4r.parallel import zigzag

RAGGED = [1, 2, Q_TILE - 1, Q_TILE, Q_TILE + 1, 3]
NAMES = ("out", "lse", "dq", "dk", "dv")
Values = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an output nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def bounds_of(lengths: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(lengths).tolist()]


def plan_of(lengths: Sequence[int], causal: bool = True) -> AttentionPlan:
    return make_plan(bounds_of(lengths), bounds_of(lengths), causal=causal, device="cpu")


def rank_plan(lengths: Sequence[int], cp: int, rank: int) -> tuple[AttentionPlan, Tensor]:
    """(plan, row positions of the local queries) of one rank of zig-zag context parallelism."""
    bounds = bounds_of(lengths)
    index = zigzag.local_index(bounds[-1], cp, rank)
    held = torch.searchsorted(index, torch.tensor(bounds)).tolist()
    size = len(index) // 2
    offsets = int(index[0]), int(index[size]) - size
    plan = make_plan(held, bounds, causal=True, device="cpu", q_split=size, q_offsets=offsets)
    return plan, index


def random_inputs(num_tokens: int, heads: tuple[int, int], dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of out, fresh in every run."""
    torch.manual_seed(torch.seed())
    shapes = [(num_tokens, heads[0], dim)] + [(num_tokens, heads[1], dim)] * 2 + [(num_tokens, heads[0], dim)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def values_of(function: object, inputs: Sequence[Tensor], plan: AttentionPlan, **options: object) -> Values:
    """Outputs and gradients of `function` on q, k, v and the gradient of out."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out, lse = function(q, k, v, plan, **options)  # type: ignore[operator]
    grads = torch.autograd.grad(out, (q, k, v), inputs[3])
    return dict(zip(NAMES, (out.detach(), lse.detach(), *grads)))


def assert_within_budget(
    found: Values, inputs: Sequence[Tensor], plan: AttentionPlan, scale: float | None = None
) -> None:
    exact_inputs = [x.double() for x in inputs]
    exact = values_of(flash_attention_ref, exact_inputs, plan, scale=scale)
    eager = values_of(flash_attention_ref, inputs, plan, scale=scale)
    largest = {name: value.abs().max().item() for name, value in exact.items()}
    # dQ and dK are sums of p (dp - delta) times k or q. Where dp and delta cancel (the one token of a
    # document: to nothing) an ulp of either remains, and each is a sum of products like out do.
    q, k, _, do = exact_inputs
    scale = scale or q.size(-1) ** -0.5
    terms = 2 * scale * (exact["out"] * do).abs().sum(-1).max().item()
    reach = {**largest, "dq": largest["dq"] + terms * k.abs().max().item()}
    reach["dk"] += terms * q.abs().max().item()
    # A score is a sum of products that may cancel; what it is rounded by is an ulp of their sizes.
    reach["lse"] += scale * (q.abs().flatten(0, 1) @ k.abs().flatten(0, 1).T).max().item()
    # Scores and logsumexp are fp32 in base 2: p made again from them is off by ulps of their size, not of 1.
    single = torch.finfo(torch.float32).eps
    again = {
        "out": 0.0,
        "lse": single,
        **dict.fromkeys(("dq", "dk", "dv"), 4 * single * (1 + largest["lse"])),
    }
    for name, value in found.items():
        # The kernels give the logsumexp in fp32, whatever the inputs.
        ulp = single if name == "lse" else torch.finfo(inputs[0].dtype).eps
        off = (eager[name].double() - exact[name]).abs().max().item()
        allowed = 2 * off + (ulp + again[name]) * reach[name]
        error = (value.double() - exact[name]).abs().max().item()
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"


CASES = [
    (torch.bfloat16, True, (4, 1), 64),
    (torch.bfloat16, False, (2, 2), 128),
    (torch.float16, True, (2, 1), 128),
    (torch.float32, True, (2, 1), 32),
    (torch.float32, False, (1, 1), 16),
]


@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "deterministic"])
@pytest.mark.parametrize(("dtype", "causal", "heads", "dim"), CASES)
@pytest.mark.proves(
    "Packed FlashAttention, forward and backward, stays within derived budgets",
    how="float64, in Triton's interpreter; memory poisoned with NaN",
)
def test_ragged_documents_come_out_within_the_budget(
    dtype: torch.dtype, causal: bool, heads: tuple[int, int], dim: int, deterministic: bool
) -> None:
    plan = plan_of(RAGGED, causal)
    inputs = random_inputs(sum(RAGGED), heads, dim, dtype)
    found = values_of(flash_attention, inputs, plan, deterministic=deterministic)
    assert_within_budget(found, inputs, plan)


@settings(max_examples=5, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 1)]),
    causal=st.booleans(),
    scale=st.floats(0.01, 1.0),
    deterministic=st.booleans(),
)
@pytest.mark.proves("The same for shapes drawn at random", how="float64, in Triton's interpreter")
def test_random_shapes_come_out_within_the_budget(
    lengths: list[int], heads: tuple[int, int], causal: bool, scale: float, deterministic: bool
) -> None:
    plan = plan_of(lengths, causal)
    inputs = random_inputs(sum(lengths), heads, 16, torch.float32)
    found = values_of(flash_attention, inputs, plan, deterministic=deterministic, scale=scale)
    assert_within_budget(found, inputs, plan, scale)


@pytest.mark.parametrize("arch", sorted(TILES))
@pytest.mark.parametrize("dim", [64, 128])
def test_the_blocks_of_every_architecture_come_out_within_the_budget(arch: int, dim: int) -> None:
    tiles = TILES[arch][dim]
    lengths = [150, 1, 40]
    plan, inputs = plan_of(lengths), random_inputs(sum(lengths), (2, 1), dim, torch.bfloat16)
    q, k, v, do = inputs
    out, lse = attention._launch_forward(q, k, v, plan.q_tiles, dim**-0.5, tiles.fwd)
    for deterministic in (False, True):
        grads = attention._launch_backward(
            do, q, k, v, out, lse, plan.q_tiles, plan.k_tiles, dim**-0.5, deterministic, tiles
        )
        assert_within_budget(dict(zip(NAMES, (out, lse, *grads))), inputs, plan)


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.proves(
    "Attention on the parts of context parallelism adds up to the whole",
    how="float64 of the whole row, derived budgets",
    layouts="cp 2, cp 4",
)
def test_the_ranks_of_context_parallelism_add_up_to_one_process(cp: int) -> None:
    # Documents that lie in one chunk, span several, begin or end on a cut, and are missing on some ranks.
    lengths = [64, 1, 200, 119, 128]
    inputs = random_inputs(sum(lengths), (2, 1), 32, torch.float32)
    q, k, v, do = inputs
    total = {name: torch.zeros_like(x) for name, x in zip(("out", "dq", "dk", "dv"), (q, q, k, v))}
    lse = torch.zeros(2, sum(lengths))
    for rank in range(cp):
        plan, index = rank_plan(lengths, cp, rank)
        part = values_of(flash_attention, [q[index], k, v, do[index]], plan, deterministic=rank % 2 == 1)
        for name in ("out", "dq"):
            total[name][index] += part[name]
        lse[:, index] += part["lse"]
        total["dk"] += part["dk"]
        total["dv"] += part["dv"]
    assert_within_budget({**total, "lse": lse}, inputs, plan_of(lengths))


@pytest.mark.proves(
    "Attention of a document does not depend on its row", how="the same document in two rows, to the last bit"
)
def test_a_document_does_not_depend_on_its_row() -> None:
    lengths = [70, 150, 5]
    inputs = random_inputs(sum(lengths), (2, 1), 64, torch.bfloat16)
    row = values_of(flash_attention, inputs, plan_of(lengths))
    inside = slice(70, 220)
    alone = values_of(flash_attention, [x[inside] for x in inputs], plan_of([150]))
    for name in NAMES:
        found = row[name][:, inside] if name == "lse" else row[name][inside]
        assert torch.equal(found, alone[name]), name


def test_deterministic_gradients_do_not_depend_on_the_order_of_tiles() -> None:
    lengths = [400, 60]  # three key tiles or more: two would add up to the same in either order
    plan = plan_of(lengths)
    backwards = dataclasses.replace(
        plan, q_tiles=plan.q_tiles.flip(0).contiguous(), k_tiles=plan.k_tiles.flip(0).contiguous()
    )
    inputs = random_inputs(sum(lengths), (2, 1), 64, torch.float32)
    found = [values_of(flash_attention, inputs, p, deterministic=True) for p in (plan, plan, backwards)]
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in NAMES)
    # dQ by atomics is a sum in the order of the tiles: this is what the deterministic mode is for.
    fused = [values_of(flash_attention, inputs, p) for p in (plan, backwards)]
    assert not torch.equal(fused[0]["dq"], fused[1]["dq"])
    assert torch.equal(fused[0]["dk"], fused[1]["dk"])


def test_slices_of_one_projection_need_no_copy_and_odd_layouts_get_one() -> None:
    plan = plan_of([90])
    fused = torch.randn(90, 4, 32)
    q, k, v = fused[:, :2], fused[:, 2:3], fused[:, 3:]
    assert attention._rows(v) is v
    odd = torch.randn(90, 2, 33)[:, :, 1:]
    assert attention._rows(odd).stride() == (64, 32, 1)
    do = torch.randn(2, 90, 32).transpose(0, 1)
    for query in (q, odd):
        inputs = [query, k, v, do]
        assert_within_budget(values_of(flash_attention, inputs, plan), inputs, plan)


@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "deterministic"])
def test_heads_may_lie_at_any_stride(deterministic: bool) -> None:
    plan = plan_of([70, 30])
    # From one head to the next: 32, 48, 64 and 96 elements, and none of them is copied.
    inputs = [
        torch.randn(100, heads, stride)[:, :, :32]
        for heads, stride in ((4, 48), (2, 64), (2, 32), (4, 96))
    ]  # fmt: skip
    assert all(attention._rows(x) is x for x in inputs)
    assert_within_budget(values_of(flash_attention, inputs, plan, deterministic=deterministic), inputs, plan)


@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "deterministic"])
def test_large_scores_do_not_overflow(deterministic: bool) -> None:
    lengths = [150, 40]
    plan, inputs = plan_of(lengths), random_inputs(sum(lengths), (2, 1), 16, torch.float32)
    inputs[0] *= 200  # scores of some hundreds: exp2 ends at 128
    found = values_of(flash_attention, inputs, plan, deterministic=deterministic)
    assert found["lse"].max() > 200
    assert_within_budget(found, inputs, plan)


@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "deterministic"])
def test_working_on_a_few_heads_at_a_time_changes_nothing(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [150, 40]
    plan, inputs = plan_of(lengths), random_inputs(sum(lengths), (6, 3), 16, torch.float32)
    at_once = values_of(flash_attention, inputs, plan, deterministic=deterministic)
    monkeypatch.setattr(attention, "L2_BYTES", 1)
    assert attention._query_section(*inputs[:2]) == 2
    in_turns = values_of(flash_attention, inputs, plan, deterministic=deterministic)
    assert all(torch.equal(at_once[name], in_turns[name]) for name in NAMES)


# --- torch operators


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_operators_are_what_torch_expects_of_them(deterministic: bool) -> None:
    plan = plan_of([20, 13])
    q, k, v, do = random_inputs(33, (2, 1), 16, torch.bfloat16)  # the logsumexp is fp32
    leaves = [x.requires_grad_() for x in (q, k, v)]
    settings_ = 0.25, deterministic, "auto"
    torch.library.opcheck(attention._forward_op, (*leaves, plan.q_tiles, plan.k_tiles, *settings_))
    with torch.no_grad():
        out, lse = attention._forward_op(q, k, v, plan.q_tiles, plan.k_tiles, *settings_)
    arguments = (do, q.detach(), k.detach(), v.detach(), out, lse, plan.q_tiles, plan.k_tiles, *settings_)
    torch.library.opcheck(attention._backward_op, arguments)


def test_it_compiles_into_one_graph_and_gives_the_same() -> None:
    plan = plan_of([20, 13])
    inputs = random_inputs(33, (2, 1), 16, torch.float32)

    def scaled(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        out, lse = flash_attention(q * 2, k, v, plan, deterministic=True)
        return out + 1, lse

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    expected, found = (values_of(function, inputs, plan) for function in (scaled, compiled))
    assert all(torch.equal(expected[name], found[name]) for name in NAMES)


# --- what is refused


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"q": torch.zeros(8, 3, 16)}, "cannot share"),
        (
            {"q": torch.zeros(8, 2, 24), "k": torch.zeros(8, 2, 24), "v": torch.zeros(8, 2, 24)},
            "dimension 24",
        ),
        ({"q": torch.zeros(7, 2, 16)}, "the plan 8"),
        ({"k": torch.zeros(9, 2, 16), "v": torch.zeros(9, 2, 16)}, "the plan 8"),
        ({"k": torch.zeros(8, 1, 16)}, "expected q"),
        ({"q": torch.zeros(16, 16)}, "expected q"),
        ({"q": torch.zeros(8, 2, 16, dtype=torch.float16)}, "one dtype"),
        ({"q": torch.zeros(8, 2, 16, device="meta")}, "meta"),
        ({"scale": 0.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"path": "fast"}, "path"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], word: str) -> None:
    arguments: dict[str, object] = {name: torch.zeros(8, 2, 16) for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=word):
        flash_attention(plan=plan_of([5, 3]), **{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bounds_q", "bounds_k", "word"),
    [
        ([0, 5], [0, 3, 5], "documents"),
        ([0, 5, 3], [0, 5, 6], "rise"),
        ([1, 5], [0, 5], "rise"),
        ([0], [0], "rise"),
        ([0, 5], [0, 4], "outside its keys"),
        ([0, 2, 5], [0, 5, 5], "no keys"),
        (torch.tensor([0, 5]), [0, 5], "tensor"),
    ],
)
def test_a_plan_of_impossible_documents_is_refused(
    bounds_q: Sequence[int], bounds_k: Sequence[int], word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        make_plan(bounds_q, bounds_k, causal=True, device="cpu")


# --- the plan


def pairs_of_tables(plan: AttentionPlan) -> tuple[np.ndarray, np.ndarray]:
    """How often each (query, key) pair is visited by the query tiles and by the key tiles."""
    by_query, by_key = (np.zeros((plan.num_queries, plan.num_keys), int) for _ in range(2))
    for q_start, q_stop, offset, k_start, k_full, k_stop, *_ in plan.q_tiles.tolist():
        for q in range(q_start, q_stop):
            assert k_full <= q + offset + 1
            by_query[q, k_start : min(k_stop, q + offset + 1)] += 1
    for k_start, k_stop, *sides in plan.k_tiles.tolist():
        for q_start, q_stop, offset in (sides[:3], sides[3:]):
            for q in range(q_start, q_stop):
                by_key[q, k_start : min(k_stop, q + offset + 1)] += 1
    return by_query, by_key


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    causal=st.booleans(),
    cp=st.sampled_from([1, 2, 4]),
    data=st.data(),
)
def test_the_tables_visit_every_visible_pair_once(
    lengths: list[int], causal: bool, cp: int, data: st.DataObject
) -> None:
    if cp > 1:
        lengths = [*lengths, 2 * cp - sum(lengths) % (2 * cp)]
        plan, position = rank_plan(lengths, cp, data.draw(st.integers(0, cp - 1)))
    else:
        plan, position = plan_of(lengths, causal), torch.arange(sum(lengths))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible = document[position, None] == document[None]
    if plan.causal:
        visible &= torch.arange(len(document))[None] <= position[:, None]
    for pairs in pairs_of_tables(plan):
        np.testing.assert_array_equal(pairs, visible.numpy())
    assert plan.num_pairs == visible.sum()
    tiles = plan.k_tiles[:, :2].tolist()
    assert sorted(key for lo, hi in tiles for key in range(lo, hi)) == list(range(plan.num_keys))
    assert max(hi - lo for lo, hi in tiles) <= K_TILE


def test_long_documents_start_first() -> None:
    plan = plan_of([100, 2000, 300])
    keys = plan.q_tiles[:, 5] - plan.q_tiles[:, 3]
    queries = plan.k_tiles[:, 3] - plan.k_tiles[:, 2]
    assert keys.tolist() == sorted(keys.tolist(), reverse=True)
    assert queries.tolist() == sorted(queries.tolist(), reverse=True)
    assert keys[0] == queries[0] == 2000


def test_heads_worked_on_together_fit_the_cache_and_divide_the_heads() -> None:
    assert attention._section(10, 1) == 10
    assert attention._section(10, attention.L2_BYTES // 2) == 2
    assert attention._section(10, attention.L2_BYTES // 4) == 2
    assert attention._section(10, 2 * attention.L2_BYTES) == 1
