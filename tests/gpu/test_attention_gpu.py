"""Packed attention on a GPU, compiled: both forward paths and the backward against float64, at slices of
Phi-4's shapes; bit-identical reruns; torch.compile and CUDA graphs.

Needs torch, triton, numpy and pytest only. Budget of an output: twice the error of the same formula in plain
PyTorch in the kernel's dtype (largest norm), plus one ulp of the largest value. Written without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from phi4r_kernels import attention_hopper
from phi4r_kernels.attention import flash_attention, flash_attention_ref
from phi4r_kernels.attention_plan import AttentionPlan, make_plan

pytestmark = pytest.mark.gpu

NAMES = ("out", "lse", "dq", "dk", "dv")
HEADS = (8, 2)
"""Query and KV heads: Phi-4's groups of four."""

ROWS = {
    "one long document": [2048],
    "ragged documents": [1, 2, 127, 128, 129, 300, 3, 640],
    "one giant and many small": [1500, *[17] * 20, 90],
    "tail of one token": [128, 257],
}


def bounds_of(lengths: Sequence[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def plan_of(lengths: Sequence[int], causal: bool = True) -> AttentionPlan:
    return make_plan(bounds_of(lengths), bounds_of(lengths), causal=causal, device="cuda")


def inputs_of(num_queries: int, num_keys: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of out."""
    shapes = [(num_queries, HEADS[0], dim), *[(num_keys, HEADS[1], dim)] * 2, (num_queries, HEADS[0], dim)]
    return [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]


def values_of(
    function: object, inputs: Sequence[Tensor], plan: AttentionPlan, **options: object
) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out, lse = function(q, k, v, plan, **options)  # type: ignore[operator]
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]


def assert_within_budget(found: Sequence[Tensor], inputs: Sequence[Tensor], plan: AttentionPlan) -> None:
    exact = values_of(flash_attention_ref, [x.double() for x in inputs], plan)
    eager = values_of(flash_attention_ref, inputs, plan)
    for name, value, truth, plain in zip(NAMES, found, exact, eager, strict=True):
        ulp = torch.finfo(value.dtype).eps * truth.abs().max()
        budget = 2 * (plain.double() - truth).abs().max() + ulp
        error = (value.double() - truth).abs().max()
        assert error <= budget, f"{name}: off by {error:.3e}, budget {budget:.3e}"


def on_hopper() -> bool:
    return torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture(params=["triton", "hopper"])
def path(request: pytest.FixtureRequest) -> str:
    if request.param == "hopper" and not on_hopper():
        pytest.skip("the Hopper path is for compute capability 9.0")
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_hopper_path_is_taken_on_hopper(dim: int, dtype: torch.dtype) -> None:
    if not on_hopper():
        pytest.skip("the Hopper path is for compute capability 9.0")
    assert attention_hopper.reason(torch.empty(1, 4, dim, device="cuda", dtype=dtype)) == ""


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_documents_agree_with_float64(
    path: str, dtype: torch.dtype, dim: int, lengths: list[int], causal: bool
) -> None:
    plan = plan_of(lengths, causal)
    inputs = inputs_of(sum(lengths), sum(lengths), dim, dtype)
    for deterministic in (False, True):
        found = values_of(flash_attention, inputs, plan, path=path, deterministic=deterministic)
        assert_within_budget(found, inputs, plan)


def test_a_ranks_two_chunks_see_their_part_of_the_row(path: str) -> None:
    # Rank 1 of 2 in zig-zag order holds quarters 1 and 2 of a row of 1,200 tokens, against all keys.
    bounds_k, quarter = [0, 500, 1200], 300
    local = torch.cat([torch.arange(300, 600), torch.arange(600, 900)])
    bounds_q = [int((local < bound).sum()) for bound in bounds_k]
    plan = make_plan(
        bounds_q, bounds_k, causal=True, device="cuda", q_split=quarter, q_offsets=(quarter, quarter)
    )
    inputs = inputs_of(600, 1200, 128, torch.bfloat16)
    assert_within_budget(values_of(flash_attention, inputs, plan, path=path), inputs, plan)


def test_more_tiles_than_multiprocessors_are_all_computed(path: str) -> None:
    # 8 heads x 96 tiles: every program of the persistent kernel takes several, rings and barriers go round.
    lengths = [4096, 4096, 2048, *[100] * 20]
    plan = plan_of(lengths)
    q, k, v, _ = inputs_of(sum(lengths), sum(lengths), 128, torch.bfloat16)
    out, lse = flash_attention(q, k, v, plan, path=path)
    expected, expected_lse = flash_attention_ref(q.float(), k.float(), v.float(), plan)
    # p and out are rounded to bf16 once each; |out| <= max |v|.
    budget = 2 * torch.finfo(torch.bfloat16).eps * v.float().abs().max()
    assert (out.float() - expected).abs().max() <= budget
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)


def test_reruns_of_the_deterministic_backward_are_equal_to_the_last_bit(path: str) -> None:
    lengths = ROWS["ragged documents"]
    plan, inputs = plan_of(lengths), inputs_of(sum(lengths), sum(lengths), 128, torch.bfloat16)
    runs = [values_of(flash_attention, inputs, plan, path=path, deterministic=True) for _ in range(5)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_only_dq_of_the_fused_backward_may_differ_between_reruns(path: str) -> None:
    plan, inputs = plan_of([1024, 700]), inputs_of(1724, 1724, 128, torch.bfloat16)
    runs = [values_of(flash_attention, inputs, plan, path=path) for _ in range(5)]
    for run in runs[1:]:
        for name, a, b in zip(NAMES, run, runs[0], strict=True):
            assert name == "dq" or torch.equal(a, b), name


def test_torch_compile_gives_the_same_without_a_graph_break(path: str) -> None:
    lengths = ROWS["ragged documents"]
    plan, inputs = plan_of(lengths), inputs_of(sum(lengths), sum(lengths), 128, torch.bfloat16)

    def doubled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, plan, path=path, deterministic=True)[0] * 2

    results = []
    for function in (doubled, torch.compile(doubled, fullgraph=True)):
        q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
        out = function(q, k, v)
        results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])])
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)


def test_a_cuda_graph_replays_forward_and_backward_on_new_values(path: str) -> None:
    lengths = ROWS["ragged documents"]
    plan, inputs = plan_of(lengths), inputs_of(sum(lengths), sum(lengths), 128, torch.bfloat16)
    fixed = [x.clone() for x in inputs]

    def step() -> list[Tensor]:
        return values_of(flash_attention, fixed, plan, path=path, deterministic=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    fresh = inputs_of(sum(lengths), sum(lengths), 128, torch.bfloat16)
    for old, new in zip(fixed, fresh, strict=True):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    expected = values_of(flash_attention, fresh, plan, path=path, deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
