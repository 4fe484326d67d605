"""The training engine: model chunks, optimizer and pipeline schedule of this rank behind three verbs.

`train_step` takes one optimizer step on packed rows, `forward` gives per-token values without gradients,
`evaluate` sums a loss. All ranks are given the same list of rows and take their share, so a result never
depends on the layout: a loss is a sum over tokens and a count, both reduced over all ranks before the
division.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from phi4r_kernels.linear_loss import FusedLoss, LinearLossResult, Objective, cross_entropy
from torch import Tensor

from phi4r.configs.sections import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from phi4r.data.packing import PackedRow, my_share
from phi4r.models.gpt import DecoderModel, build_model
from phi4r.models.head import HeadRequest, LossRequest
from phi4r.models.packed import PackedContext
from phi4r.parallel import zigzag
from phi4r.parallel.heartbeat import beat
from phi4r.parallel.layout import Layout
from phi4r.train.optimizer import megatron_settings

RowTensors = dict[str, Tensor]
"""The arrays of a row and its extras, each [T local]: int64 ids, and fp32 `loss_mask` and extras."""


@dataclass(frozen=True)
class TokenLoss:
    """The loss of a row: what the head minimises, and what is counted and reported beside it.

    objective: the loss of each token. weights: name of the row tensor with their weights; terms: names of
    those that the objective reads. report: (the head's result, row tensors) -> (integer count, values: sums,
    or maxima of non-negative values under names that begin with "max_"); without gradients. reads_sequences:
    the objective's sequences are the documents. fused: the same objective in the fused kernel's terms.
    """

    objective: Objective
    weights: str
    report: Callable[[LinearLossResult, RowTensors], tuple[Tensor, dict[str, Tensor]]]
    terms: tuple[str, ...] = ()
    reads_sequences: bool = False
    fused: FusedLoss | None = None


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: `loss` = loss sum / count over all ranks, `sums` the reported sums, `applied` False
    where the gradient was not finite and the step was left out."""

    loss: float
    count: int
    grad_norm: float
    applied: bool
    sums: dict[str, float]


def _sft_report(result: LinearLossResult, row: RowTensors) -> tuple[Tensor, dict[str, Tensor]]:
    return row["loss_mask"].sum(), {"loss": result.loss.detach()}


sft_loss = TokenLoss(cross_entropy, "loss_mask", _sft_report)
"""Cross-entropy: minus the sum of the targets' log-probs, and the number of targets."""


class Engine:
    """This rank's part of a model, with an optimizer if `optimizer` is given.

    Parameters must be filled before the first step (`phi4r.models.names.load_weights` or a checkpoint), after
    which `sync_optimizer` tells the optimizer about them.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        layout: Layout,
        train: TrainConfig,
        optimizer: OptimizerConfig | None = None,
    ) -> None:
        self.model_config, self.layout, self.train = model, layout, train
        self.models: list[DecoderModel] = build_model(model, parallel, train)
        for chunk in self.models:
            chunk.to(layout.device)
        self.config = self.models[0].config
        self.chunks: list[Any] = list(self.models)
        self.optimizer: Any = None
        if optimizer is not None:
            self._wrap(parallel, optimizer)
        self._schedule = get_forward_backward_func()

    def _wrap(self, parallel: ParallelConfig, optimizer: OptimizerConfig) -> None:
        sharded = parallel.distributed_optimizer
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=self.model_config.dtype != "fp64",
            use_distributed_optimizer=sharded,
            overlap_grad_reduce=parallel.overlap,
            overlap_param_gather=parallel.overlap and sharded,
            average_in_collective=False,
        )
        chunks = [
            DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(self.models)
        ]
        if parallel.overlap:
            many = len(chunks) > 1
            self.config.no_sync_func = [c.no_sync for c in chunks] if many else chunks[0].no_sync
            if many:
                self.config.grad_sync_func = [c.start_grad_sync for c in chunks]
        self.config.finalize_model_grads_func = finalize_model_grads
        settings = megatron_settings(self.model_config, parallel, optimizer)
        self.chunks = chunks
        self.optimizer = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.clip_grad, self.weight_decay = optimizer.clip_grad, optimizer.weight_decay

    def sync_optimizer(self) -> None:
        """Copy freshly loaded parameters into the optimizer's fp32 master copies."""
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    # --- the three verbs

    def train_step(
        self,
        rows: Sequence[PackedRow],
        loss: TokenLoss,
        lr: float,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> StepResult:
        """One optimizer step on `rows` (the same list on all ranks, at least one) at learning rate `lr`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.weight_decay * group.get("wd_mult", 1.0)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._run(rows, loss, temperature, with_entropy, backward=True)
        loss_sum, count = sums.pop("_loss"), sums.pop("_count")
        grad_norm = self._step_optimizer(finite=math.isfinite(loss_sum))
        applied = math.isfinite(grad_norm) and math.isfinite(loss_sum)
        return StepResult(loss_sum / max(count, 1.0), int(count), grad_norm, applied, sums)

    def _step_optimizer(self, finite: bool) -> float:
        """Clip and step unless something is not finite; returns the gradient norm before clipping."""
        self.optimizer.prepare_grads()
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        grad_norm = self._grad_norm(parts)
        if finite and math.isfinite(grad_norm):
            if self.clip_grad > 0:
                for part in parts:
                    parameters = part.get_parameters()
                    if parameters:
                        decoupled = part.config.use_precision_aware_optimizer
                        clip_grad_by_total_norm_fp32(parameters, self.clip_grad, grad_norm, decoupled)
            self.optimizer.step_with_ready_grads()
        return grad_norm

    @torch.no_grad()
    def _grad_norm(self, parts: Sequence[Any]) -> float:
        """L2 norm of the whole model's gradient. Summed in fp64, unlike megatron's, so that how parameters
        are dealt to ranks does not move the clipping factor: pipeline stages then equal one rank bit for
        bit."""
        grads = [grad for part in parts for grad in part.get_main_grads_for_grad_norm()]
        square = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        if grads:
            square += torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float64)).square().sum()
        if self.layout.world_size > 1:
            dist.all_reduce(square, group=self.optimizer.get_grad_stats_parallel_group())
        return float(square.sqrt())

    @torch.no_grad()
    def evaluate(
        self,
        rows: Sequence[PackedRow],
        loss: TokenLoss = sft_loss,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> StepResult:
        """What `train_step` would report on `rows`, without gradients: `grad_norm` is 0 and nothing is
        applied."""
        for chunk in self.chunks:
            chunk.eval()
        sums = self._run(rows, loss, temperature, with_entropy, backward=False)
        loss_sum, count = sums.pop("_loss"), sums.pop("_count")
        return StepResult(loss_sum / max(count, 1.0), int(count), 0.0, False, sums)

    @torch.no_grad()
    def forward(
        self,
        rows: Sequence[PackedRow],
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        masked: bool = True,
    ) -> np.ndarray:
        """Log-probs of the labels and entropies, float32 [2, rows, T], equal on all ranks.

        masked: only where `loss_mask` is set (others are 0); else for every token.
        """
        for chunk in self.chunks:
            chunk.eval()
        padded, mine = self._share(rows)
        length = len(rows[0].input_ids)
        out = torch.zeros(2, len(padded), length, device=self.layout.device)
        outputs: list[Tensor] = []

        def collect(values_2T: Tensor, non_loss_data: bool = False) -> Any:
            outputs.append(values_2T)
            return values_2T

        def forward_step(batches: Iterator[PackedRow], model: Any) -> tuple[Tensor, Any]:
            ids, context, tensors = self._inputs(next(batches))
            select_T = tensors["loss_mask"] > 0 if masked else None
            request = self._request(tensors, temperature, with_entropy, select_T=select_T)
            return model(ids, context, request), collect

        self._run_schedule(forward_step, [padded[i] for i in mine], length, backward=False, collect=True)
        if self.layout.reports:
            index = zigzag.local_index(length, self.layout.cp, self.layout.cp_rank).to(out.device)
            for i, values_2T in zip(mine, outputs, strict=True):
                out[:, i, index] = values_2T.to(out.dtype)
        if self.layout.world_size > 1:
            dist.all_reduce(out)  # every entry is non-zero on one rank only, so the sum is exact
        return out[:, : len(rows)].cpu().numpy()

    # --- how rows reach the schedule

    def _share(self, rows: Sequence[PackedRow]) -> tuple[list[PackedRow], list[int]]:
        """(rows padded with empty ones to fill all data-parallel ranks, this rank's indices, dealt so that
        attention costs all ranks about the same)."""
        multiple = self.layout.dp * (self.layout.pp if self.layout.vpp > 1 else 1)
        padded = list(rows)
        while len(padded) % multiple:
            padded.append(empty_row(rows[0]))
        return padded, my_share(padded, self.layout.dp, self.layout.dp_rank)

    def _tensors(self, row: PackedRow) -> RowTensors:
        """This CP rank's input_ids, labels, position_ids, loss_mask and extras of a row, on the device."""
        layout = self.layout
        index = zigzag.local_index(int(row.cu_seqlens[-1]), layout.cp, layout.cp_rank)
        placed: dict[str, Tensor] = getattr(row, "placed", {})

        def local(name: str) -> Tensor:
            if name in placed:
                return placed[name][index.to(placed[name].device)].to(layout.device)
            array = row.extras[name] if name in row.extras else getattr(row, name)
            return torch.from_numpy(array[index.numpy()]).to(layout.device, non_blocking=True)

        names = ("input_ids", "labels", "position_ids", "loss_mask", *row.extras)
        return {name: local(name) for name in names}

    def _inputs(self, row: PackedRow) -> tuple[Tensor, PackedContext, RowTensors]:
        """(input ids [1, T local], what attention needs, the row's tensors)."""
        beat()
        tensors = self._tensors(row)
        cu_seqlens = torch.from_numpy(row.cu_seqlens).to(self.layout.device)
        context = PackedContext(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=row.max_seqlen,
            max_seqlen_kv=row.max_seqlen,
            position_ids=tensors["position_ids"],
            num_tokens=int(row.cu_seqlens[-1]),
            cp=self.layout.cp,
            cp_rank=self.layout.cp_rank,
            host_bounds=row.cu_seqlens.tolist(),
        )
        return tensors["input_ids"][None], context, tensors

    def _request(
        self, tensors: RowTensors, temperature: float, with_entropy: bool, **options: Any
    ) -> HeadRequest:
        return HeadRequest(
            labels_T=tensors["labels"],
            temperature=temperature,
            chunk_size=self.train.logit_chunk_size,
            with_entropy=with_entropy,
            backend=self.train.head_backend,
            **options,
        )

    def _loss_request(self, loss: TokenLoss, context: PackedContext, tensors: RowTensors) -> LossRequest:
        """What the head minimises over a row; the documents are the objective's sequences."""
        sequences_T = None
        if loss.reads_sequences:
            bounds = context.cu_seqlens_q
            sequences_T = torch.searchsorted(bounds[1:], context.query_index().to(bounds), right=True)
        terms = {name: tensors[name] for name in loss.terms}
        return LossRequest(loss.objective, tensors[loss.weights], terms, sequences_T, loss.fused)

    def _run(
        self,
        rows: Sequence[PackedRow],
        loss: TokenLoss,
        temperature: float,
        with_entropy: bool,
        *,
        backward: bool,
    ) -> dict[str, float]:
        """Run the schedule; returns the reported sums with `_loss` and `_count`, reduced over all ranks."""
        padded, mine = self._share(rows)

        def forward_step(batches: Iterator[PackedRow], model: Any) -> tuple[Tensor, Any]:
            ids, context, tensors = self._inputs(next(batches))
            wanted = self._loss_request(loss, context, tensors)
            request = self._request(tensors, temperature, with_entropy, loss=wanted)

            def loss_func(result: LinearLossResult) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                with torch.no_grad():
                    count, sums = loss.report(result, tensors)
                return result.loss, count.int(), {**sums, "_loss": result.loss.detach(), "_count": count}

            return model(ids, context, request), loss_func

        length = int(rows[0].cu_seqlens[-1])
        reports = self._run_schedule(forward_step, [padded[i] for i in mine], length, backward=backward)
        return self._reduce(reports if self.layout.reports else [])

    def _run_schedule(
        self,
        forward_step: Callable,
        rows: list[PackedRow],
        length: int,
        *,
        backward: bool,
        collect: bool = False,
    ) -> list[dict[str, Tensor]]:
        many = len(self.chunks) > 1
        iterators = [iter(rows) for _ in self.chunks]
        return self._schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if many else iterators[0],
            model=self.chunks if many else self.chunks[0],
            num_microbatches=len(rows),
            seq_length=length,
            micro_batch_size=1,
            forward_only=not backward,
            collect_non_loss_data=collect,
        )

    def _reduce(self, reports: list[dict[str, Tensor]]) -> dict[str, float]:
        """Each reported value over this rank's microbatches and over all ranks, in float64: the sum, or the
        maximum where the name begins with "max_"."""
        names = sorted(reports[0]) if reports else None
        if self.layout.world_size > 1:
            box = [names]
            # The first rank that reports: last pipeline stage, tp 0, cp 0, dp 0.
            source = self.layout.world_size - self.layout.world_size // self.layout.pp
            dist.broadcast_object_list(box, src=source)
            names = box[0]
        assert names is not None
        device = self.layout.device
        values = torch.zeros(1 + len(reports), len(names), dtype=torch.float64, device=device)
        for index, report in enumerate(reports):
            values[index + 1] = torch.stack([report[name].detach().double() for name in names]).to(device)
        # One after another: the order of torch's sum over rows depends on the number of columns.
        sums, largest = torch.stack(list(itertools.accumulate(values)))[-1], values.amax(0)
        if self.layout.world_size > 1:
            dist.all_reduce(sums)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        is_max = torch.tensor([name.startswith("max_") for name in names], device=device)
        return dict(zip(names, largest.where(is_max, sums).tolist(), strict=True))


def empty_row(like: PackedRow) -> PackedRow:
    """A row of padding with the shape and extras of `like`: it takes part in a step and counts for
    nothing."""
    zeros = np.zeros_like
    length = len(like.input_ids)
    return PackedRow(
        input_ids=zeros(like.input_ids),
        labels=zeros(like.labels),
        loss_mask=zeros(like.loss_mask),
        position_ids=np.arange(length, dtype=like.position_ids.dtype),
        cu_seqlens=np.array([0, length], dtype=like.cu_seqlens.dtype),
        extras={name: zeros(array) for name, array in like.extras.items()},
        doc_index=np.full_like(like.doc_index, -1),
    )
