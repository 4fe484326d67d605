"""Verification in worker processes that cannot hang the caller.

Each worker has one question in flight. A worker that is late or dies is killed (SIGKILL), replaced, and its
question gets the outcome "timeout" or "error"; the others go on. A pool of executors with
`future.result(timeout)` cannot do that: it wedges for good after as many hanging answers as it has workers.

Most answers are settled in this process by text and exact rationals (`strict.decide_quickly`); workers
start when the first question needs algebra, so generated tasks never wait for a process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import cast

from phi4r.verify.extract import Extraction
from phi4r.verify.strict import Outcome, SymbolicQuestion, Verdict, decide_quickly

# A worker may be waiting for a core: its deadline counts CPU time; on the wall it has this many times more.
WALL_FACTOR = 4.0
START_TIMEOUT_S = 120.0
MAX_START_FAILURES = 3

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class VerifierUnavailableError(RuntimeError):
    """Workers cannot be started at all. This is our failure: it must never become anybody's reward."""


@dataclass
class _Task:
    """One question on its way: `id` is never used twice, `index` is its place in the caller's list."""

    id: int
    index: int
    question: SymbolicQuestion
    answer: str


def _cpu_seconds(pid: int) -> float | None:
    """CPU time a process has used, None where the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


class _Worker:
    """One worker process and the question it is at."""

    def __init__(self, timeout_s: float, memory_gib: float) -> None:
        # Only what the interpreter needs: no keys of the caller reach a process that handles model output.
        kept = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
        environment = {name: os.environ[name] for name in kept if name in os.environ} | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "phi4r.verify.worker"),
                *("--memory-gib", str(memory_gib), "--cpu-seconds", str(WALL_FACTOR * timeout_s)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            process_group=0,  # a Ctrl-C at the terminal is the parent's to handle
        )
        self.timeout_s = timeout_s
        self.ready = False
        self.num_done = 0
        self.task: _Task | None = None
        self.started = time.monotonic()
        self._cpu_at_start = 0.0
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def fileno(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def give(self, task: _Task) -> bool:
        """Send a question; False if the worker has died."""
        line = json.dumps({"id": task.id, **asdict(task.question)}) + "\n"
        assert self.process.stdin is not None
        self.started = time.monotonic()
        self._cpu_at_start = _cpu_seconds(self.pid) or 0.0
        try:
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except OSError:
            return False
        self.task = task
        return True

    def read(self) -> list[dict[str, object]] | None:
        """Complete replies that have arrived; None at the end of the worker."""
        chunk = os.read(self.fileno(), 65536)
        if not chunk:
            return None
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def seconds_left(self, now: float) -> float:
        """How long this worker may go on before it is looked at again; 0 or less: it is late."""
        elapsed = now - self.started
        if not self.ready:
            return START_TIMEOUT_S - elapsed
        if elapsed < self.timeout_s:
            return self.timeout_s - elapsed
        cpu = _cpu_seconds(self.pid)
        cpu_left = 0.0 if cpu is None else self.timeout_s - (cpu - self._cpu_at_start)
        return min(cpu_left, WALL_FACTOR * self.timeout_s - elapsed)

    def kill(self) -> None:
        """End the process now and collect it."""
        self.process.kill()
        self._close()

    def stop(self) -> None:
        """Let an idle process end by itself, by closing its input; kill it if it does not."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._close()

    def _close(self) -> None:
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


class VerifierPool:
    """Grades responses; a context manager.

    `workers`: processes for symbolic questions. `timeout_s`: CPU seconds a question may use (and four times
    that on the wall); a worker beyond it is killed. `memory_gib`: address space of each worker.
    `recycle_after`: questions after which a worker is replaced, for sympy's caches grow. Not for use from
    several threads. `num_started`, `num_killed`: workers so far, for metrics and tests.
    """

    def __init__(
        self, workers: int = 2, timeout_s: float = 5.0, memory_gib: float = 1.0, recycle_after: int = 2000
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be 1 or more, found {workers}")
        if not timeout_s > 0 or not memory_gib > 0:
            raise ValueError(f"timeout_s and memory_gib must be positive, found {timeout_s} and {memory_gib}")
        self.num_workers = workers
        self.timeout_s = timeout_s
        self.memory_gib = memory_gib
        self.recycle_after = recycle_after
        self.num_started = 0
        self.num_killed = 0
        self._start_failures = 0
        self._next_id = 0
        self._workers: list[_Worker] = []
        self._closed = False

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers. Calling it again does nothing."""
        for worker in self._workers:
            if worker.task is None and worker.ready:
                worker.stop()
            else:
                worker.kill()
        self._workers = []
        self._closed = True

    def warm(self) -> None:
        """Start all workers and wait until they are ready: seconds, paid before the first question."""
        with self._selector() as selector:
            self._start_missing(self.num_workers, selector)
            while not all(worker.ready for worker in self._workers):
                self._wait(selector, lambda *_: None)
                self._start_missing(self.num_workers, selector)

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are running."""
        return [worker.pid for worker in self._workers]

    def map(
        self, jobs: Iterable[tuple[str | Sequence[str], str]], on_done: Callable[[int], None] | None = None
    ) -> list[Verdict]:
        """Grade (gold, response) pairs, each with one gold answer or several (one is enough); in order.

        `on_done(number)` is called as verdicts come in, for progress. Raises VerifierUnavailableError if
        workers cannot be started; a bad answer, a hanging answer or a crashing worker never raises.
        """
        assert not self._closed, "the pool is closed"
        verdicts: dict[int, Verdict] = {}
        waiting: deque[_Task] = deque()
        for index, (gold, response) in enumerate(jobs):
            found, decided = decide_quickly(gold, response)
            if isinstance(decided, Verdict):
                verdicts[index] = decided
            else:
                self._next_id += 1
                waiting.append(_Task(self._next_id, index, decided, _answer_of(found)))
        num_jobs = len(verdicts) + len(waiting)
        if on_done and verdicts:
            on_done(len(verdicts))
        if waiting:
            try:
                self._run(waiting, verdicts, on_done)
            finally:
                self._drop_busy()
        return [verdicts[index] for index in range(num_jobs)]

    def grade(self, gold: str, response: str) -> Verdict:
        """Grade one response."""
        return self.map([(gold, response)])[0]

    def ask(self, questions: Sequence[SymbolicQuestion], seconds: float) -> list[Verdict]:
        """What workers say to questions, in order: each under the pool's deadline and memory limit, all of
        them within `seconds`. Those that are open then are "error", "skipped"."""
        assert not self._closed, "the pool is closed"
        waiting: deque[_Task] = deque()
        for index, question in enumerate(questions):
            self._next_id += 1
            waiting.append(_Task(self._next_id, index, question, question.answer))
        verdicts: dict[int, Verdict] = {}
        if waiting:
            try:
                self._run(waiting, verdicts, None, time.monotonic() + seconds)
            finally:
                self._drop_busy()
        return [
            verdicts.get(index) or Verdict("error", question.answer, "skipped")
            for index, question in enumerate(questions)
        ]

    # --- the event loop

    def _run(
        self,
        waiting: deque[_Task],
        verdicts: dict[int, Verdict],
        on_done: Callable[[int], None] | None,
        until: float = math.inf,
    ) -> None:
        def record(task: _Task, outcome: Outcome, method: str, seconds: float) -> None:
            verdicts[task.index] = Verdict(outcome, task.answer, method, seconds)
            if on_done:
                on_done(1)

        with self._selector() as selector:
            while True:
                busy = sum(worker.task is not None for worker in self._workers)
                if (not waiting and not busy) or time.monotonic() >= until:
                    return
                self._start_missing(min(self.num_workers, busy + len(waiting)), selector)
                for worker in list(self._workers):
                    if waiting and worker.ready and worker.task is None:
                        if worker.num_done >= self.recycle_after:
                            self._remove(worker, selector, kill=False)
                        elif worker.give(waiting[0]):
                            waiting.popleft()
                        else:
                            self._remove(worker, selector, kill=True)
                if self._workers:
                    self._wait(selector, record, until)

    def _drop_busy(self) -> None:
        """After an interrupt: a worker that is still at a question must not answer it to the next caller."""
        for worker in [worker for worker in self._workers if worker.task is not None]:
            self._workers.remove(worker)
            worker.kill()

    def _selector(self) -> selectors.DefaultSelector:
        selector = selectors.DefaultSelector()
        for worker in self._workers:
            selector.register(worker, selectors.EVENT_READ, worker)
        return selector

    def _start_missing(self, number: int, selector: selectors.BaseSelector) -> None:
        while len(self._workers) < number:
            worker = _Worker(self.timeout_s, self.memory_gib)
            self.num_started += 1
            self._workers.append(worker)
            selector.register(worker, selectors.EVENT_READ, worker)

    def _remove(self, worker: _Worker, selector: selectors.BaseSelector, *, kill: bool) -> None:
        selector.unregister(worker)
        self._workers.remove(worker)
        if kill:
            self.num_killed += 1
            worker.kill()
        else:
            worker.stop()

    def _wait(
        self,
        selector: selectors.BaseSelector,
        record: Callable[[_Task, Outcome, str, float], None],
        until: float = math.inf,
    ) -> None:
        """Wait for a reply, the next deadline or `until`, whichever is first, and deal with what came."""
        engaged = [worker for worker in self._workers if worker.task is not None or not worker.ready]
        now = time.monotonic()
        left = min((worker.seconds_left(now) for worker in engaged), default=0.0)
        for key, _ in selector.select(timeout=max(min(left, until - now), 0.01)):
            self._receive(cast(_Worker, key.data), selector, record)
        now = time.monotonic()
        for worker in list(self._workers):
            if (worker.task is not None or not worker.ready) and worker.seconds_left(now) <= 0:
                task, was_ready = worker.task, worker.ready
                self._remove(worker, selector, kill=True)
                if not was_ready:
                    self._note_start_failure("did not get ready in time")
                elif task is not None:
                    record(task, "timeout", "deadline", now - worker.started)

    def _receive(
        self,
        worker: _Worker,
        selector: selectors.BaseSelector,
        record: Callable[[_Task, Outcome, str, float], None],
    ) -> None:
        replies = worker.read()
        if replies is None:
            task, was_ready = worker.task, worker.ready
            self._remove(worker, selector, kill=True)
            if not was_ready:
                self._note_start_failure("ended before it was ready")
            elif task is not None:
                record(task, "error", "worker_died", time.monotonic() - worker.started)
            return
        for reply in replies:
            if reply.get("ready"):
                worker.ready = True
                self._start_failures = 0
                continue
            assert worker.task is not None
            assert worker.task.id == reply["id"], "a reply answers its own question"
            task, worker.task = worker.task, None
            worker.num_done += 1
            record(
                task,
                cast(Outcome, reply["outcome"]),
                str(reply["method"]),
                float(cast(float, reply["seconds"])),
            )

    def _note_start_failure(self, what: str) -> None:
        self._start_failures += 1
        if self._start_failures >= MAX_START_FAILURES:
            self.close()
            raise VerifierUnavailableError(
                f"a verification worker {what}, {self._start_failures} times; is math-verify installed, "
                f"is {self.memory_gib:g} GiB enough? To see why: {sys.executable} -m phi4r.verify.worker "
                f"--memory-gib {self.memory_gib:g} --cpu-seconds 60"
            )


def _answer_of(found: Extraction) -> str:
    assert found.answer is not None
    return found.answer
