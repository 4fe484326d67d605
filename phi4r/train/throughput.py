"""Where the time of a step goes, on every rank, and what it is worth: tokens per second, MFU, who is slow.

MFU is model FLOPs (`ModelConfig.training_flops`) over seconds x ranks x the GPU's dense bf16 peak; it is
left out on other devices.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from phi4r.configs.sections import ModelConfig
from phi4r.data.packing import PackedRow
from phi4r.plan.hardware import GPUS
from phi4r.train.engine import Engine

GIB = 1 << 30


def model_flops(model: ModelConfig, rows: Sequence[PackedRow]) -> float:
    """Forward and backward FLOPs of training on `rows`."""
    tokens = squares = 0
    for row in rows:
        lengths = np.unique(row.doc_index[row.doc_index >= 0], return_counts=True)[1].astype(np.int64)
        tokens += int(lengths.sum())
        squares += int((lengths**2).sum())
    return model.training_flops(tokens, squares)


def peak_flops(device: torch.device) -> float:
    """Dense bf16 FLOP/s of the data sheet, 0 where the device is none of those that have one here."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device).upper()
    return next((gpu.peak_tflops * 1e12 for gpu in GPUS.values() if gpu.name in name), 0.0)


class StepClock:
    """Measures the steps of one rank; `columns` puts the ranks together.

    A rank's own time is that of its microbatches, from the start of the phase "train" to the moment at which
    its gradients are ready to be summed: after that it waits for the slowest.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._peak = engine, peak_flops(engine.layout.device)
        self._is_cuda = engine.layout.device.type == "cuda"
        self._phases: dict[str, float] = {}
        self._phase, self._began = "", 0.0
        self._marks: list[tuple[Any, Any]] = []
        self._flops = 0.0
        self._step_began = time.perf_counter()
        self._unix = time.time() - self._step_began
        self._spans: list[list[Any]] = []
        self._is_first = True
        self._train_mark: Any = None
        summed = engine.config.finalize_model_grads_func

        def ready(*arguments: Any, **options: Any) -> Any:
            self._marks.append((self._train_mark, self._mark()))
            result = summed(*arguments, **options)
            self._train_mark = self._mark()  # a second update of the same step counts from here
            return result

        engine.config.finalize_model_grads_func = ready

    def _mark(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # the host does not wait for it
        event.record()
        return event

    def _own_seconds(self) -> float:
        if self._is_cuda:
            return sum(start.elapsed_time(end) for start, end in self._marks if start is not None) / 1e3
        return sum(end - start for start, end in self._marks if start is not None)

    def begin(self) -> None:
        """A step begins, with the phase "data"."""
        self._phases, self._marks, self._flops, self._phase = {}, [], 0.0, ""
        self._spans, began = [], self._step_began
        self._step_began = time.perf_counter()
        if self._is_first:
            self._span("trainer", "start", began, self._step_began)
            self._is_first = False
        self.phase("data")

    def phase(self, name: str) -> None:
        """The phase before ends, and `name` ("data", "rollout", "sync", "train" or "eval") begins."""
        now = time.perf_counter()
        if self._phase:
            self._phases[self._phase] = self._phases.get(self._phase, 0.0) + now - self._began
            self._span("trainer", self._phase, self._began, now)
        self._phase, self._began = name, now
        if name == "train":
            self._train_mark = self._mark()

    def _span(self, lane: str, what: str, began: float, ended: float) -> None:
        start, end = (round(self._unix + seconds, 3) for seconds in (began, ended))
        if end > start:
            self._spans.append([lane, what, start, end])

    def sampled(self, spans: Sequence[tuple[float, float]]) -> None:
        """The rollout engines sampled what this step uses from .. to (`time.perf_counter`), in this step or
        before."""
        for began, ended in spans:
            self._span("rollouts", "sampling", began, ended)

    def add_work(self, rows: Sequence[PackedRow]) -> None:
        """The step has trained on `rows` (all ranks')."""
        if self._peak:
            self._flops += model_flops(self._engine.model_config, rows)

    def columns(self, num_tokens: int) -> dict[str, Any]:
        """The step's wall-clock columns of metrics.jsonl. Collective.

        num_tokens: of all ranks. slowest_excess: the longest own time over the median rank's, minus 1.
        timeline: this rank's phases and the sampling, each [lane, what, start, end] in seconds since 1970;
        "start" is what came before the first step of this process.
        """
        self.phase("")
        seconds = max(time.perf_counter() - self._step_began, 1e-9)
        size, device = self._engine.layout.world_size, self._engine.layout.device
        peak = torch.cuda.max_memory_allocated(device) / GIB if self._is_cuda else 0.0
        mine = torch.tensor([self._own_seconds(), self._phases.get("data", 0.0), peak], device=device)
        everyone = [mine]
        if size > 1:
            everyone = [torch.empty_like(mine) for _ in range(size)]
            dist.all_gather(everyone, mine)
        own, waited, peaks = zip(*(values.tolist() for values in everyone), strict=True)
        found: dict[str, Any] = {
            "step_seconds": seconds,
            "tokens_per_second": num_tokens / seconds,
            "tokens_per_second_per_gpu": num_tokens / seconds / size,
            **{f"{name}_seconds": value for name, value in self._phases.items()},
            "data_seconds": max(waited),
            "timeline": self._spans,
        }
        if size > 1 and max(own) > 0:
            found["slowest_rank"] = own.index(max(own))
            found["slowest_excess"] = max(own) / max(statistics.median(own), 1e-9) - 1
        if self._is_cuda:
            found["peak_memory_gib"] = max(peaks)
        if self._peak and self._flops:
            found["mfu"] = self._flops / seconds / size / self._peak
        return found
