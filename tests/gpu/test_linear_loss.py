"""The head's Triton kernels on a GPU: the interpreter tests' budgets, and what no interpreter sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.linear_loss_reference import (
    Batch,
    LossSpec,
    assert_within_budget,
    call,
    gradients,
    make_batch,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

POLICY = LossSpec(
    kind="policy", clip_high=0.28, dual_clip=1.5, kl_coef=0.3, kl_reference="ref", entropy_coef=0.1,
    importance_cap=1.2,
)  # fmt: skip
SPECS = {
    "cross-entropy": LossSpec(),
    "policy": POLICY,
    "gspo": replace(POLICY, ratio="sequence"),
}
PHI4 = 100_352


def cuda_batch(num_tokens: int, dim: int, vocab: int, dtype: torch.dtype) -> Batch:
    """A batch on the GPU: hidden and weight in `dtype`, scaled so that logits are of a model's size."""
    lengths = [num_tokens // 3, num_tokens - num_tokens // 3]
    made = make_batch(num_tokens, dim, vocab, dtype=torch.float64, sequence_lengths=lengths)
    scaled = replace(made, weight=made.weight * dim**-0.5)
    logp = (scaled.hidden @ scaled.weight.T).log_softmax(-1).gather(1, scaled.targets[:, None])[:, 0]
    noise = {n: (logp + 0.3 * torch.randn_like(logp)).float() for n in ("old", "ref", "rollout")}
    data = {n: getattr(scaled, n).float() for n in ("weights", "advantages")}
    low = {n: getattr(scaled, n).to(dtype) for n in ("hidden", "weight")}
    batch = replace(scaled, **noise, **data, **low)
    moved = {name: value.cuda() for name, value in vars(batch).items()}
    for name in low:
        moved[name].requires_grad_()
    return Batch(**moved)


def ours(batch: Batch, spec: LossSpec, **options: Any) -> list[Tensor]:
    result = call(batch, spec, **options)
    return [
        result.loss.detach(), result.logprobs_T, result.entropy_T, *gradients(result.loss, batch)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [1000, PHI4])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_values_and_gradients_stay_within_the_budget(spec: LossSpec, vocab: int, dtype: torch.dtype) -> None:
    batch = cuda_batch(96, 256, vocab, dtype)
    assert_within_budget(ours(batch, spec, chunk_size=40, backend="triton"), batch, spec, 1.0, False)


def test_steps_and_the_fused_kernel_agree_and_rerun_bit_for_bit() -> None:
    """A race of the gradient with the logits whose memory it takes would show in some of the runs."""
    from phi4r_kernels.linear_loss import elementwise_torch as plain
    from phi4r_kernels.linear_loss import elementwise_triton as kernels

    count = 600  # several rows for every SM
    random = torch.Generator("cuda").manual_seed(1)
    logits = 4 * torch.randn(count, PHI4, generator=random, device="cuda")
    targets = torch.randint(0, PHI4, (count,), generator=random, device="cuda")
    terms = torch.rand(5, count, generator=random, device="cuda") - 12
    stats = kernels.logit_stats(logits, targets, 1.0, True)
    logprob, entropy, largest, log_sum = plain.combine(stats[None], 1.0)
    fused = POLICY.objective()[1]
    assert fused is not None
    values, _ = kernels.loss_and_grad(logits.clone(), targets, terms, fused, 1.0, False, torch.float32)
    torch.testing.assert_close(values[:2], torch.stack([logprob, entropy]), rtol=1e-5, atol=1e-5)
    points = torch.stack([largest, log_sum, entropy, *values[3:]])
    expected = plain.logit_grad(logits.clone(), targets, points, 1.0, torch.float32, True)
    first = None
    for _ in range(10):
        found, joined = kernels.loss_and_grad(
            logits.clone(), targets, terms, fused, 1.0, False, torch.bfloat16
        )
        steps = kernels.logit_grad(logits.clone(), targets, points, 1.0, torch.bfloat16, True)
        torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-5)
        for grad in (joined, steps):
            error = (grad.float() - expected).abs()
            assert (error <= expected.abs() * (2**-8 + 1e-4) + 1e-12).all()
        if first is not None:
            assert torch.equal(first, joined)
        first = joined.clone()


def test_the_whole_call_reruns_bit_for_bit() -> None:
    batch = cuda_batch(300, 256, PHI4, torch.bfloat16)
    one, other = (ours(batch, POLICY, chunk_size=128) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_memory_is_a_chunk_of_logits_and_the_gradients() -> None:
    batch = cuda_batch(2048, 512, PHI4, torch.bfloat16)
    batch = replace(batch, weights=torch.ones_like(batch.weights))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = call(batch, POLICY, chunk_size=256).loss
    peak = torch.cuda.max_memory_allocated() - before
    logits, grads = 256 * PHI4 * 4, batch.weight.numel() * 4 + batch.hidden.numel() * 2
    assert peak <= 1.1 * (logits + grads), f"{peak / 2**20:.0f} MiB"
    loss.backward()
    assert batch.weight.grad is not None
    assert batch.weight.grad.isfinite().all()


def test_torch_compile_sees_through_the_operators() -> None:
    from phi4r_kernels.linear_loss import elementwise_triton as kernels

    fused = POLICY.objective()[1]
    assert fused is not None

    def both(logits: Tensor, targets: Tensor, terms: Tensor) -> Tensor:
        stats = kernels.logit_stats(logits * 2, targets, 1.0, True)
        values, _ = kernels.loss_and_grad(logits * 2, targets, terms, fused, 1.0, False, torch.float32)
        return stats.sum() + values

    arguments = (
        torch.randn(8, 500, device="cuda"),
        torch.arange(8, device="cuda"),
        torch.rand(5, 8, device="cuda"),
    )
    torch.testing.assert_close(torch.compile(both, fullgraph=True)(*arguments), both(*arguments))
