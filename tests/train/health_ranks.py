"""Jobs of several ranks in which one goes wrong (`test_health.py`): it drifts, hangs, dies or stops."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi4r.configs.sections import CheckpointConfig, DataConfig, ParallelConfig, TrainConfig
from phi4r.configs.stages import SFTConfig
from phi4r.data.tokenizer import Tokenizer
from phi4r.train.engine import sft_loss
from phi4r.train.loop import open_loop
from tests.train import checkpoint_ranks as ranks

BAD_RANK, BAD_STEP = 1, 2


def hang_here() -> None:
    """What the stack of the bad rank should show."""
    time.sleep(600)


def go_wrong(how: str, parameter: Tensor) -> None:
    """Do it, on the bad rank."""
    if how == "hang":
        hang_here()
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "raise":
        raise ValueError("the cause")
    elif how == "drift":
        bits = parameter.data.view(-1)[:1].view(torch.int32)
        bits ^= 1  # the last bit of one weight
    elif how == "nan":
        parameter.data.view(-1)[0] = float("nan")


def run(job: dict[str, Any]) -> None:
    """Train job["dp"] replicas for 6 steps; before step BAD_STEP one of them does what job["how"] says."""
    parallel = ParallelConfig(dp=job["dp"], timeout_s=job["timeout_s"], distributed_optimizer=False)
    settings = TrainConfig(
        num_steps=6, global_batch_size=job["dp"], check_replicas_every=1, max_nonfinite_steps=1
    )
    no_saving = CheckpointConfig(every=0, save_final=False)
    data = DataConfig(seq_length=ranks.LENGTH)
    config = SFTConfig(model=ranks.MODEL, data=data, parallel=parallel, train=settings, checkpoint=no_saving)
    engine = ranks.make_engine(parallel.__dict__)
    with open_loop(config, Path(job["folder"]), engine, Tokenizer.builtin(), "sft") as loop:
        for step in loop.steps():
            loop.begin_step()
            rows = ranks.rows(step)
            if step == BAD_STEP and engine.layout.rank == BAD_RANK:
                go_wrong(job["how"], next(engine.models[0].parameters()))
            result = engine.train_step(rows, sft_loss, 1e-3)
            loop.check_finite(step, result, rows)
            loop.finish_step(step, {"loss": result.loss}, {}, 1)
