"""The sign of life of this process: work that is done piece by piece calls `beat`."""

from __future__ import annotations

import time
from collections.abc import Callable

_last_beat = time.monotonic()
_listener: Callable[[], None] | None = None


def listen(listener: Callable[[], None] | None) -> None:
    """Call `listener` with every beat from now on (None: nothing)."""
    global _listener
    _listener = listener


def beat() -> None:
    """This rank makes progress. Cheap: every microbatch, every sampled token, every step."""
    global _last_beat
    _last_beat = time.monotonic()
    if _listener is not None:
        _listener()


def last_beat() -> float:
    """When this process last made progress, by time.monotonic."""
    return _last_beat
