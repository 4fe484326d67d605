"""The Hopper forward's own code on simulated warps, copies and barriers, against float64.

fp16 inputs, since numpy knows them. Budget per element: p and the result are rounded to fp16 once each, of a
weighted mean of values, so two ulps of the mean of |v|, and one for the smallest.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
hopper_kernel = pytest.importorskip("phi4r_kernels.attention_hopper_kernel")

from phi4r_kernels.attention import flash_attention_ref  # noqa: E402
from phi4r_kernels.attention_plan import Q_TILE, AttentionPlan, make_plan  # noqa: E402
from torch import Tensor  # noqa: E402

from tests.kernels.gluon_simulator import Descriptor, Int, Pointer, launch  # noqa: E402

HEADS, KV_HEADS, DIM = 4, 2, 16


def _spread(x: Tensor, factor: int) -> np.ndarray:
    """x [T, heads, H] with heads factor * H apart, NaN between them."""
    wide = np.full((x.size(0), x.size(1), factor * DIM), np.nan, np.float16)
    wide[:, :, :DIM] = x.numpy()
    return wide


def simulated(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, num_programs: int, section: int = HEADS
) -> tuple[Tensor, Tensor]:
    """The kernel's out and lse, poisoned before."""
    num_queries = q.size(0)
    out = np.full(num_queries * HEADS * DIM, np.nan, np.float16)
    lse = np.full(num_queries * HEADS, np.nan, np.float32)
    q_desc, k_desc, v_desc = (
        Descriptor(_spread(x, factor).reshape(x.size(0), -1), [rows, DIM])
        for x, factor, rows in ((q, 1, Q_TILE), (k, 2, 128), (v, 3, 128))
    )
    tiles = plan.q_tiles.numpy()
    launch(
        hopper_kernel._attention_fwd_hopper_kernel, num_programs,
        q_desc, k_desc, v_desc, Pointer(out), Pointer(lse), Pointer(tiles.reshape(-1)),
        Int(len(tiles)), Int(section), Int(num_queries), Int(HEADS), Int(DIM), Int(2 * DIM), Int(3 * DIM),
        np.float32(math.log2(math.e) / math.sqrt(DIM)),
        GROUP=HEADS // KV_HEADS, H=DIM, BM=Q_TILE, BN=128, STAGES=2, CONSUMER_REGISTERS=240,
        PRODUCER_REGISTERS=24,
    )  # fmt: skip
    return torch.from_numpy(out).view(num_queries, HEADS, DIM), torch.from_numpy(lse).view(HEADS, num_queries)


def assert_agrees(
    plan: AttentionPlan, num_programs: int, section: int = HEADS, size_of_scores: float = 1.0
) -> None:
    shapes = [(plan.num_queries, HEADS, DIM), *[(plan.num_keys, KV_HEADS, DIM)] * 2]
    q, k, v = (torch.randn(shape).half() for shape in shapes)
    q *= size_of_scores
    out, lse = simulated(q, k, v, plan, num_programs, section)
    exact, exact_lse = flash_attention_ref(q.double(), k.double(), v.double(), plan)
    mean, _ = flash_attention_ref(q.double(), k.double(), v.double().abs(), plan)
    ulp = torch.finfo(torch.float16).eps
    assert ((out.double() - exact).abs() <= 2 * ulp * mean + 2**-24).all()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_programs", [1, 3, 5])
@pytest.mark.proves(
    "The Gluon forward for Hopper agrees with the reference",
    how="its own Python code in a simulator with late copies over poisoned memory",
)
def test_packed_documents_agree_whatever_the_number_of_programs(num_programs: int, causal: bool) -> None:
    bounds = np.cumsum([0, 1, 2, 127, 128, 129, 700])
    assert_agrees(make_plan(bounds, bounds, causal=causal, device="cpu"), num_programs)


def test_heads_in_sections_agree() -> None:
    bounds = [0, 300, 430]
    assert_agrees(make_plan(bounds, bounds, causal=True, device="cpu"), 3, section=2)


def test_large_scores_do_not_overflow() -> None:
    # fp16 weights end at exp(11); hundreds, and they and their sums would end beyond fp32 too.
    assert_agrees(make_plan([0, 300], [0, 300], causal=True, device="cpu"), 2, size_of_scores=200.0)


def test_a_ranks_two_chunks_agree() -> None:
    # Quarters 1 and 2 of a row of 1,200 tokens with documents of 500 and 700, against all keys.
    plan = make_plan(
        [0, 200, 600], [0, 500, 1200], causal=True, device="cpu", q_split=300, q_offsets=(300, 300)
    )
    assert_agrees(plan, 4)
