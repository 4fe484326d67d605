"""The program behind `test_resume.py`: steps, and a checkpoint between them, under a layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from phi4r.configs.sections import OptimizerConfig, ParallelConfig, TrainConfig
from phi4r.data.packing import Document, pack
from phi4r.parallel.layout import init_layout
from phi4r.train.checkpoint import load_checkpoint, load_model
from phi4r.train.engine import Engine, sft_loss
from phi4r.train.folders import find_latest, read_model_config
from phi4r.train.save import CheckpointSaver

ROW = 48


def run(payload: dict[str, Any]) -> None:
    """Open payload["hf"], or the newest checkpoint of payload["run"]; do payload["steps"] steps, save into
    the run, and write the losses to payload["out"]."""
    parallel = ParallelConfig(**payload["layout"])
    layout = init_layout(parallel)
    model = read_model_config(payload["hf"])
    engine = Engine(model, parallel, layout, TrainConfig(logit_chunk_size=10), OptimizerConfig(eps=1e-3))
    newest = find_latest(payload["run"])
    if newest is None:
        load_model(payload["hf"], engine.chunks)
        engine.sync_optimizer()
    else:
        load_checkpoint(newest, engine.chunks, engine.optimizer)
    documents = torch.load(payload["documents"], weights_only=False)
    rows = pack([Document(tokens, mask) for tokens, mask in documents], ROW)
    losses = [engine.train_step(rows, sft_loss, lr=1e-2).loss for _ in range(payload["steps"])]
    saver = CheckpointSaver(payload["run"], engine.chunks, engine.optimizer, model_cfg=model)
    saver.begin(payload["steps"], {})
    saver.wait()
    saver.close()
    if dist.get_rank() == 0:
        Path(payload["out"]).write_text(json.dumps(losses))
