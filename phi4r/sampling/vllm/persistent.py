"""The prompt batches that servers sample over several updates of the weights, on rank 0.

They outlive what works on them: between two updates the engine's thread lays them on a board, oldest first,
and hears what becomes of them; the trainer's thread opens batches, waits for them and stops the board.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from phi4r.sampling.types import Completion, PromptBatch, Span
from phi4r.sampling.vllm.fleet import Board, Fleet


class _Work:
    """What lies on the board between two updates. In the engine's thread, but for what it is made with."""

    def __init__(self, batches: dict[int, PromptBatch], tell: Callable[[int, int, Completion], None]) -> None:
        self.batches, self.tell = batches, tell
        self.is_stopped = False
        """Set by the trainer's thread: end, now or as soon as it begins."""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.board: Board | None = None
        self.places: list[tuple[int, int]] = []
        """(batch, request) of what is on the board."""
        self.laid_out: set[int] = set()

    def call(self, function: Callable[[], None]) -> None:
        """Run it in the engine's thread, if there is work there; what begins later finds out by itself."""
        if (loop := self.loop) is not None:
            with contextlib.suppress(RuntimeError):  # it has just ended; whoever waits is told why
                loop.call_soon_threadsafe(function)

    def update(self) -> None:
        """Lay out what was opened, and stop if that was asked for."""
        assert self.board is not None
        for number in sorted(set(self.batches) - self.laid_out):
            batch = self.batches[number]
            self.laid_out.add(number)
            missing = [i for i, answer in enumerate(batch.answers) if not answer.is_complete(batch.options)]
            self.places += [(number, i) for i in missing]
            self.board.add([batch.requests[i] for i in missing], [batch.answers[i] for i in missing])
        if self.is_stopped and not self.board.finished.is_set():
            self.board.stop()

    async def run(self, fleet: Fleet) -> None:
        """Have the servers sample until it is stopped."""
        self.board = Board(
            [], persists=True, tell=lambda place, answer, server: self.tell(*self.places[place], answer)
        )
        options = next(iter(self.batches.values())).options
        self.loop = asyncio.get_running_loop()
        try:
            self.update()
            await fleet.work(self.board, options)
        finally:
            self.loop = None


class BusyTime:
    """When servers sampled. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None
        self._spans: list[Span] = []

    def mark(self, is_busy: bool) -> None:
        """From now on they do, or do not."""
        with self._lock:
            self._close()
            self._since = time.perf_counter() if is_busy else None

    def take(self) -> list[Span]:
        """The spans since this was last asked; one that goes on is cut here."""
        with self._lock:
            is_busy = self._since is not None
            self._close()
            self._since = time.perf_counter() if is_busy else None
            taken, self._spans = self._spans, []
        return taken

    def _close(self) -> None:
        if self._since is not None:
            self._spans.append((self._since, time.perf_counter()))


class PersistentBatches:
    """The open batches. Methods are for the trainer's thread."""

    def __init__(self) -> None:
        self.batches: dict[int, PromptBatch] = {}
        self.busy = BusyTime()
        self.complete: dict[int, Future[list[Completion]]] = {}
        """Resolved when the batch is whole, or when what served it has failed."""
        self._work = _Work(self.batches, self._tell)
        self._is_serving = False

    def open(self, number: int, batch: PromptBatch) -> None:
        """One more; its number is higher than those before."""
        self.complete[number] = Future()
        self.batches[number] = batch
        if batch.is_complete:
            self.complete[number].set_result(batch.answers)
        elif self._is_serving:
            self.busy.mark(True)
        self._work.call(self._work.update)

    def close(self, number: int) -> None:
        """A whole batch is open no more."""
        del self.batches[number], self.complete[number]

    def known(self) -> dict[int, list[Completion]]:
        """What there is of every answer, as far as the trainer knows."""
        return {number: [*batch.answers] for number, batch in self.batches.items()}

    def stop(self) -> None:
        """End `serve`, now or as soon as it begins."""
        self._is_serving = False
        self.busy.mark(False)
        self._work.is_stopped = True
        self._work.call(self._work.update)

    def serve(self, fleet: Fleet, begin: Callable[..., Future[None] | None]) -> Future[None] | None:
        """Have the servers sample until `stop`; begin: runs a coroutine's function in the engine's thread."""
        work = self._work = _Work(self.batches, self._tell)
        self._is_serving = True
        self.busy.mark(self._is_work_left())
        job = begin(lambda: work.run(fleet))
        assert job is not None
        job.add_done_callback(self._ended)
        return job

    def _tell(self, number: int, index: int, answer: Completion) -> None:
        batch = self.batches[number]
        batch.answers[index] = answer
        if batch.is_complete:
            if not self._is_work_left():
                self.busy.mark(False)
            self.complete[number].set_result(batch.answers)

    def _is_work_left(self) -> bool:
        return not all(batch.is_complete for batch in list(self.batches.values()))

    def _ended(self, job: Future[None]) -> None:
        error = job.exception()
        if error is not None:
            for complete in list(self.complete.values()):
                if not complete.done():
                    complete.set_exception(error)
