"""The output layer: from hidden states to a loss, to log-probs, or to the logits of a few tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from phi4r_kernels.linear_loss import (
    Backend,
    FusedLoss,
    LinearLossResult,
    Objective,
    linear_logprobs,
    linear_loss,
)
from torch import Tensor


@dataclass(frozen=True)
class LossRequest:
    """What to minimise: arguments of `linear_loss` by its names; weights_T and terms [T local]."""

    objective: Objective
    weights_T: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    sequences_T: Tensor | None = None
    fused: FusedLoss | None = None


@dataclass(frozen=True)
class HeadRequest:
    """What the last stage should make of the hidden states.

    labels_T: int64 [T] targets (local tokens); temperature: divides the logits; chunk_size: tokens whose
    logits exist at once; with_entropy: also entropy; backend: which kernels, as `linear_loss` takes it.

    loss: what to minimise; None for log-probs without gradients, of the tokens select_T (bool [T]; None: all,
    others give zeros). logits_at: int64 [B] or None; when set, full-vocabulary logits [B, vocabulary] of
    these tokens are returned instead.
    """

    labels_T: Tensor | None = None
    select_T: Tensor | None = None
    temperature: float = 1.0
    chunk_size: int = 4096
    with_entropy: bool = False
    backend: Backend = "auto"
    loss: LossRequest | None = None
    logits_at: Tensor | None = None


class LogprobHead(ColumnParallelLinear):
    """The output layer, vocabulary-parallel: gives a loss, or log-probs and entropies of labels, and never
    holds [tokens, vocabulary] logits."""

    vocab_size: int
    """Rows of the whole vocabulary; what the ranks hold beyond it is padding."""

    def num_real_rows(self, rows: int) -> int:
        """How many of this rank's `rows` are tokens."""
        return min(rows, self.vocab_size - self.tp_group.rank() * rows)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, table: Tensor, request: HeadRequest, gather_sequence: bool
    ) -> Tensor | LinearLossResult:
        """table: this rank's rows of the head, or of the embedding it is tied to. hidden [T local / tp if
        SP, 1, D] -> the loss of `request.loss`; without one, [2, T local] (log-prob, entropy), or logits [B,
        vocabulary] fp32."""
        if gather_sequence:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        hidden_TD = hidden[:, 0]
        if request.logits_at is not None:
            return self._gathered_logits(hidden_TD[request.logits_at], table)
        assert request.labels_T is not None
        # Without the padding rows: they get no probability, and no gradient but zeros.
        rows = self.num_real_rows(table.size(0))
        weight = table if rows == table.size(0) else table[:rows]
        options: dict[str, Any] = dict(
            vocab_start=self.tp_group.rank() * table.size(0),
            group=self.tp_group,
            temperature=request.temperature,
            chunk_size=request.chunk_size,
            with_entropy=request.with_entropy,
            backend=request.backend,
        )
        if request.loss is None:
            values = linear_logprobs(
                hidden_TD, weight, request.labels_T, select_T=request.select_T, **options
            )
            return torch.stack(values)
        options |= vars(request.loss)
        if mpu.get_context_parallel_world_size() > 1:
            options["sequence_group"] = mpu.get_context_parallel_group()
        return linear_loss(hidden_TD, weight, request.labels_T, **options)

    def _gathered_logits(self, hidden_BD: Tensor, table: Tensor) -> Tensor:
        logits_BV = hidden_BD.float() @ table.float().T
        if self.tp_group.size() == 1:
            return logits_BV
        shards = [torch.empty_like(logits_BV) for _ in range(self.tp_group.size())]
        torch.distributed.all_gather(shards, logits_BV.contiguous(), group=self.tp_group)
        return torch.cat(shards, dim=1)[:, : self.vocab_size]
