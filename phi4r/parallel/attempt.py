"""What a rank reports to the supervisor of its job (phi4r.slurm.supervise), by files in $PHI4R_ATTEMPT_DIR.

    heartbeat_00001   "LIMIT_S PID STEP_ID NODE"; touched whenever the rank gets on, at most once a second
    stack_00001       the stacks of all threads, written by faulthandler when no beat came for LIMIT_S
    error_00001       "KIND TIME RANK NODE", a line that says what happened, and the traceback
    stopped           rank 0: a signal came, everything is saved, the same command goes on from there
    finished          rank 0: the command is done

Without that variable (a run that no job script of ours started) nothing here does anything. Only the standard
library is used: the launcher calls this before torch is imported.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

from phi4r.core.errors import UserError
from phi4r.parallel.heartbeat import listen

FOLDER = "PHI4R_ATTEMPT_DIR"
BEAT_S = 1.0
"""Seconds between beats that are written; the rest cost nothing."""

# Errors that a rank has because another one is gone. They say nothing about this rank.
PEER_MARKS = (
    "DistBackendError", "DistNetworkError", "DistStoreError", "gloo/transport", "Connection closed by peer",
    "Connection reset by peer",
)  # fmt: skip


class _Attempt:
    """This process's files. The watchdog is C code of faulthandler, so it works while Python hangs."""

    def __init__(self, folder: Path, rank: int, timeout_s: int) -> None:
        self.folder, self.rank, self.timeout_s = folder, rank, timeout_s
        self.heartbeat = folder / f"heartbeat_{rank:05d}"
        self._stack: TextIO = open(folder / f"stack_{rank:05d}", "w", encoding="utf-8")
        self._last = float("-inf")
        self.limit_s = 0
        self.early_signal = 0
        # A run installs its own handler when it trains; until then, and that takes a while, the signal waits.
        self._handler = signal.signal(signal.SIGUSR2, self._keep_signal)
        # Importing torch on a slow file system is not a hang.
        start_s = int(os.environ.get("PHI4R_START_S", "600"))
        self._set_limit(max(start_s, timeout_s) if timeout_s else 0)

    def _set_limit(self, limit_s: int) -> None:
        self.limit_s = limit_s
        step_id = os.environ.get("SLURM_STEP_ID", "0")
        self.heartbeat.write_text(f"{limit_s} {os.getpid()} {step_id} {_node()}\n", encoding="utf-8")
        self._watch()

    def _watch(self) -> None:
        if self.limit_s:
            faulthandler.dump_traceback_later(self.limit_s, file=self._stack)

    def _keep_signal(self, number: int, frame: FrameType | None) -> None:
        self.early_signal = number

    def beat(self) -> None:
        now = time.monotonic()
        if now - self._last < BEAT_S:
            return
        try:
            if self._last == float("-inf"):  # the work begins
                self._set_limit(self.timeout_s)
            os.utime(self.heartbeat)
        except OSError as error:
            raise RuntimeError(f"{self.folder}: the run folder is lost: {error.strerror}") from error
        self._last = now
        self._watch()

    def close(self) -> None:
        signal.signal(signal.SIGUSR2, self._handler)
        faulthandler.cancel_dump_traceback_later()
        self._stack.close()
        with contextlib.suppress(OSError):
            self.heartbeat.unlink()

    def report(self, error: Exception) -> None:
        """Write error_RANK: the job script shows the first one that is not about another rank."""
        trace = traceback.format_exc()
        if isinstance(error, UserError):
            kind, what = "user", str(error)
        else:
            kind = "peer" if any(mark in trace for mark in PEER_MARKS) else "error"
            what = f"{type(error).__name__}: {error}"
        text = f"{kind} {time.time():.6f} {self.rank} {_node()}\n{' '.join(what.split())}\n{trace}"
        with contextlib.suppress(OSError):  # the folder itself may be what is lost; stderr has the traceback
            (self.folder / f"error_{self.rank:05d}").write_text(text, encoding="utf-8")


_active: _Attempt | None = None


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME", platform.node())


@contextlib.contextmanager
def attempt(timeout_s: int) -> Iterator[None]:
    """A command as a rank of a job: beats can be sent, and its end is written down.

    timeout_s: seconds without a beat after which the rank counts as hung (0: never); until the first beat,
    while it imports and reads, it has at least $PHI4R_START_S.
    """
    global _active
    folder = os.environ.get(FOLDER)
    if not folder:
        yield
        return
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    _active = mine = _Attempt(Path(folder), rank, timeout_s)
    listen(mine.beat)
    try:
        yield
        if rank == 0:
            (mine.folder / "finished").touch()
    except Exception as error:
        mine.report(error)
        raise
    finally:
        listen(None)
        mine.close()
        _active = None


def is_active() -> bool:
    """Whether a job script listens (and looks for hung ranks itself)."""
    return _active is not None


def early_signal() -> int:
    """The signal to stop that came before the run could handle one (0: none)."""
    return _active.early_signal if _active is not None else 0


def mark_stopped() -> bool:
    """Say that this attempt ends early with everything saved; False where no job script listens."""
    if _active is None:
        return False
    if _active.rank == 0:
        (_active.folder / "stopped").touch()
    return True
