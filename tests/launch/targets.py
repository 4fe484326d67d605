"""What the ranks of test_launch do. Each gets its instructions as a dict and leaves files behind to be looked
at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from phi4r.core.errors import UserError

RANK = int(os.environ.get("RANK", "0"))


def _leave_pid(job: dict[str, Any]) -> None:
    (Path(job["folder"]) / f"pid_{RANK}").write_text(str(os.getpid()))


def _wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 120
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    """Whether a process has not ended (one that nobody has waited for has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def report(job: dict[str, Any]) -> dict[str, Any]:
    """Leave this rank's environment in a file, print a line, return something."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    seen = {name: os.environ.get(name) for name in names}
    (Path(job["folder"]) / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(seen))
    print(f"hello from rank {os.environ['RANK']}")
    return {"from": int(os.environ["RANK"])}


def divide_on_rank_1(job: dict[str, Any]) -> None:
    """Rank 1 crashes, the others wait for it for ever."""
    _leave_pid(job)
    if RANK == 1:
        print(1 / 0)
    time.sleep(600)


def user_error_on_rank_1(job: dict[str, Any]) -> None:
    """Rank 1 finds the user's mistake."""
    if RANK == 1:
        raise UserError("data.jsonl:7: expected a messages list")
    time.sleep(600)


def killed_on_rank_1(job: dict[str, Any]) -> None:
    """Rank 1 dies without a word; rank 0 notices its peer is gone and complains about that."""
    left = Path(job["folder"]) / "pid_1"
    if RANK == 1:
        _leave_pid(job)
        os.kill(os.getpid(), signal.SIGKILL)
    _wait_for(lambda: left.exists() and left.read_text() and not _runs(int(left.read_text())))
    raise RuntimeError("Connection closed by peer")


def consequence_on_rank_0(job: dict[str, Any]) -> None:
    """Rank 1 fails; rank 0 fails because of it, and is gone before the parent looks."""
    if RANK == 1:
        raise ValueError("the cause")
    _wait_for((Path(sys.argv[1]) / "error_1.json").exists)  # the folder of the job, as the worker was told
    raise RuntimeError("the consequence")


def ignore_sigterm(job: dict[str, Any]) -> None:
    """Rank 0 does not end when asked to; rank 1 fails once it does not."""
    if RANK == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _leave_pid(job)
        time.sleep(600)
    while not (Path(job["folder"]) / "pid_0").exists():
        time.sleep(0.01)
    raise ValueError("rank 1 has had enough")


def sleep_with_a_child(job: dict[str, Any]) -> None:
    """Wait for ever beside a child process of one's own."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (Path(job["folder"]) / f"child_{RANK}").write_text(str(child.pid))
    _leave_pid(job)
    time.sleep(600)


def save_when_interrupted(job: dict[str, Any]) -> None:
    """Wait for the signal, save, end in peace."""
    got: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: got.append(number))
    _leave_pid(job)
    while not got:
        time.sleep(0.01)
    (Path(job["folder"]) / f"saved_{RANK}").write_text(str(got[0]))


def all_reduce(job: dict[str, Any]) -> float:
    """A real gloo group over the address the launcher gave."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    value = torch.tensor(float(RANK + 1))
    dist.all_reduce(value)
    dist.destroy_process_group()
    return float(value)


def handler(config: Any, folder: Path, parallel: Any, *, extra: str) -> dict[str, Any]:
    """What a command's function sees."""
    types = [type(value).__name__ for value in (config, parallel)]
    return {"types": types, "is_path": isinstance(folder, Path), "lr": config.optimizer.lr, "extra": extra}
