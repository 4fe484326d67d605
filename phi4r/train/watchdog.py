"""A thread of every rank that notices when the rank does not get on, and makes the job say why.

Work announces itself with `phi4r.parallel.heartbeat.beat`: every microbatch, every sampled token, every step.
After `limit_s` seconds without a beat each rank writes the stacks of all its threads to RUN/stacks/, says
whether its main thread waits for other ranks, and reads what the others say. The rank that does not wait, or
does not answer, is the cause: its name is the job's error, and not the time-outs that the others would run
into. All ranks that wait for each other have lost step: each one's collective is named.

`limit_s` is below the process groups' own time-out, so the stacks are written while all ranks are there.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from phi4r.core.io import atomic_write_json
from phi4r.parallel import attempt, heartbeat
from phi4r.parallel.failure import fail

LIMIT_SHARE = 0.8
"""Of parallel.timeout_s, after which of the process groups' collectives give up."""
COLLECTIVES = ("torch/distributed/", "megatron/core/pipeline_parallel/p2p_communication.py")
"""Files whose innermost frame means that a rank waits for others."""


class HungError(RuntimeError):
    """A rank, or all of them together, made no progress."""


def stacks_folder(run_dir: Path) -> Path:
    """RUN/stacks."""
    return run_dir / "stacks"


def where(frame: FrameType | None) -> tuple[str, str]:
    """(the collective that a thread waits in, or ""; the innermost line of phi4r or its caller's code)."""
    collective, place, innermost = "", "", ""
    while frame is not None:
        path = frame.f_code.co_filename.replace(os.sep, "/")
        line = f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"
        innermost = innermost or line
        if any(part in path for part in COLLECTIVES) and not place:
            collective = frame.f_code.co_name
        elif not place and "site-packages" not in path and "/lib/python" not in path:
            place = line
        frame = frame.f_back
    return collective, place or innermost


class Watchdog:
    """Watches the main thread of one rank; start with `watch`."""

    def __init__(self, run_dir: Path, rank: int, world_size: int, limit_s: float) -> None:
        self.folder, self.rank, self.world_size, self.limit_s = (
            stacks_folder(run_dir),
            rank,
            world_size,
            limit_s,
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (self._said_by(rank), self._stack_of(rank)):
            name.unlink(missing_ok=True)

    def _said_by(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.json"

    def _stack_of(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.txt"

    def start(self) -> None:
        """Begin to watch: now counts as a beat."""
        heartbeat.beat()
        self._thread.start()

    def stop(self) -> None:
        """The work is done, or its own error is on the way."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        period = min(1.0, self.limit_s / 10)
        tick = awake = time.monotonic()
        while not self._stop.wait(period):
            now = time.monotonic()
            if now - tick > 10 * period:  # this process was stopped as a whole (Ctrl-Z): start counting anew
                awake = now
            tick = now
            silent_s = now - max(heartbeat.last_beat(), awake)
            if silent_s > self.limit_s:
                self._fire(silent_s)

    def _fire(self, silent_s: float) -> None:
        main = threading.main_thread()
        collective, place = where(sys._current_frames().get(main.ident or 0))
        with open(self._stack_of(self.rank), "w", encoding="utf-8") as file:
            who = f"rank {self.rank}, process {os.getpid()} on {platform.node()}"
            print(f"{who}: no progress for {silent_s:.0f} s", file=file, flush=True)
            faulthandler.dump_traceback(file)
        said = {"collective": collective, "place": place, "node": platform.node(), "time": time.time()}
        atomic_write_json(self._said_by(self.rank), said)
        answers = self._answers()
        to_blame, message = verdict(answers, self.world_size)
        text = f"{message}: no progress for {silent_s:.0f} s; the stacks of all ranks are in {self.folder}"
        if self.rank != to_blame:  # its error should be the first
            time.sleep(min(2.0, self.limit_s))
        fail(HungError(text))

    def _answers(self) -> dict[int, dict[str, Any]]:
        """What the ranks say, after as long as it may take them to notice."""
        until = time.monotonic() + max(2.0, self.limit_s / 5)
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < self.world_size and time.monotonic() < until:
            for rank in set(range(self.world_size)) - set(answers):
                if self._said_by(rank).exists():
                    answers[rank] = json.loads(self._said_by(rank).read_text(encoding="utf-8"))
            time.sleep(0.05)
        return answers


def verdict(answers: dict[int, dict[str, Any]], world_size: int) -> tuple[int, str]:
    """(the rank that should report, what happened), from {rank: {"collective", "place", "node"}}."""
    silent = sorted(set(range(world_size)) - set(answers))
    busy = [rank for rank, said in sorted(answers.items()) if not said["collective"]]
    if silent:
        names = ", ".join(map(str, silent))
        return min(answers), f"rank {names} does not answer (stopped, or its machine is gone)"
    if busy:
        said = answers[busy[0]]
        others = f"; {world_size - len(busy)} other ranks wait for it" if world_size > len(busy) else ""
        more = f" (and ranks {', '.join(map(str, busy[1:]))} are busy too)" if busy[1:] else ""
        return busy[0], f"rank {busy[0]} on {said['node']} hangs at {said['place']}{more}{others}"
    calls: dict[str, list[int]] = {}
    for rank, said in sorted(answers.items()):
        calls.setdefault(f"{said['collective']} at {said['place']}", []).append(rank)
    listed = "; ".join(f"rank {', '.join(map(str, ranks))} in {call}" for call, ranks in calls.items())
    return min(answers), f"all ranks wait for each other: {listed}"


@contextmanager
def watch(run_dir: Path, rank: int, world_size: int, timeout_s: float) -> Iterator[None]:
    """Watch this rank for the length of the block.

    timeout_s: the process groups' time-out; the watchdog acts after `LIMIT_SHARE` of it. Under a job script
    that watches heartbeats itself (`phi4r.parallel.attempt`) nothing is started here.
    """
    if attempt.is_active():
        yield
        return
    watchdog = Watchdog(run_dir, rank, world_size, LIMIT_SHARE * timeout_s)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()
