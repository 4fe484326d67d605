"""Start the ranks a command needs on this machine, show one console, and end them together.

The parent (this file) never imports torch. Three cases, decided by `run_ranks`:

- started by torchrun or srun (RANK, or SLURM's step variables): this process is a rank, so the target runs
here; - one rank: the target runs here;
- otherwise one child per rank (`python -m phi4r.parallel.worker`), each the leader of its own process group.
  Rank 0 has the console, the others write logs/rank_00001.log in the run folder. The first rank to fail ends
  the rest, and its error is the job's error. If this process dies, however it dies, the children see their
  life line close and end at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from phi4r.configs.load import from_tree
from phi4r.configs.schema import as_dict
from phi4r.configs.sections import ParallelConfig
from phi4r.configs.stages import STAGES
from phi4r.core.errors import UserError

GRACE_S = 10.0
"""Seconds between asking a rank to end (SIGTERM) and killing it."""

SETTLE_S = 0.5
"""Seconds to wait, after one rank failed, for the reports of ranks that failed at the same moment."""

NUM_ATTEMPTS = 3
"""Starts of a job whose rendezvous port was taken by somebody else."""


class RankError(Exception):
    """A rank failed, not by the user's fault. `trace` is its traceback, or what is known about its death."""

    def __init__(self, rank: int, trace: str, log: Path | None) -> None:
        self.rank = rank
        self.trace = trace
        self.log = log
        where = f"; its output is in {log}" if log else ""
        super().__init__(f"rank {rank} failed{where}\n{trace.rstrip()}")


# --- what is handed to the ranks


def encode(value: Any) -> Any:
    """Configurations and paths as JSON-able values (`decode` is the way back)."""
    for stage, cls in STAGES.items():
        if isinstance(value, cls):
            return {"$stage": stage, "tree": as_dict(value)}
    if isinstance(value, ParallelConfig):
        return {"$parallel": dataclasses.asdict(value)}
    if isinstance(value, Path):
        return {"$path": str(value)}
    return value


def decode(value: Any) -> Any:
    """The value `encode` was given."""
    if isinstance(value, dict):
        if "$stage" in value:
            return from_tree(value["$stage"], value["tree"])
        if "$parallel" in value:
            return ParallelConfig(**value["$parallel"])
        if "$path" in value:
            return Path(value["$path"])
    return value


def quiet_known_warnings() -> None:
    """Keep from the console what megatron-core and torch say on every run and nobody can act on.

    megatron-core announces each optional package it does without (`phi4r doctor` lists them), and calls
    collectives by names that torch is about to change.
    """
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")


def find_target(target: str) -> Callable[..., Any]:
    """The function that "package.module:function" names. Its module is imported without the known
    warnings."""
    quiet_known_warnings()
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def call_handler(payload: dict[str, Any]) -> Any:
    """Target of `run_handler`: call payload["handler"] with its decoded arguments."""
    options = {name: decode(value) for name, value in payload["options"].items()}
    return find_target(payload["handler"])(*map(decode, payload["arguments"]), **options)


def run_handler(
    handler: str,
    arguments: Sequence[Any],
    parallel: ParallelConfig,
    run_dir: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Run `handler(*arguments, **options)` ("module:function") on all ranks of `parallel`.

    Arguments are JSON-able values, paths, stage configurations and ParallelConfig. Returns rank 0's result
    (JSON-able or None). Raises UserError or RankError.
    """
    payload = {
        "handler": handler,
        "arguments": [encode(value) for value in arguments],
        "options": {name: encode(value) for name, value in (options or {}).items()},
    }
    target = f"{__name__}:call_handler"
    return run_ranks(target, payload, parallel.world_size, run_dir, parallel.timeout_s, parallel.threads)


# --- who starts the ranks


@dataclass(frozen=True)
class ExternalRank:
    """This process is rank `rank` of `world_size`, started by torchrun or srun."""

    rank: int
    world_size: int
    local_rank: int


def external_rank(environ: dict[str, str] | os._Environ[str] = os.environ) -> ExternalRank | None:
    """What torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID inside a step) says about this process, or None.

    A batch script's own shell has SLURM_PROCID too but no step id, and is not a rank.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return ExternalRank(
            int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", "0"))
        )
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        num_tasks = int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")))
        if num_tasks > 1:
            return ExternalRank(
                int(environ["SLURM_PROCID"]), num_tasks, int(environ.get("SLURM_LOCALID", "0"))
            )
    return None


def run_ranks(
    target: str,
    payload: dict[str, Any],
    world_size: int,
    run_dir: Path | None = None,
    timeout_s: float = 600.0,
    threads: int = 1,
) -> Any:
    """Run `target(payload)` ("module:function", JSON-able payload) on `world_size` ranks and wait for all of
    them.

    Returns what rank 0 returned (JSON-able or None). Raises UserError if a rank did, RankError if one failed
    otherwise, KeyboardInterrupt after Ctrl-C. `timeout_s` bounds the start of the ranks, not their work;
    `threads` is the number of CPU threads per rank; `run_dir` takes the logs of ranks above 0 (a temporary
    folder, kept on failure, if None).
    """
    external = external_rank()
    if external is not None:
        if external.world_size != world_size:
            raise UserError(
                f"parallel: the layout needs {world_size} ranks (tp x pp x cp x dp), but"
                f" {external.world_size} were started"
            )
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if world_size > 1 and name not in os.environ:
                raise UserError(f"{name} is not set: the job script must export the address of rank 0")
        return _run_here(target, payload, external, threads)
    if world_size == 1:
        return _run_here(target, payload, ExternalRank(0, 1, 0), threads)
    for attempt in range(1, NUM_ATTEMPTS + 1):
        try:
            return _LocalJob(target, payload, world_size, run_dir, timeout_s, threads).run()
        except RankError as error:
            if "EADDRINUSE" not in error.trace or attempt == NUM_ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def _run_here(target: str, payload: dict[str, Any], rank: ExternalRank, threads: int) -> Any:
    given = {"RANK": str(rank.rank), "WORLD_SIZE": str(rank.world_size), "LOCAL_RANK": str(rank.local_rank)}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    try:
        return find_target(target)(payload)
    finally:  # a later job of this process may need another number of ranks
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# --- a job of local ranks


class _LocalJob:
    """The children of one `run_ranks`: start, watch, end."""

    def __init__(
        self,
        target: str,
        payload: dict[str, Any],
        world_size: int,
        run_dir: Path | None,
        timeout_s: float,
        threads: int,
    ) -> None:
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.threads = threads
        self.folder = Path(tempfile.mkdtemp(prefix="phi4r-ranks-"))
        self.logs = (run_dir or self.folder) / "logs"
        self.keep_folder = False
        self.own_logs = run_dir is None
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.stop_signal: int | None = None
        (self.folder / "job.json").write_text(
            json.dumps({"target": target, "payload": payload}), encoding="utf-8"
        )

    def run(self) -> Any:
        """Start the ranks, wait for them, and return rank 0's result."""
        life_line, my_end = os.pipe()
        port_holder = _hold_free_port()
        handlers = {number: signal.signal(number, self._on_signal) for number in _forwarded_signals()}
        try:
            self._start(port_holder.getsockname()[1], life_line)
            self._wait()
            result = self.folder / "result.json"
            return json.loads(result.read_text(encoding="utf-8")) if result.exists() else None
        finally:
            self._end_all()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            port_holder.close()
            os.close(life_line)
            os.close(my_end)
            if not (self.keep_folder and self.own_logs):
                shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, port: int, life_line: int) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        shared = {
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            "PYTHONUNBUFFERED": "1",
        }
        chosen = {
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        }
        command = [
            sys.executable,
            "-m",
            "phi4r.parallel.worker",
            str(self.folder),
            str(life_line),
            str(os.getpid()),
        ]
        for rank in range(self.world_size):
            environment = {**chosen, **os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            options: dict[str, Any] = {"env": environment, "pass_fds": [life_line], "process_group": 0}
            # No stdin: a background process group that reads a terminal is stopped.
            options["stdin"] = subprocess.DEVNULL
            if rank == 0:
                started = subprocess.Popen(command, **options)
            else:
                with open(self.log_of(rank), "ab") as log:
                    started = subprocess.Popen(command, **options, stdout=log, stderr=subprocess.STDOUT)
            self.ranks.append(started)

    def log_of(self, rank: int) -> Path:
        """Where the output of a rank above 0 goes."""
        return self.logs / f"rank_{rank:05d}.log"

    def _wait(self) -> None:
        deadline = time.monotonic() + self.timeout_s
        starting = set(range(self.world_size))
        pause_s = 0.02
        while True:
            codes = [rank.poll() for rank in self.ranks]
            if self.stop_signal is not None:  # first: ranks that saved because of it end with code 0
                self._stop_by_signal()
            if any(codes):
                self._fail()
            if all(code == 0 for code in codes):
                return
            if starting:
                starting = {rank for rank in starting if not (self.folder / f"started_{rank}").exists()}
                if starting and time.monotonic() > deadline:
                    self._not_started(sorted(starting))
            time.sleep(pause_s)
            pause_s = min(0.2, pause_s * 1.5)

    def _not_started(self, missing: list[int]) -> None:
        self.keep_folder = True
        names = ", ".join(map(str, missing))
        raise RankError(
            missing[0],
            f"rank(s) {names} did not start within {self.timeout_s:g} s (parallel.timeout_s)",
            self.log_of(missing[0]) if missing[0] else None,
        )

    def _fail(self) -> None:
        """Raise the error of the rank that failed first: a rank that died without a word, else the earliest
        report."""
        until = time.monotonic() + SETTLE_S
        while time.monotonic() < until and any(rank.poll() is None for rank in self.ranks):
            time.sleep(0.02)
        if self.stop_signal is not None:
            self._stop_by_signal()
        reports: dict[int, dict[str, Any]] = {}
        silent: list[int] = []
        for rank, process in enumerate(self.ranks):
            path = self.folder / f"error_{rank}.json"
            if path.exists():
                reports[rank] = json.loads(path.read_text(encoding="utf-8"))
            elif process.poll():
                silent.append(rank)
        if silent:
            rank = silent[0]
            code = self.ranks[rank].returncode
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            )
            trace = f"rank {rank} {how} without a Python error"
            if code == -signal.SIGKILL:
                trace += " (out of memory?)"
        else:
            rank = min(reports, key=lambda number: reports[number]["time"])
            if reports[rank]["user_error"]:
                raise UserError(reports[rank]["message"])
            trace = reports[rank]["trace"]
        self.keep_folder = True
        raise RankError(rank, trace, self.log_of(rank) if rank else None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_signal is not None:  # asked twice: do not wait for the ranks to finish what they are at
            for rank in self.ranks:
                _signal_group(rank, signal.SIGKILL)
        self.stop_signal = number

    def _stop_by_signal(self) -> None:
        """Pass the signal on, give the ranks time to save, and end like a process that got it."""
        assert self.stop_signal is not None
        for rank in self.ranks:
            if rank.poll() is None:
                rank.send_signal(self.stop_signal)
        _wait_for(self.ranks, max(GRACE_S, self.timeout_s))
        if self.stop_signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.stop_signal)

    def _end_all(self) -> None:
        alive = [rank for rank in self.ranks if rank.poll() is None]
        for rank in alive:
            _signal_group(rank, signal.SIGTERM)
        _wait_for(alive, GRACE_S)
        # Also for ranks that have ended: what they started themselves is in their process group.
        for rank in self.ranks:
            _signal_group(rank, signal.SIGKILL)
            rank.wait()


def _forwarded_signals() -> list[int]:
    return [signal.SIGINT, signal.SIGTERM] if threading.current_thread() is threading.main_thread() else []


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the whole group is gone
        os.killpg(process.pid, number)


def _wait_for(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(process.poll() is None for process in processes):
        time.sleep(0.02)


def _hold_free_port() -> socket.socket:
    """A socket bound to a free TCP port but not listening: with SO_REUSEADDR rank 0 can listen on that port,
    and nobody else is given it as long as this socket is open."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    return holder
