"""`Loader`'s rows by way of NVIDIA DALI: `data.loader = "dali"`.

The order, the shares and the position are those of `phi4r.data.loader`. DALI's worker processes make the
arrays of this rank's rows (its external source), its pipeline queues them, and on a machine with a GPU copies
them there beside the computation. A step's rows then hold tensors (`ShardRow.placed`) that the engine takes
instead of making its own; what else asks for a row reads the shard as ever.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np

from phi4r.core import optional
from phi4r.core.errors import UserError
from phi4r.core.seeds import Stream
from phi4r.data.loader import StepRows
from phi4r.data.packing import PackedRow
from phi4r.data.shards import ShardRow, ShardRows

NAMES = ("input_ids", "labels", "position_ids", "loss_mask")


class _Source:
    """What DALI's workers call: iteration -> the arrays of this rank's rows, a list by name."""

    def __init__(self, order: StepRows, first_step: int, last_step: int) -> None:
        self.order, self.first_step, self.last_step = order, first_step, last_step

    def __call__(self, iteration: int) -> tuple[list[np.ndarray], ...]:
        step = self.first_step + iteration
        if step >= self.last_step:
            raise StopIteration
        batch, mine = self.order.batch(step)
        return tuple([getattr(batch[index], name) for index in mine] for name in NAMES)


class DaliLoader:
    """A context manager with the `next` of `Loader`, over a shard folder. workers: processes that read.
    UserError where DALI is not installed or `rows` are not of a shard folder."""

    def __init__(
        self,
        rows: Any,
        *,
        seed: int,
        stream: Stream,
        rows_per_step: int,
        first_step: int,
        last_step: int,
        dp: int = 1,
        dp_rank: int = 0,
        depth: int = 2,
        deadline_s: float = 600.0,
        workers: int = 1,
        gpu: int | None = None,
    ) -> None:
        """gpu: the device to place rows on (None: host memory)."""
        self._dali = optional.require("nvidia.dali")
        if not isinstance(rows, ShardRows):
            raise UserError("data.loader: dali reads shards: expected data.path made by `phi4r data build`")
        self.order = StepRows(rows, seed, stream, rows_per_step, dp, dp_rank)
        self.first_step, self.last_step, self.deadline_s = first_step, last_step, deadline_s
        self.wait_s = 0.0
        """Seconds that the last step's rows were waited for."""
        self._next_step, self._gpu = first_step, gpu
        self._pipeline = self._build(depth, workers)
        self._runner = ThreadPoolExecutor(1, thread_name_prefix="dali")

    def _build(self, depth: int, workers: int) -> Any:
        from nvidia.dali import fn, types

        pipeline = self._dali.Pipeline(
            batch_size=self.order.rows_per_step // self.order.dp,
            num_threads=1,
            device_id=self._gpu,
            prefetch_queue_depth=depth,
            py_num_workers=workers,
            py_start_method="spawn",  # ranks have threads, which do not survive a fork
        )
        with pipeline:
            outputs = fn.external_source(
                source=_Source(self.order, self.first_step, self.last_step),
                num_outputs=len(NAMES),
                batch=True,
                parallel=True,
                prefetch_queue_depth=depth,
                dtype=[types.INT64, types.INT64, types.INT64, types.FLOAT],
            )
            if self._gpu is not None:
                outputs = [output.gpu() for output in outputs]
            pipeline.set_outputs(*outputs)
        return pipeline

    def __enter__(self) -> DaliLoader:
        self._pipeline.build()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._runner.shutdown(wait=False, cancel_futures=True)
        self._pipeline = None  # ends its workers

    def next(self) -> list[PackedRow]:
        """The rows of the next step, those of this rank with their tensors. After the last one:
        StopIteration."""
        from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor

        step = self._next_step
        if step >= self.last_step:
            raise StopIteration
        self._next_step += 1
        began = time.perf_counter()
        batch, mine = self.order.batch(step)
        try:
            outputs = self._runner.submit(self._pipeline.run).result(self.deadline_s)
        except TimeoutError:
            raise RuntimeError(
                f"the rows of step {step + 1} did not come from DALI within {self.deadline_s:g} s"
            ) from None
        for name, output in zip(NAMES, outputs, strict=True):
            tensor = to_torch_tensor(output.as_tensor(), True)
            for place, index in enumerate(mine):
                row = batch[index]
                assert isinstance(row, ShardRow)
                row.placed[name] = tensor[place]
        self.wait_s = time.perf_counter() - began
        return batch
