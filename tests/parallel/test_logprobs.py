"""The chunked log-prob path against logits written out, in float64: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phi4r.parallel.logprobs import VocabShard, linear_logprobs

DIM, VOCAB = 7, 23


def written_out(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy from the whole [tokens, vocabulary] matrix, by autograd."""
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(0, 12), chunk=st.integers(1, 13), temperature=st.sampled_from([1.0, 0.7, 2.0]),
    entropy=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_values_and_gradients_equal_the_full_softmax(
    num_tokens: int, chunk: int, temperature: float, entropy: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, DIM, generator=random, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, DIM, generator=random, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, VOCAB, (num_tokens,), generator=random)
    coefficients = torch.randn(2, num_tokens, generator=random, dtype=torch.float64)

    logprobs, entropies = linear_logprobs(
        hidden,
        weight,
        targets,
        shard=VocabShard(0, VOCAB),
        temperature=temperature,
        chunk_size=chunk,
        with_entropy=entropy,
    )
    expected_logprobs, expected_entropies = written_out(hidden, weight, targets, temperature)

    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-12, atol=1e-12)
    loss, expected = (coefficients[0] * logprobs).sum(), (coefficients[0] * expected_logprobs).sum()
    if entropy:
        torch.testing.assert_close(entropies, expected_entropies, rtol=1e-12, atol=1e-12)
        loss = loss + (coefficients[1] * entropies).sum()
        expected = expected + (coefficients[1] * expected_entropies).sum()
    else:
        assert not entropies.any()
    ours = torch.autograd.grad(loss, (hidden, weight))
    theirs = torch.autograd.grad(expected, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.full((2, DIM), 1e3)
    weight = torch.linspace(-1, 1, VOCAB)[:, None].expand(VOCAB, DIM).contiguous()
    logprobs, entropies = linear_logprobs(
        hidden, weight, torch.tensor([VOCAB - 1, 0]), shard=VocabShard(0, VOCAB), with_entropy=True
    )
    assert logprobs.isfinite().all()
    assert entropies.isfinite().all()
    assert logprobs[0] == 0
    assert logprobs[1] < -1e4


def test_no_full_logits_are_ever_held() -> None:
    num_tokens, vocab, chunk = 512, 4096, 16
    hidden = torch.randn(num_tokens, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=True)
    targets = torch.randint(0, vocab, (num_tokens,))
    with torch.profiler.profile(profile_memory=True) as profile:
        logprobs, _ = linear_logprobs(hidden, weight, targets, shard=VocabShard(0, vocab), chunk_size=chunk)
        logprobs.sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 4 * vocab * max(4 * chunk, 8)  # a chunk's logits or the weight's gradient, not 8 MiB


@pytest.mark.parametrize(
    ("hidden", "weight", "targets"), [((3, 5), (23, 7), 3), ((3, 7), (22, 7), 3), ((3, 7), (23, 7), 4)]
)
def test_shapes_that_disagree_are_refused(
    hidden: tuple[int, int], weight: tuple[int, int], targets: int
) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        linear_logprobs(
            torch.zeros(hidden),
            torch.zeros(weight),
            torch.zeros(targets, dtype=torch.long),
            shard=VocabShard(0, VOCAB),
        )
