"""The program behind `test_linear_loss_ranks.py`: two gloo ranks share a vocabulary, or sequences."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.kernels.linear_loss_reference import (
    Batch,
    LossSpec,
    assert_within_budget,
    call,
    gradients,
    make_batch,
    measured,
)

TOKEN = LossSpec(
    kind="policy", clip_high=0.28, dual_clip=1.5, kl_coef=0.3, kl_reference="ref", entropy_coef=0.1,
    importance_cap=1.2,
)  # fmt: skip
SPECS = {"cross-entropy": LossSpec(), "token": TOKEN, "sequence": replace(TOKEN, ratio="sequence")}
LENGTHS = [5, 11, 0, 3]


def batch_of(dtype: torch.dtype) -> Batch:
    made = make_batch(sum(LENGTHS), 6, 70, 8, dtype=dtype, sequence_lengths=LENGTHS, temperature=0.8)
    return made.to(dtype)


def share_vocabulary(batch: Batch, spec: LossSpec, backend: str) -> list[Tensor]:
    """What `measured` gives, each rank holding half of the rows of the weight."""
    rank, size = dist.get_rank(), batch.weight.size(0) // 2
    mine = batch.weight.detach()[rank * size : (rank + 1) * size].clone().requires_grad_()
    shard = replace(batch, weight=mine)
    result = call(
        shard, spec, temperature=0.8, chunk_size=4, backend=backend, vocab_start=rank * size,
        group=dist.group.WORLD,
    )  # fmt: skip
    grad_hidden, grad_weight = gradients(result.loss, shard)
    dist.all_reduce(grad_hidden)
    parts = [torch.empty_like(grad_weight) for _ in range(2)]
    dist.all_gather(parts, grad_weight)
    values = [result.loss.detach(), result.logprobs_T, result.entropy_T]
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, [value.tolist() for value in values])
    assert everyone[0] == everyone[1], "ranks disagree about a value"
    return [*values, grad_hidden, torch.cat(parts)]


def share_sequences(batch: Batch, spec: LossSpec) -> list[Tensor]:
    """The same, each rank holding the tokens of two of four chunks, as context parallelism deals them."""
    rank, size = dist.get_rank(), batch.hidden.size(0) // 4 + 1
    position = torch.arange(batch.hidden.size(0)) // size
    mine = ((position == rank) | (position == 3 - rank)).nonzero()[:, 0]
    part = {name: value[mine] for name, value in vars(batch).items() if name != "weight"}
    part["hidden"] = part["hidden"].detach().requires_grad_()
    shard = Batch(weight=batch.weight, **part)
    result = call(shard, spec, temperature=0.8, chunk_size=4, sequence_group=dist.group.WORLD)
    grad_hidden, grad_weight = gradients(result.loss, shard)
    full = [torch.zeros(len(position), dtype=batch.hidden.dtype) for _ in range(2)]
    for whole, local in zip(full, (result.logprobs_T, result.entropy_T), strict=True):
        whole[mine] = local
    whole_hidden = torch.zeros_like(batch.hidden.detach())
    whole_hidden[mine] = grad_hidden
    values = [result.loss.detach(), *full, whole_hidden, grad_weight]
    for value in values:
        dist.all_reduce(value)
    return values


def run(payload: dict[str, Any]) -> dict[str, float]:
    """Every case; {name: largest error against float64}. A case beyond its budget fails the job."""
    os.environ["TRITON_INTERPRET"] = "1"
    from phi4r_kernels import interpreter

    interpreter.install()
    dist.init_process_group("gloo")
    errors = {}
    for name, spec in SPECS.items():
        batch = batch_of(torch.float64)
        exact = measured(batch, spec, 0.8, False)
        found = {"vocabulary": share_vocabulary(batch, spec, "torch")}
        if name != "cross-entropy":
            found["sequences"] = share_sequences(batch, spec)
        for shared, values in found.items():
            differences = [(a - b).abs().max().item() for a, b in zip(values, exact, strict=True)]
            errors[f"{name} {shared}"] = max(differences)
        for dtype in (torch.float32, torch.bfloat16):
            low = batch_of(dtype)
            low = replace(
                low,
                **{
                    n: v.to(torch.float32)
                    for n, v in vars(low).items()
                    if v.dim() == 1 and v.is_floating_point()
                },
            )
            assert_within_budget(share_vocabulary(low, spec, "triton"), low, spec, 0.8, False)
            errors[f"{name} kernels {dtype}"] = 0.0
    dist.destroy_process_group()
    return errors
