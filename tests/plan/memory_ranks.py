"""The program behind `test_memory.py`: real ranks count the bytes that `phi4r.plan` predicts.

One launch goes through every case of its number of ranks. Each rank counts the storages of its weights,
gradients and optimizer state after a step, and the largest sum of distinct storages that autograd's
saved-tensor hooks held at any moment of it (weights not among them).
"""

from __future__ import annotations

import dataclasses
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from phi4r.configs.sections import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from phi4r.configs.stages import check_layout
from phi4r.core.errors import ConfigError
from phi4r.data.packing import Document, PackedRow, pack
from phi4r.models.names import load_weights, random_weights
from phi4r.parallel.layout import init_layout
from phi4r.train.engine import Engine, sft_loss
from phi4r.train.footprint import measured_states, storage_bytes

SHAPES: dict[str, dict[str, Any]] = {
    "wide": dict(num_layers=4, hidden_size=64, ffn_hidden_size=224, num_attention_heads=4, num_query_groups=2,
                 head_dim=16, vocab_size=96, max_position_embeddings=2048),
    "odd": dict(num_layers=6, hidden_size=40, ffn_hidden_size=52, num_attention_heads=6, num_query_groups=2,
                head_dim=10, vocab_size=70, max_position_embeddings=2048),
}  # fmt: skip
ROWS = 4


def name_of(parallel: dict[str, Any]) -> str:
    """`tp2_sp1`."""
    return (
        "_".join(f"{key}{v}".replace("True", "1").replace("False", "0") for key, v in parallel.items())
        or "one"
    ).replace(",", "-")


@dataclass(frozen=True)
class Case:
    """A layout of a model, its row length, recomputation and attention."""

    parallel: dict[str, Any] = field(default_factory=dict)
    shape: str = "wide"
    dtype: str = "fp32"
    length: int = 128
    recompute: str = "none"
    attention: str = "auto"

    @property
    def name(self) -> str:
        layout = name_of(self.parallel)
        return "-".join(
            [layout, self.shape, self.dtype, str(self.length), self.recompute]
            + ([self.attention] if self.attention != "auto" else [])
        )

    @property
    def layout(self) -> ParallelConfig:
        return ParallelConfig(**self.parallel)

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(**SHAPES[self.shape], dtype=self.dtype, attention_backend=self.attention)  # type: ignore[arg-type]

    @property
    def train(self) -> TrainConfig:
        return TrainConfig(recompute=self.recompute, global_batch_size=ROWS, logit_chunk_size=32)  # type: ignore[arg-type]

    @property
    def num_microbatches(self) -> int:
        return ROWS // self.layout.dp


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"distributed_optimizer": False},
    {"tp": 2},
    {"tp": 2, "sp": True},
    {"pp": 2},
    {"pp": 2, "vpp": 2},
    {"pp": 2, "stage_layers": "3,1"},
    {"pp": 2, "vpp": 2, "stage_layers": "2,2,1,1"},
    {"cp": 2},
    {"dp": 2},
    {"dp": 2, "distributed_optimizer": False},
    {"dp": 2, "overlap": True},
    {"pp": 4},
    {"tp": 2, "sp": True, "pp": 2},
    {"cp": 2, "dp": 2},
]


LAYOUT_NAMES = ", ".join(map(name_of, LAYOUTS)).replace("distributed_optimizer0", "plain")


def is_valid(case: Case) -> bool:
    """Whether the shape can be cut so."""
    layout = case.layout
    try:
        check_layout(case.model, layout)
    except ConfigError:
        return False
    return case.length % layout.row_multiple == 0 and ROWS % layout.dp == 0


def cases() -> list[Case]:
    """Every layout with both shapes and dtypes for the states; recomputation modes and row lengths where they
    matter."""
    found = [Case(p, shape, dtype) for p in LAYOUTS for shape, dtype in (("wide", "fp32"), ("odd", "bf16"))]
    for parallel in ({}, {"tp": 2, "sp": True}, {"pp": 2}, {"cp": 2}):
        for recompute in ("selective", "full"):
            found += [
                Case(parallel, "wide", "bf16", 1024, recompute),
                Case(parallel, "odd", "fp32", 128, recompute),
            ]
        found.append(Case(parallel, "wide", "bf16", 1024))
    found += [Case({}, attention="reference"), Case({"tp": 2}, "odd", attention="reference")]
    found.append(Case({"pp": 2, "vpp": 2}, recompute="full"))
    return [case for case in found if is_valid(case)]


def rows(case: Case) -> list[PackedRow]:
    """Full rows of two documents in which every token but the first of a document is a target."""
    random = np.random.default_rng(3)
    half = case.length // 2
    documents = [
        Document(random.integers(0, case.model.vocab_size, half).astype(np.int32), np.ones(half, dtype=bool))
        for _ in range(2 * ROWS)
    ]
    return pack(documents, case.length)


class SavedBytes:
    """Context: `peak` is the most bytes of distinct storages saved for backward at one time."""

    def __init__(self, ignored: set[int]) -> None:
        self.ignored, self.live, self.peak = ignored, {}, 0  # type: ignore[var-annotated]
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self.ignored:
            return [tensor]
        holder = _Holder(tensor)
        uses, size = self.live.get(key, (0, storage.nbytes()))
        self.live[key] = (uses + 1, size)
        weakref.finalize(holder, self._drop, key)
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return holder

    def _unpack(self, packed: Any) -> Tensor:
        return packed[0] if isinstance(packed, list) else packed.tensor  # type: ignore[no-any-return]

    def _drop(self, key: int) -> None:
        uses, size = self.live.pop(key)
        if uses > 1:
            self.live[key] = (uses - 1, size)


class _Holder:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def measure(case: Case) -> dict[str, int]:
    """What this rank holds in `case`, and its place in the layout."""
    layout = init_layout(case.layout)
    settings = OptimizerConfig(warmup_steps=0)
    engine = Engine(case.model, case.layout, layout, case.train, settings)
    load_weights(engine.models, case.model, random_weights(case.model, 7), layout.tp_rank, layout.tp)
    engine.sync_optimizer()
    _, weight_places = storage_bytes(p.data for model in engine.models for p in model.parameters())
    with SavedBytes(weight_places) as saved:
        result = engine.train_step(rows(case), sft_loss, 1e-3)
    assert result.applied
    assert result.count == 2 * ROWS * (case.length // 2 - 1)
    return {
        "pp_rank": layout.pp_rank,
        "shard": dist.get_rank(engine.chunks[0].dp_cp_group),
        **dataclasses.asdict(measured_states(engine)),
        "activations": saved.peak,
    }


def run(payload: dict[str, Any]) -> dict[str, list[dict[str, int]]] | None:
    """Measure every case of this job's world size; {case: [one entry per rank]}."""
    results: dict[str, list[dict[str, int]]] = {}
    for case in cases():
        if case.layout.world_size != payload["world_size"]:
            continue
        mine = measure(case)
        everyone: list[Any] = [None] * payload["world_size"]
        dist.all_gather_object(everyone, mine)
        results[case.name] = everyone
    return results
