"""The program behind `test_parity.py`: log-probs, gradients and weights after two steps under several
layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from phi4r.configs.sections import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from phi4r.convert.live import whole_weights
from phi4r.data.packing import Document, PackedRow, pack
from phi4r.models.names import from_mcore, local_weights, unshard, weight_table
from phi4r.parallel.layout import Layout, init_layout
from phi4r.train.checkpoint import load_model
from phi4r.train.engine import Engine, sft_loss
from phi4r.train.folders import read_model_config

ROW = 48
LR = 1e-2
# A large eps: a step is then a smooth function of the gradient, also where that is about 0.
OPTIMIZER = OptimizerConfig(weight_decay=0.1, clip_grad=0.5, beta1=0.9, beta2=0.98, eps=1e-3)


def gather(values: dict[str, Tensor], model: ModelConfig, layout: Layout) -> dict[str, list[Tensor]]:
    """HF name -> the full tensor from every pipeline stage that holds the weight."""
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, (layout.pp_rank, layout.tp_rank, layout.cp_rank, values))
    held = sorted((item for item in held if item[2] == 0), key=lambda item: item[:2])
    found = {}
    for weight in weight_table(model):
        stages = {item[0] for item in held if weight.hf in item[3]}
        found[weight.hf] = [
            from_mcore(weight, unshard(weight, [i[3][weight.hf] for i in held if i[0] == stage]))
            for stage in sorted(stages)
        ]
    return found


def run(payload: dict[str, Any]) -> None:
    """For each of payload["layouts"] (name -> sizes) and payload["folders"], write FOLDER/NAME.pt."""
    documents = torch.load(payload["documents"], weights_only=False)
    rows = pack([Document(tokens, mask) for tokens, mask in documents], ROW)
    for name, sizes in payload["layouts"].items():
        parallel = ParallelConfig(distributed_optimizer=False, **sizes)
        layout = init_layout(parallel)
        for folder in map(Path, payload["folders"]):
            found = results(folder / "hf", parallel, layout, rows)
            if dist.get_rank() == 0:
                torch.save(found, folder / f"{name}.pt")


def results(folder: Path, parallel: ParallelConfig, layout: Layout, rows: list[PackedRow]) -> dict[str, Any]:
    """What a model folder gives under a layout; tensors on rank 0 only where they are exported."""
    model = read_model_config(folder)

    def open_engine(**changes: Any) -> Engine:
        optimizer = replace(OPTIMIZER, **changes)
        engine = Engine(model, parallel, layout, TrainConfig(logit_chunk_size=10), optimizer)
        load_model(folder, engine.chunks)
        engine.sync_optimizer()
        return engine

    engine = open_engine(clip_grad=0.0)  # clipping would scale the gradients
    found: dict[str, Any] = {"logprobs": engine.forward(rows, masked=False)[0], "rows": rows}
    result = engine.train_step(rows, sft_loss, lr=0.0)
    found |= {"loss": result.loss, "grad_norm": result.grad_norm}
    grads = {w.hf: p.main_grad for w, p in local_weights(engine.models, model)}
    found["grads"] = gather(grads, model, layout)
    engine = open_engine()
    for _ in range(2):
        engine.train_step(rows, sft_loss, lr=LR)
    weights = {w.hf: p.detach() for w, p in local_weights(engine.models, model)}
    found["weights"] = gather(weights, model, layout)
    found["served"] = dict(whole_weights(engine.chunks, model, layout))
    return found
