"""The program behind `test_layouts.py`: goes through many layouts in one launch and writes what each one
computed.

Run as ranks of one job: every case of the job's world size is trained for a few optimizer steps on fixed
rows, with SFT's loss and with the GRPO objective, and rank 0 writes {case: {"loss": [...], "grad_norm":
[...]}}.
"""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from phi4r_kernels.linear_loss import LinearLossResult
from torch import Tensor

from phi4r.configs.sections import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig, TrainConfig
from phi4r.convert.live import export_live, hand_over, whole_weights
from phi4r.data.packing import Document, PackedRow, pack
from phi4r.models.head import LossRequest
from phi4r.models.huggingface import HFWeights
from phi4r.models.names import load_weights, random_weights
from phi4r.models.packed import PackedContext
from phi4r.parallel.layout import init_layout
from phi4r.rl.batch import policy_loss
from phi4r.sampling.embedded import EmbeddedEngine
from phi4r.sampling.types import Completion, SampleRequest, SamplingOptions
from phi4r.sampling.vllm.transfer import Snapshot
from phi4r.train.engine import Engine, RowTensors, TokenLoss, sft_loss

STEPS, ROWS, LENGTH, VOCAB = 5, 4, 64, 64
MODEL = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, head_dim=8,
    vocab_size=VOCAB, max_position_embeddings=LENGTH,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=0, decay="constant", weight_decay=0.1, clip_grad=0.5)


@dataclass(frozen=True)
class Case:
    """A layout, how rows are filled, the loss, and perhaps a planted bug. pp3 cuts the four layers unevenly:
    2, 1, 1."""

    layout: str
    parallel: dict[str, Any] = field(default_factory=dict)
    packed: bool = True
    loss: str = "sft"
    dtype: str = "fp32"
    recompute: str = "none"
    bug: str = ""
    num_layers: int = 4

    @property
    def name(self) -> str:
        parts = [
            self.layout,
            "packed" if self.packed else "unpacked",
            self.loss,
            self.dtype,
            self.recompute,
            self.bug,
            f"{self.num_layers} layers" if self.num_layers != 4 else "",
        ]
        return "-".join(p for p in parts if p and p not in ("none", "fp32"))


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tp": 2},
    "tp2sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "pp2vpp2": {"pp": 2, "vpp": 2},
    "dp2": {"dp": 2, "distributed_optimizer": False},
    "dp2distopt": {"dp": 2},
    "dp2distopt_overlap": {"dp": 2, "overlap": True},
    "cp2": {"cp": 2},
    "tp2pp2": {"tp": 2, "pp": 2},
    "tp2cp2": {"tp": 2, "cp": 2},
    "tp2dp2": {"tp": 2, "dp": 2},
    "tp2sp_pp2": {"tp": 2, "sp": True, "pp": 2},
    "pp3": {"pp": 3},
    "pp4": {"pp": 4},
    "pp2_uneven": {"pp": 2, "stage_layers": "3,1"},
}
FP64_LAYOUTS = ("tp1", "tp2sp", "pp2", "cp2", "dp2distopt", "tp2pp2")
GRPO_LAYOUTS = ("tp1", "tp2", "tp2sp", "pp2", "pp2vpp2", "cp2", "dp2distopt", "tp2pp2", "tp2cp2")
GSPO_LAYOUTS = ("tp1", "tp2", "cp2", "tp2cp2")


def cases() -> list[Case]:
    """Every case of the matrix."""
    matrix = [
        Case(layout, parallel, packed)
        for layout, parallel in LAYOUTS.items()
        for packed in (True, False)
        if layout not in ("pp4",)
    ]
    matrix += [Case(layout, LAYOUTS[layout], loss="grpo") for layout in GRPO_LAYOUTS]
    matrix += [Case(layout, LAYOUTS[layout], loss="gspo") for layout in GSPO_LAYOUTS]
    matrix += [Case(layout, LAYOUTS[layout], dtype="bf16") for layout in ("tp1", "dp2distopt", "pp2")]
    matrix += [Case(layout, LAYOUTS[layout], dtype="fp64") for layout in FP64_LAYOUTS]
    matrix += [
        Case(layout, LAYOUTS[layout], recompute=r)
        for layout in ("tp1", "tp2sp")
        for r in ("selective", "full")
    ]
    matrix += [
        Case("pp4", LAYOUTS["pp4"]),
        Case("tp1", num_layers=6),
        Case("pp2vpp2_uneven", {"pp": 2, "vpp": 2, "stage_layers": "2,2,1,1"}, num_layers=6),
        Case("pp4", LAYOUTS["pp4"], bug="middle_stages_lose_cu_seqlens"),
        Case("dp2distopt", LAYOUTS["dp2distopt"], bug="loss_averaged_per_microbatch"),
        Case("tp1", {}, bug="loss_averaged_per_microbatch"),
    ]
    return matrix


def world_size(case: Case) -> int:
    return ParallelConfig(**case.parallel).world_size


def rows(packed: bool, step: int) -> list[PackedRow]:
    """Rows with documents of uneven length and masks, so that ranks hold different numbers of targets."""
    random = np.random.default_rng(1000 + step)
    documents: list[Document] = []
    while True:
        length = int(random.integers(1, 30)) if packed else int(random.integers(10, LENGTH + 1))
        tokens = random.integers(0, VOCAB, length).astype(np.int32)
        mask = np.arange(length) >= random.integers(0, length)
        extras = {
            "advantages": np.full(length, random.normal(), np.float32),
            "weights": mask.astype(np.float32),
            "counts": mask.astype(np.float32),
            "rollout_logprobs": random.normal(-3, 1, length).astype(np.float32),
            "old_logprobs": random.normal(-4, 0.5, length).astype(np.float32),
            "ref_logprobs": random.normal(-4, 0.5, length).astype(np.float32),
        }
        trial = [*documents, Document(tokens, mask, extras)]
        filled = pack(trial, LENGTH) if packed else [row for d in trial for row in pack([d], LENGTH)]
        if len(filled) > ROWS:
            return (
                pack(documents, LENGTH) if packed else [row for d in documents for row in pack([d], LENGTH)]
            )
        documents = trial


class AveragesPerMicrobatch(Engine):
    """The classic bug: a mean per microbatch, then a mean of means."""

    def _loss_request(self, loss: TokenLoss, context: PackedContext, tensors: RowTensors) -> LossRequest:
        request = super()._loss_request(loss, context, tensors)
        weights_T = request.weights_T
        return replace(request, weights_T=weights_T / weights_T.sum().clamp(min=1))


def count_of_one(result: LinearLossResult, row: RowTensors) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.ones_like(row["loss_mask"].sum()), {"loss": result.loss.detach()}


class LosesDocuments(Engine):
    """The other classic bug: stages between the first and the last see one long document."""

    def _inputs(self, row: PackedRow) -> tuple[Tensor, PackedContext, RowTensors]:
        ids, context, tensors = super()._inputs(row)
        if 0 < self.layout.pp_rank < self.layout.pp - 1:
            context.cu_seqlens_q = context.cu_seqlens_kv = torch.tensor(
                [0, context.num_tokens], dtype=torch.int32
            )
            context.position_ids = torch.arange(context.num_tokens)
        return ids, context, tensors


def train(case: Case) -> dict[str, list[float]]:
    """Losses and gradient norms of a few optimizer steps of `case`, from the same weights in every layout."""
    parallel = ParallelConfig(**case.parallel)
    layout = init_layout(parallel)
    model = replace(MODEL, dtype=case.dtype, num_layers=case.num_layers)  # type: ignore[arg-type]
    kinds = {
        "middle_stages_lose_cu_seqlens": LosesDocuments,
        "loss_averaged_per_microbatch": AveragesPerMicrobatch,
    }
    kind = kinds.get(case.bug, Engine)
    settings = TrainConfig(recompute=case.recompute, logit_chunk_size=24)  # type: ignore[arg-type]
    engine = kind(model, parallel, layout, settings, OPTIMIZER)
    load_weights(engine.models, model, random_weights(model, 7), layout.tp_rank, layout.tp)
    engine.sync_optimizer()
    loss: TokenLoss = sft_loss
    if case.loss in ("grpo", "gspo"):
        objective = ObjectiveConfig(
            kl_reference="ref", kl_coef=0.1, entropy_coef=0.05, dual_clip=3.0, importance_cap=2.0,
            ratio="token" if case.loss == "grpo" else "sequence",
        )  # fmt: skip
        loss = policy_loss(objective, on_policy=False)
    elif case.bug == "loss_averaged_per_microbatch":
        loss = replace(sft_loss, report=count_of_one)
    losses, norms = [], []
    for step in range(STEPS):
        result = engine.train_step(
            rows(case.packed, step), loss, OPTIMIZER.lr, with_entropy=case.loss != "sft"
        )
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return {"loss": losses, "grad_norm": norms}


SAMPLING_LAYOUTS = ("tp1", "tp2", "tp2sp", "pp2", "pp2vpp2", "dp2distopt", "cp2", "tp2pp2", "tp2sp_pp2")


def sample(parallel_settings: dict[str, Any]) -> list[list[int]]:
    """Tokens sampled by the embedded engine from the same weights and counters, with fewer slots than
    requests; then the same continuously: three draws at once, each interrupted when an earlier one is
    whole."""
    parallel = ParallelConfig(**parallel_settings)
    layout = init_layout(parallel)
    engine = Engine(MODEL, parallel, layout, TrainConfig())
    load_weights(engine.models, MODEL, random_weights(MODEL, 7), layout.tp_rank, layout.tp)
    random = np.random.default_rng(5)
    requests = [
        SampleRequest(tuple(random.integers(0, VOCAB, int(random.integers(1, 9))).tolist()), (0, number))
        for number in range(11)
    ]
    sampler, options = EmbeddedEngine(engine, stop_ids=[3, 4], num_slots=4), SamplingOptions(20)
    completions = sampler.generate(requests, options)
    for number in range(3):
        drawn = requests[4 * number : 4 * number + 4]
        sampler.open(number, drawn, options, [Completion()] * len(drawn))
    for number in range(3):
        completions += sampler.finish(number)
    return [completion.tokens for completion in completions]


def export(parallel_settings: dict[str, Any], folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a Hugging Face folder written from live weights, in shards of a few tensors.
    What is broadcast to servers is the same."""
    parallel = ParallelConfig(**parallel_settings)
    layout = init_layout(parallel)
    engine = Engine(MODEL, parallel, layout, TrainConfig())
    load_weights(engine.models, MODEL, random_weights(MODEL, 7), layout.tp_rank, layout.tp)
    export_live(engine.chunks, MODEL, layout, folder, (3, 4), None, max_shard_bytes=20_000)
    whole = whole_weights(engine.chunks, MODEL, layout)
    if layout.is_main:
        snapshot, written = Snapshot(MODEL), HFWeights(folder)
        snapshot.fill(whole)
        for name in snapshot.shapes:
            assert torch.equal(snapshot.get_tensor(name), written.get_tensor(name)), name
    else:
        hand_over(whole)
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*"))}


def run(payload: dict[str, Any]) -> None:
    """Train and sample in every layout of this job's world size; rank 0 writes the results to
    payload["out"]."""
    results: dict[str, Any] = {}
    for case in cases():
        if world_size(case) == payload["world_size"]:
            results[case.name] = train(case)
            gc.collect()  # an engine that is gone but not collected keeps its groups, and they their threads
    for name in SAMPLING_LAYOUTS:
        if ParallelConfig(**LAYOUTS[name]).world_size == payload["world_size"]:
            results[f"{name}-samples"] = sample(LAYOUTS[name])
            results[f"{name}-export"] = export(LAYOUTS[name], Path(payload["out"]).parent / name)
    if torch.distributed.get_rank() == 0:
        Path(payload["out"]).write_text(json.dumps(results))
