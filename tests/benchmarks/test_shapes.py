"""Mixes of documents, and FLOP formulas against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.attention_peers import Documents, reference
from benchmarks.elementwise import EAGER
from benchmarks.head_peers import naive, naive_loss, random_problem
from benchmarks.shapes import (
    MIXES,
    SHAPES,
    Shape,
    attention_bytes,
    attention_flops,
    documents,
    head_flops,
    step_flops,
)
from benchmarks.step import Parts, backward, make_step

TINY = SHAPES["tiny"]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("num_tokens", [64, 1000, 32_768])
def test_every_mix_fills_its_row_with_documents(mix: str, num_tokens: int) -> None:
    lengths = documents(mix, num_tokens)
    assert sum(lengths) == num_tokens
    assert min(lengths) >= 1
    assert lengths == documents(mix, num_tokens)


def test_mixes_are_what_they_say() -> None:
    assert documents("dense", 32_768) == [32_768]
    assert documents("uniform", 32_768) == [4096] * 8
    giant = documents("giant", 32_768)
    assert giant[0] == 24_576
    assert len(giant) == 33
    traces = documents("lognormal", 32_768)
    assert len(set(traces)) > 3
    assert max(max(documents("lognormal", 32_768, seed)) for seed in range(20)) == 8192
    with pytest.raises(ValueError, match="one of dense"):
        documents("zipf", 1024)
    with pytest.raises(ValueError, match="at least 64"):
        documents("dense", 63)


def test_phi_4_has_its_number_of_parameters() -> None:
    phi4 = SHAPES["phi4"]
    norms = phi4.hidden * (2 * phi4.num_layers + 1)
    total = phi4.num_layers * phi4.layer_parameters() + 2 * phi4.vocab * phi4.hidden + norms
    assert total == 14_659_507_200


@pytest.mark.parametrize("lengths", [[512], [100, 28, 300]])
def test_attention_flops_are_torch_s_and_half_of_them_for_causal(
    lengths: list[int],
) -> None:
    phi4 = SHAPES["phi4"]
    sizes = [(1, phi4.num_heads, n, phi4.head_dim) for n in lengths]
    forward = sum(sdpa_flop_count(size, size, size) for size in sizes)
    back = sum(sdpa_backward_flop_count(size, size, size, size) for size in sizes)
    assert attention_flops(phi4, lengths, causal=False) == forward
    assert attention_flops(phi4, lengths) == forward / 2
    assert attention_flops(phi4, lengths, "backward") == back / 2


def test_attention_of_32k_tokens_of_phi_4_is_the_known_number() -> None:
    # 4 x 40 x 128 x 32,768^2 / 2
    assert attention_flops(SHAPES["phi4"], [32_768]) == pytest.approx(10.995e12, rel=1e-4)
    # 16 KB of keys, values, queries and outputs a token: 2 (5,120 + 1,280) numbers of 2 bytes
    assert attention_bytes(SHAPES["phi4"], 1) == 4 * (5120 + 1280)


def test_head_flops_are_what_torch_counts_for_the_naive_head() -> None:
    x, weight, batch = random_problem(64, TINY.hidden, TINY.vocab, torch.float32, "cpu", seed=0)
    with FlopCounterMode(display=False) as counter:
        naive(batch, "grpo")(x, weight)
    assert counter.get_total_flops() == head_flops(64, TINY.hidden, TINY.vocab)
    with FlopCounterMode(display=False) as counter:
        naive(batch, "logprobs")(x, weight)
    assert counter.get_total_flops() == head_flops(64, TINY.hidden, TINY.vocab, backward=False)


def test_step_flops_are_what_torch_counts_for_a_step() -> None:
    lengths = [40, 24]
    step, batch = make_step(TINY, 2, lengths, torch.float32, "cpu", recompute=False)
    docs = Documents(tuple(lengths), "cpu")
    parts = Parts(lambda q, k, v: reference(q, k, v, docs), naive_loss(batch, "grpo"), EAGER)
    with FlopCounterMode(display=False) as counter:
        backward(step, parts)
    # Written-out attention does all scores, and its backward 4 products instead of 5.
    written_out = 3 * attention_flops(TINY, lengths, causal=False)
    counted = attention_flops(TINY, lengths) + attention_flops(TINY, lengths, "backward")
    assert counter.get_total_flops() == step_flops(TINY, 2, lengths) + 2 * (written_out - counted)


def test_recomputation_counts_nothing_though_it_is_done() -> None:
    lengths = [64]
    docs = Documents(tuple(lengths), "cpu")
    counted = []
    for recompute in (False, True):
        step, batch = make_step(TINY, 2, lengths, torch.float32, "cpu", recompute)
        parts = Parts(lambda q, k, v: reference(q, k, v, docs), naive_loss(batch, "grpo"), EAGER)
        with FlopCounterMode(display=False) as counter:
            grad = backward(step, parts)
        counted.append((counter.get_total_flops(), grad))
    assert counted[1][0] > counted[0][0]
    assert torch.equal(counted[0][1], counted[1][1])


def test_a_shape_knows_its_projection() -> None:
    assert Shape("x", 8, 4, 2, 3, 5, 7, 1).qkv == (4 + 2 * 2) * 3
