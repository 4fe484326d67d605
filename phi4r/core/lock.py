"""One run folder, one writer: RUN/lock.json says who writes there, and whether that process still lives.

A lock whose owner is dead is taken over, with a word about it: its process on this machine has ended, it was
an earlier start of the same SLURM job, or it was not refreshed for LEASE_S. A process that finds its lock in
other hands ends at once, without saving. Times of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi4r.core.console import say
from phi4r.core.errors import UserError
from phi4r.core.io import parse_json_object

REFRESH_S = 5.0
"""Seconds between refreshments."""
LEASE_S = 30.0
"""Seconds without a refreshment after which the owner, on another machine, counts as dead."""
EXIT_CODE = 1


def _machine() -> str:
    """This boot of this machine, and this process namespace of it: within it, process ids mean something."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _started(pid: int) -> float | None:
    """When a process of this machine was started, None if there is none."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def _me() -> dict[str, Any]:
    return {
        "token": uuid.uuid4().hex,
        "node": os.environ.get("SLURMD_NODENAME", platform.node()),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "attempt": [int(os.environ.get(name, "0")) for name in ("SLURM_RESTART_COUNT", "PHI4R_ATTEMPT")],
    }


def describe(owner: dict[str, Any]) -> str:
    """`SLURM job 17 (process 4711 on n3)`, or `process 4711 on n3`."""
    process = f"process {owner['pid']} on {owner['node']}"
    return f"SLURM job {owner['job']} ({process})" if owner["job"] else process


def read_owner(path: Path) -> dict[str, Any] | None:
    """Who holds the lock; None if it is free, or was never written in full."""
    try:
        text = path.read_text(encoding="utf-8")
        return parse_json_object(text, str(path)) if text else None
    except (FileNotFoundError, UserError):
        return None


def _why_dead(path: Path, owner: dict[str, Any] | None, me: dict[str, Any]) -> str:
    """Why the lock may be taken over, "" while its owner lives. Takes up to LEASE_S."""
    if owner is not None:
        if owner["job"] and owner["job"] == me["job"] and owner["attempt"] < me["attempt"]:
            return "an earlier start of this job"
        if owner["machine"] == me["machine"]:
            return "" if _started(owner["pid"]) == owner["started"] else "that process has ended"
        say(f"{path}: {describe(owner)} holds the lock; watching it for {LEASE_S:g} s")
    with contextlib.suppress(FileNotFoundError):
        before = path.stat().st_mtime_ns
        until = time.monotonic() + LEASE_S
        while time.monotonic() < until:
            time.sleep(1.0)
            if path.stat().st_mtime_ns != before:
                return ""
    return f"not refreshed for {LEASE_S:g} s"


def _take(path: Path, me: dict[str, Any]) -> None:
    while True:
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(json.dumps(me) + "\n")
            return
        except FileExistsError:
            owner = read_owner(path)
        why = _why_dead(path, owner, me)
        if not why:
            who = describe(owner) if owner else "somebody"
            raise UserError(
                f"{path.parent}: {who} is writing there; wait for it to end, or choose another run folder"
            )
        say(f"{path}: taken over from {describe(owner) if owner else 'an unknown owner'}: {why}")
        aside = path.with_name(f"{path.name}.{me['token']}")
        with contextlib.suppress(FileNotFoundError):  # somebody else was quicker: look again
            path.rename(aside)
            moved = read_owner(aside)
            if moved is not None and moved.get("token") != (owner or {}).get("token"):
                with contextlib.suppress(OSError):  # a new owner came in between: give it back
                    os.link(aside, path)
            aside.unlink()


def _refresh(path: Path, me: dict[str, Any], closed: threading.Event) -> None:
    """Touch the lock until `closed`; ends the process if it is no longer ours."""
    last = time.monotonic()
    while not closed.wait(REFRESH_S):
        lost = ""
        try:
            owner = read_owner(path)
            if owner is None or owner["token"] != me["token"]:
                lost = f"now held by {describe(owner)}" if owner else "gone"
            else:
                os.utime(path)
                last = time.monotonic()
        except OSError as error:
            if time.monotonic() - last > LEASE_S:
                lost = f"not reached for {LEASE_S:g} s: {error.strerror}"
        if lost and not closed.is_set():
            print(f"phi4r: the lock {path} is {lost}; ending without saving", file=sys.stderr, flush=True)
            os._exit(EXIT_CODE)


@contextlib.contextmanager
def run_lock(folder: str | Path, is_writer: bool = True) -> Iterator[None]:
    """Hold the lock of a run folder, which is made if need be; a rank that is not its writer holds nothing.

    Raises UserError that names the owner while another process writes there.
    """
    if not is_writer:
        yield
        return
    folder, me = Path(folder), _me()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: expected a run folder, found a file")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock.json"
    _take(path, me)
    closed = threading.Event()
    refresher = threading.Thread(target=_refresh, args=(path, me, closed), name="run-lock", daemon=True)
    refresher.start()
    try:
        yield
    finally:
        closed.set()
        refresher.join()
        owner = read_owner(path)
        if owner is not None and owner["token"] == me["token"]:
            path.unlink(missing_ok=True)
