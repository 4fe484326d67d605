"""Stopping between steps: a signal only sets a flag, all ranks agree on it, and the run saves before it
ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from phi4r.parallel.attempt import early_signal, mark_stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopFlag:
    """Set by the first of `SIGNALS`; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal_number = early_signal()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Install the handlers for the length of a run."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag._handle) for number in SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_by(number: int) -> None:
    """End a run that a signal stopped and that has been saved.

    Exit code 130 after Ctrl-C, 128 + number otherwise: like a process that got the signal. Under a job script
    of ours the code is 0 on every rank, because srun would kill the slower ranks for the first one's other
    code; the script is told by a file.
    """
    if mark_stopped():
        raise SystemExit(0)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
