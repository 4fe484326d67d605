"""Rows of each step, read ahead: a shuffled order that is a function of counters, and a thread that fetches.

There is no shuffle buffer and no reader state: the position is the number of rows that all ranks have taken
together, and row `position` of the run is a function of (seed, stream, position). So a checkpoint needs the
step only, and another number of data-parallel ranks goes on with exactly the next row.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType

import numpy as np

from phi4r.core.seeds import Stream, epoch_order
from phi4r.data.packing import PackedRow, my_share
from phi4r.data.shards import ShardRow

GET_S = 0.1
"""How often a waiting reader looks whether the fetching thread is alive."""


@lru_cache(maxsize=2)
def _order(seed: int, stream: Stream, epoch: int, num_rows: int) -> np.ndarray:
    return epoch_order(seed, stream, epoch, num_rows)


def row_at(position: int, num_rows: int, seed: int, stream: Stream) -> int:
    """The row that the run's `position`-th sample is: the epochs' permutations, one after another."""
    epoch, place = divmod(position, num_rows)
    return int(_order(seed, stream, epoch, num_rows)[place])


@dataclass(frozen=True)
class StepRows:
    """Which rows a step has, and which of them are this data-parallel rank's: functions of the step."""

    rows: Sequence[PackedRow]
    seed: int
    stream: Stream
    rows_per_step: int
    dp: int = 1
    dp_rank: int = 0

    def batch(self, step: int) -> tuple[list[PackedRow], list[int]]:
        """(the rows of `step`, the same on all ranks; the indices of those of this rank). Nothing but their
        documents' bounds is read of rows of a shard folder."""
        first, count = step * self.rows_per_step, len(self.rows)
        batch = [
            self.rows[row_at(first + i, count, self.seed, self.stream)] for i in range(self.rows_per_step)
        ]
        return batch, my_share(batch, self.dp, self.dp_rank)


class Loader:
    """The rows of steps `first_step` .. `last_step` - 1, in order, as a context manager.

    `next` gives a step's whole list of rows, the same on all ranks; of the rows of a shard folder only this
    rank's share (`phi4r.data.packing`) is read ahead, and another row is read if it is touched. `deadline_s`:
    seconds after which a step's rows are given up (RuntimeError). An error of the fetching thread is raised
    where its step is asked for.
    """

    def __init__(
        self,
        rows: Sequence[PackedRow],
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
    ) -> None:
        if not len(rows):
            raise ValueError("no rows to load")
        self.order = StepRows(rows, seed, stream, rows_per_step, dp, dp_rank)
        self.first_step, self.last_step = first_step, last_step
        self._next_step, self.deadline_s = first_step, deadline_s
        self.wait_s = 0.0
        """Seconds that the last step's rows were waited for."""
        self._queue: queue.Queue[list[PackedRow] | BaseException] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fetch, name="loader", daemon=True)

    def __enter__(self) -> Loader:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(self.deadline_s)

    def batch(self, step: int) -> list[PackedRow]:
        """The rows of `step`; those of this rank have been read."""
        batch, mine = self.order.batch(step)
        for index in mine:
            if isinstance(row := batch[index], ShardRow):
                row.load()
        return batch

    def _fetch(self) -> None:
        for step in range(self.first_step, self.last_step):
            try:
                item: list[PackedRow] | BaseException = self.batch(step)
            except BaseException as error:  # noqa: BLE001  (raised again in the thread that asks for the step)
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=GET_S)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set() or isinstance(item, BaseException):
                return

    def next(self) -> list[PackedRow]:
        """The rows of the next step. After the last one: StopIteration."""
        step = self._next_step
        if step >= self.last_step:
            raise StopIteration
        self._next_step += 1
        began = time.perf_counter()
        while True:
            try:
                item = self._queue.get(timeout=GET_S)
                break
            except queue.Empty:
                self.wait_s = time.perf_counter() - began
                if self.wait_s > self.deadline_s:
                    raise RuntimeError(
                        f"the rows of step {step + 1} were not read within {self.deadline_s:g} s"
                    ) from None
        self.wait_s = time.perf_counter() - began
        if isinstance(item, BaseException):
            raise item
        return item
