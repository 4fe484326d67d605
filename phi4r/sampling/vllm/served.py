"""Fixed weights on vLLM servers: what evaluation, curation and generation sample from. One process, no ranks.

A phi4r checkpoint is exported to a Hugging Face folder first (and the folder removed when the stage is done);
a Hugging Face folder is served as it is. Servers that phi4r starts begin with that folder, servers given by
address load it; either way the digests of their parameters are compared with the folder's before the first
request, as in RL.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from phi4r.configs.sections import ModelConfig, SamplingConfig, VLLMConfig
from phi4r.convert.hf import phi4r_to_hf
from phi4r.convert.live import SERVED, served_model
from phi4r.core.console import say
from phi4r.models.huggingface import HFWeights
from phi4r.parallel.heartbeat import beat
from phi4r.sampling.ledger import weights_digest
from phi4r.sampling.types import Completion, OnAnswer, SampleRequest, SamplingOptions
from phi4r.sampling.vllm.fleet import VLLM_DTYPES, Fleet, Weights, new_members
from phi4r.sampling.vllm.weights import Comparison, compare
from phi4r.train.folders import read_model_config, resolve_checkpoint

Result = TypeVar("Result")

BEAT_S = 10.0


class ServedSampler:
    """Samples from the servers of `fleet`, which hold their weights."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def generate(
        self, requests: Sequence[SampleRequest], options: SamplingOptions, on_answer: OnAnswer
    ) -> list[Completion]:
        """See `Sampler`."""
        return asyncio.run(_in_touch(self.fleet.generate(requests, options, tell=on_answer)))


async def _in_touch(work: Coroutine[Any, Any, Result]) -> Result:
    """`work`'s result; meanwhile this process gives signs of life: every part of it has a deadline."""
    task = asyncio.create_task(work)
    while not task.done():
        await asyncio.wait({task}, timeout=BEAT_S)
        beat()
    return task.result()


@contextmanager
def open_served(
    checkpoint: str,
    stop_ids: Sequence[int],
    sampling: SamplingConfig,
    config: VLLMConfig,
    run_dir: Path,
    longest: int,
) -> Iterator[ServedSampler]:
    """Servers that hold `checkpoint`. stop_ids: token ids that end an answer; longest: prompt and response of
    a request, in tokens; run_dir: takes exported weights (unless vllm.weights_dir is set) and logs."""
    folder, is_exported = _hf_folder(checkpoint, config, run_dir)
    model = served_model(read_model_config(folder))
    key = os.environ.get("VLLM_API_KEY", "")
    on_cpu = not torch.cuda.is_available()
    members = new_members(config, VLLM_DTYPES[model.dtype], longest, on_cpu, run_dir / "logs", key)
    fleet = Fleet(config, sampling, members, sorted(stop_ids), key=key)
    weights = Weights(0, folder, lambda found: _verified(folder, model, found))
    try:
        held = asyncio.run(_in_touch(fleet.load(weights)))
        say(f"vllm: {len(held)} of {len(members)} servers hold {folder}")
        yield ServedSampler(fleet)
    finally:
        fleet.close()
    if is_exported:
        shutil.rmtree(folder, ignore_errors=True)


def _hf_folder(checkpoint: str, config: VLLMConfig, run_dir: Path) -> tuple[Path, bool]:
    """The Hugging Face folder of a checkpoint, absolute, and whether it was exported for this stage."""
    kind, folder = resolve_checkpoint(checkpoint)
    if kind == "hf":
        return folder.resolve(), False
    root = (Path(config.weights_dir) if config.weights_dir else run_dir / "weights").resolve()
    exported = root / f"served_{weights_digest(folder)}"
    if not exported.exists():
        phi4r_to_hf(folder, exported)
    return exported, True


def _verified(folder: Path, model: ModelConfig, found: dict[str, str]) -> Comparison:
    weights, dtype = HFWeights(folder), SERVED[model.dtype]
    return compare(lambda name: weights.get_tensor(name).to(dtype), model, found)
