"""The program behind `test_hf.py`: logits of a model folder under several layouts, in one job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from phi4r.configs.sections import ParallelConfig
from phi4r.models.gpt import build_model
from phi4r.models.head import HeadRequest
from phi4r.models.packed import PackedContext
from phi4r.parallel.layout import init_layout
from phi4r.train.checkpoint import load_model
from phi4r.train.folders import read_model_config


@torch.no_grad()
def logits_of(folder: Path, parallel: ParallelConfig, ids: Tensor) -> Tensor | None:
    """Logits fp32 [T, V] of the document `ids` int64 [T] on the ranks of the last stage, None on others."""
    init_layout(parallel)
    chunks = build_model(read_model_config(folder), parallel)
    load_model(folder, chunks)
    length = len(ids)
    bounds = torch.tensor([0, length], dtype=torch.int32)
    outputs: list[Tensor] = []

    def forward_step(_: Any, model: Any) -> tuple[Tensor, Any]:
        context = PackedContext(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=length,
            max_seqlen_kv=length,
            position_ids=torch.arange(length),
            num_tokens=length,
        )

        def collect(logits_TV: Tensor, non_loss_data: bool = False) -> Tensor:
            outputs.append(logits_TV)
            return logits_TV

        return model(ids[None], context, HeadRequest(logits_at=torch.arange(length))), collect

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([None]),
        model=chunks[0].eval(),
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return outputs[0] if outputs else None


def run(payload: dict[str, Any]) -> None:
    """For each of payload["layouts"] (name -> sizes) write the logits of payload["folder"] to OUT/NAME.pt."""
    ids = torch.load(payload["ids"])
    for name, sizes in payload["layouts"].items():
        logits = logits_of(Path(payload["folder"]), ParallelConfig(**sizes), ids)
        if logits is not None and dist.get_rank() == dist.get_world_size() - 1:
            torch.save(logits, Path(payload["out"]) / f"{name}.pt")
