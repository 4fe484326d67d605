"""The Triton attention backend gives what the reference backend gives, and says where it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from phi4r.configs.sections import ModelConfig
from phi4r.core.errors import UserError
from phi4r.models.backends import reference_attention, select_backend, triton_attention
from phi4r.models.packed import PackedContext
from phi4r.parallel import zigzag

TINY = ModelConfig.from_preset("tiny")


def context_of(bounds: list[int], cp: int, rank: int) -> PackedContext:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return PackedContext(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, num_tokens=bounds[-1], cp=cp,
        cp_rank=rank, host_bounds=bounds,
    )  # fmt: skip


@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.proves(
    "Training with the Triton attention equals the reference",
    how="interpreted on CPU, forward and gradients",
    layouts="cp 1, cp 2",
)
def test_triton_equals_the_reference_on_every_rank(cp: int) -> None:
    bounds = [0, 5, 6, 40, 48]
    torch.manual_seed(torch.seed())
    q, do = torch.randn(2, 48, TINY.num_attention_heads, TINY.head_dim)
    k, v = torch.randn(2, 48, TINY.num_query_groups, TINY.head_dim)
    for rank in range(cp):
        context = context_of(bounds, cp, rank)
        index = zigzag.local_index(48, cp, rank)
        found = []
        for attend in (reference_attention, triton_attention):
            leaves = [x.detach().requires_grad_() for x in (q[index], k, v)]
            out = attend(*leaves, context, 0.2)
            found.append([out.detach(), *torch.autograd.grad(out, leaves, do[index])])
        # fp32 sums of at most 48 keys of 32 products each, and of 2 x 48 queries in dK and dV.
        for expected, value in zip(*found):
            error = (value - expected).abs().max() / expected.abs().max()
            assert error <= np.finfo(np.float32).eps * 96


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_the_pieces_for_flash_attn_are_the_attention_of_the_reference(cp: int) -> None:
    """The package does not run here: its contract (pieces one after another, a causal mask aligned at the
    last query and key) is written out instead."""
    bounds = [0, 5, 6, 40, 48]
    q = torch.randn(48, TINY.num_attention_heads, TINY.head_dim, dtype=torch.float64)
    k, v = torch.randn(2, 48, TINY.num_query_groups, TINY.head_dim, dtype=torch.float64)
    for rank in range(cp):
        context = context_of(bounds, cp, rank)
        mine = q[zigzag.local_index(48, cp, rank)]
        pieces = context.varlen()
        keys, values = (x if pieces.key_index is None else x[pieces.key_index] for x in (k, v))
        starts, key_starts = pieces.query_bounds.tolist(), pieces.key_bounds.tolist()
        out = []
        for i in range(len(starts) - 1):
            piece = mine[starts[i] : starts[i + 1]].transpose(0, 1)
            seen = slice(key_starts[i], key_starts[i + 1])
            n, m = piece.size(1), seen.stop - seen.start
            assert n <= pieces.max_queries
            assert m <= pieces.max_keys
            mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
            kv = (x[seen].transpose(0, 1) for x in (keys, values))
            found = torch.nn.functional.scaled_dot_product_attention(
                piece, *kv, attn_mask=mask, scale=0.2, enable_gqa=True
            )
            out.append(found.transpose(0, 1))
        torch.testing.assert_close(
            torch.cat(out), reference_attention(mine, k, v, context, 0.2), rtol=0, atol=1e-12
        )
        assert context.varlen() is pieces


def test_flash_attn_without_the_package_is_refused_with_the_way_to_get_it() -> None:
    with pytest.raises(
        UserError, match=r"flash_attn cannot be used: flash-attn is not installed: make install"
    ):
        select_backend("flash_attn")


def test_a_row_is_planned_once() -> None:
    context = context_of([0, 5, 48], 1, 0)
    assert context.plan() is context.plan()


def test_auto_is_sdpa_without_a_gpu_and_triton_fits_the_tiny_model() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert select_backend("auto") == "sdpa"
    assert select_backend("triton", TINY.head_dim, TINY.dtype) == "triton"
    with pytest.raises(UserError, match="head_dim is 8"):
        select_backend("triton", 8, "fp32")
    with pytest.raises(UserError, match="dtype is fp64"):
        select_backend("triton", 64, "fp64")
    with pytest.raises(UserError, match="unknown backend"):
        select_backend("flash", 64, "bf16")


def test_triton_on_a_cpu_without_the_interpreter_is_refused_in_one_line() -> None:
    code = "from phi4r.models.backends import why_not_triton\nprint(why_not_triton(64, 'bf16'))"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert ended.stdout.splitlines() == [
        "there is no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
    ], ended.stderr
