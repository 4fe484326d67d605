"""Weights, gradients and optimizer state of one rank, in bytes, exactly as megatron-core lays them out.

    shards = dp x cp     ranks over which the distributed optimizer cuts its state
    numel                elements of one parameter on its tensor-parallel rank

With the distributed optimizer a model chunk's parameters lie in one buffer (and their fp32 gradients in
another of the same length): each starts at a multiple of 64 elements, and each bucket is padded to a multiple
of lcm(shards, 128). Adam's state, and for bf16 the fp32 master weights, exist only for the parameters (not
the padding) in this rank's cut of every bucket. Without it each parameter has its own storage and everything
is kept whole on every rank. `tests/plan` compares these numbers with the tensors of real ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from phi4r.configs.sections import ModelConfig, OptimizerConfig, ParallelConfig
from phi4r.configs.stages import stage_layers, vocab_rows

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2}
"""Bytes of one value of `model.dtype`. Gradients and optimizer state are fp32, or fp64 with an fp64 model."""

FP32 = 4
PARAM_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
MIN_BUCKET = 40_000_000
BUCKET_PER_SHARD = 1_000_000


@dataclass(frozen=True)
class States:
    """Bytes that one rank holds between steps."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def chunk_weights(model: ModelConfig, tp: int, num_layers: int, *, first: bool, last: bool) -> list[int]:
    """numel of the parameters of a model chunk of `num_layers` layers; `first` has the embedding, `last` the
    final norm and the head, which is a second copy of a tied embedding where that is on another rank."""
    table = vocab_rows(model.vocab_size, tp) * model.hidden_size
    weights = [table] if first else []
    weights += model.layer_sizes(tp).parameters * num_layers
    if last:
        weights.append(model.hidden_size)
    if last and not (first and model.tie_embeddings):
        weights.append(table)
    return weights


def rank_chunks(model: ModelConfig, parallel: ParallelConfig, pp_rank: int) -> list[list[int]]:
    """`chunk_weights` of every virtual stage of a pipeline rank."""
    layers = stage_layers(model.num_layers, parallel)[pp_rank]
    last_rank = parallel.pp - 1
    return [
        chunk_weights(
            model,
            parallel.tp,
            count,
            first=pp_rank == 0 and stage == 0,
            last=pp_rank == last_rank and stage == parallel.vpp - 1,
        )
        for stage, count in enumerate(layers)
    ]


def _ceil(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Buffer:
    """The contiguous buffer of one chunk: its length, and [start, end) of its parameters and of its
    buckets."""

    numel: int
    parameters: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

    def owned(self, shards: int, shard: int) -> int:
        """Parameter elements in `shard`'s equal cut of every bucket."""
        cuts = []
        for start, end in self.buckets:
            size = (end - start) // shards
            cuts.append((start + shard * size, start + (shard + 1) * size))
        total, index = 0, 0
        for low, high in cuts:  # both lists ascend
            while index and self.parameters[index][0] > low:
                index -= 1
            while index < len(self.parameters) and self.parameters[index][0] < high:
                start, end = self.parameters[index]
                total += max(0, min(end, high) - max(start, low))
                index += 1
            index = max(0, index - 1)
        return total


def lay_out(weights: list[int], shards: int, bucket_size: int | None, alone: int | None = None) -> Buffer:
    """The buffer of a chunk under the distributed optimizer. Parameters are placed in reverse order; a
    bucket ends with the parameter that fills `bucket_size` (None: one bucket). alone: index of the parameter
    that has a bucket to itself, a tied embedding that another stage holds as well."""
    multiple = math.lcm(shards, BUCKET_ALIGNMENT)
    parameters, buckets = [], []
    end = bucket_start = 0
    is_open = False
    for index in reversed(range(len(weights))):
        numel, is_alone = weights[index], index == alone
        if is_alone and is_open:
            end = _ceil(end, multiple)
            buckets.append((bucket_start, end))
            bucket_start = end
        start = _ceil(end, PARAM_ALIGNMENT)
        end = start + numel
        parameters.append((start, end))
        is_open = True
        if is_alone or (bucket_size is not None and end - bucket_start >= bucket_size):
            end = _ceil(end, multiple)
            buckets.append((bucket_start, end))
            bucket_start, is_open = end, False
    if is_open:
        end = _ceil(end, multiple)
        buckets.append((bucket_start, end))
    return Buffer(end, tuple(parameters), tuple(buckets))


def bytes_per_element(model: ModelConfig, optimizer: OptimizerConfig) -> int:
    """Optimizer state of one weight: two moments, and the master weight beside bf16."""
    width = BYTES[model.dtype]
    moment = BYTES["bf16"] if optimizer.moments == "bf16" else max(width, FP32)
    return 2 * moment + (FP32 if width < FP32 else 0)


def _shared(model: ModelConfig, parallel: ParallelConfig, pp_rank: int, stage: int, count: int) -> int | None:
    """Index in a chunk's `count` weights of the tied embedding that two stages hold: first on the first,
    last on the last."""
    if not model.tie_embeddings or parallel.pp == 1:
        return None
    if pp_rank == 0 and stage == 0:
        return 0
    is_last = pp_rank == parallel.pp - 1 and stage == parallel.vpp - 1
    return count - 1 if is_last else None


@lru_cache(maxsize=4096)
def rank_elements(
    model: ModelConfig, parallel: ParallelConfig, pp_rank: int = 0, shard: int = 0
) -> tuple[int, int]:
    """(elements of the buffers of weights and of gradients, elements with optimizer state) of rank
    (`pp_rank`, `shard` of dp x cp)."""
    shards = parallel.dp * parallel.cp
    numel = owned = 0
    for stage, weights in enumerate(rank_chunks(model, parallel, pp_rank)):
        if not parallel.distributed_optimizer:
            numel += sum(weights)
            owned += sum(weights)
            continue
        # Only the first chunk of the first stage overlaps its reduction bucket by bucket.
        bucketed = parallel.overlap and pp_rank == 0 and stage == 0
        size = max(MIN_BUCKET, BUCKET_PER_SHARD * shards) if bucketed else None
        buffer = lay_out(weights, shards, size, _shared(model, parallel, pp_rank, stage, len(weights)))
        numel += buffer.numel
        owned += buffer.owned(shards, shard)
    return numel, owned


def rank_states(
    model: ModelConfig,
    parallel: ParallelConfig,
    pp_rank: int = 0,
    shard: int = 0,
    optimizer: OptimizerConfig | None = None,
) -> States:
    """What rank (`pp_rank`, `shard` of dp x cp) holds after its first optimizer step. Adam's step counters
    (one number per parameter) are not counted, nor what `optimizer.offload` puts into host memory (which is
    cut by whole parameters: to about the size of one)."""
    optimizer = optimizer or OptimizerConfig()
    numel, owned = rank_elements(model, parallel, pp_rank, shard)
    width = BYTES[model.dtype]
    state = owned * bytes_per_element(model, optimizer)
    return States(numel * width, numel * max(width, FP32), round(state * (1 - optimizer.offload)))
