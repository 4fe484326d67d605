"""Fresh processes without their imports: the suite's commands and ranks are forked from a process that has
imported torch, megatron-core and phi4r already, which saves seconds of CPU time each.

`install()` makes `subprocess.Popen([sys.executable, "-m", MODULE, ...])` ask that process for a fork
instead of starting Python, where MODULE is of phi4r or of the tests. The new process is a child of its
caller in every respect (wait, signals, process group, files, environment, exit code) and runs MODULE as
`python -m` does. Before it begins, it leaves a clean image of itself behind, from which its own children
(the ranks of a command) are forked.

What a fork cannot show: which modules a process imports, what an environment variable does that is read
during an import, another hash seed in every rank, and how Python takes its modules down. So these start as
before: `python -c`, other options of Python (`-X importtime`), variables of `READ_EARLY` that differ, a
folder with another phi4r in it, and every test that is marked `fresh`. PHI4R_TESTS_FRESH=1 starts all
processes as before (a slow stage of continuous integration does); so does a machine with a GPU, whose
driver does not survive a fork, and any system but Linux.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import inspect
import io
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("phi4r", "tests")
NOT_FORKED = {"phi4r.verify.worker"}  # limits its address space, which torch alone fills
READ_EARLY = ("PYTHON", "LD_", "TRITON_", "CUDA_", "MALLOC_", "OPENBLAS_", "KMP_", "GOMP_", "TORCH_")
"""Beginnings of the names of variables that are read when Python starts or a module is imported."""
APPLIED = {"PYTHONPATH", "PYTHONUNBUFFERED", "CUDA_DEVICE_MAX_CONNECTIONS"}
"""Variables of this kind that a fork can still follow."""
MESSAGE_BYTES = 1 << 18
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
START_S = 600.0
HIGHEST_TARGET = 4096

counts = {"forked": 0, "fresh": 0}
_client: Client | None = None
_fresh = False


def early(environment: dict[str, str]) -> dict[str, str]:
    """The variables that decide whether a process can be forked."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_EARLY) and name not in APPLIED
    }


def _python_path(environment: dict[str, str]) -> list[str]:
    return [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]


def limits() -> list[tuple[int, int]]:
    """This process's limits on its resources, which its children inherit."""
    names = sorted(name for name in dir(resource) if name.startswith("RLIMIT_"))
    return [resource.getrlimit(getattr(resource, name)) for name in names]


def usable() -> bool:
    """Whether processes can be forked here at all."""
    on_gpu = Path("/dev/nvidiactl").exists()
    return sys.platform == "linux" and not on_gpu and not os.environ.get("PHI4R_TESTS_FRESH")


def can_fork(command: Any) -> bool:
    """Whether a command is one that the image is made for: `python -m MODULE`, `python tests/.../FILE.py`."""
    if not _is_python(command):
        return False
    if command[1] == "-m":
        return command[2] not in NOT_FORKED and command[2].split(".")[0] in MODULES
    return str(command[1]).startswith(f"{ROOT / 'tests'}{os.sep}") and str(command[1]).endswith(".py")


# --- the caller's side


class Client:
    """The caller's end of the socket to its image. `image_environment` are the early variables it was made
    with."""

    def __init__(self, channel: socket.socket, image_environment: dict[str, str]) -> None:
        self.channel = channel
        self.image_environment = image_environment
        self.image_limits = limits()
        self.session = os.getsid(0)
        self.lock = threading.Lock()

    def refuses(self, options: dict[str, Any]) -> bool:
        """Whether a call of Popen that `can_fork` must start a fresh process all the same."""
        environment = options["env"] if options["env"] is not None else dict(os.environ)
        path = {str(Path(entry).resolve()) for entry in _python_path(environment)}
        folder = Path(options["cwd"] or ".").resolve()
        return bool(
            early(environment) != self.image_environment
            or limits() != self.image_limits
            or (os.getsid(0) != self.session and not options["start_new_session"])
            or path - {str(ROOT), str(ROOT / "kernels")}
            or (folder != ROOT and any((folder / name).exists() for name in MODULES))
            or options["preexec_fn"]
            or options["shell"]
            or not options["close_fds"]
            or any(options[name] is not None for name in ("gid", "gids", "uid"))
            or any(target >= HIGHEST_TARGET for target in options["pass_fds"])
        )

    def fork(self, command: list[str], options: dict[str, Any]) -> int:
        """The process id of a new child of this process that runs `command`."""
        standard = [
            fd if fd >= 0 else number
            for number, fd in enumerate((options["p2cread"], options["c2pwrite"], options["errwrite"]))
        ]
        targets = [0, 1, 2, *(int(fd) for fd in options["pass_fds"])]
        request = {
            "parent": os.getpid(),
            "words": command[2:] if command[1] == "-m" else command[1:],
            "script": command[1] != "-m",
            "folder": os.path.abspath(options["cwd"] or "."),
            "environment": dict(options["env"] if options["env"] is not None else os.environ),
            "targets": targets,
            "session": bool(options["start_new_session"]),
            "group": options["process_group"] if options["process_group"] >= 0 else os.getpgrp(),
            "umask": options["umask"],
        }
        with self.lock:
            _adopt(True)
            try:
                message = json.dumps(request).encode()
                socket.send_fds(self.channel, [message], [*standard, *options["pass_fds"]])
                answer = self.channel.recv(64)
            finally:
                _adopt(False)
        assert answer, "the process that the tests' processes are forked from has died"
        return int(answer)


def _adopt(yes: bool) -> None:
    """Let processes whose parent ends become children of this one (True), as the forked process does."""
    ctypes.CDLL(None).prctl(SUBREAPER, int(yes), 0, 0, 0)


def install() -> None:
    """Fork the children of this process from now on; the image is made when the first one is asked for."""
    original = subprocess.Popen._execute_child  # type: ignore[attr-defined]
    signature = inspect.signature(original)
    environment = dict(os.environ)
    making = threading.Lock()

    def execute_child(self: Any, *arguments: Any) -> None:
        global _client
        options = dict(signature.bind(self, *arguments).arguments)
        command = options["args"]
        if not isinstance(command, str | bytes) and not isinstance(command, os.PathLike):
            command = [os.fspath(word) for word in command]
        if can_fork(command) and not _fresh and usable():
            with making:
                if _client is None:
                    _client = start(environment)
            if not _client.refuses(options):
                if options["cwd"] is not None and not Path(options["cwd"]).is_dir():
                    raise FileNotFoundError(2, "No such file or directory", str(options["cwd"]))
                self.pid = _client.fork(command, options)
                self._child_created = True
                self._close_pipe_fds(*(options[name] for name in PIPES))
                counts["forked"] += 1
                return
        if _is_python(command):
            counts["fresh"] += 1
        original(self, *arguments)

    subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]


PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


def _is_python(command: Any) -> bool:
    return isinstance(command, list) and len(command) > 2 and command[0] == sys.executable


@contextlib.contextmanager
def fresh_processes() -> Any:
    """Inside, every process is started and none forked."""
    global _fresh
    before, _fresh = _fresh, True
    try:
        yield
    finally:
        _fresh = before


def start(environment: dict[str, str]) -> Client:
    """Start the image: one Python that imports everything, once."""
    global _fresh
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    given = {**environment, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    given.pop("PYTHONPATH", None)
    code = f"from tests import preloaded; preloaded.main({theirs.fileno()})"
    with fresh_processes():
        image = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=given,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    theirs.close()
    ours.settimeout(START_S)
    try:
        assert ours.recv(16), f"the process to fork from ended with {image.wait(10)}"
    except TimeoutError:
        image.kill()
        raise
    image.returncode = 0  # nobody waits for it: it ends when this process does
    return Client(ours, early(given))


# --- the image's side


def preload() -> None:
    """Import what commands and ranks import."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from phi4r.cli.main import COMMANDS

        for command in COMMANDS.values():
            importlib.import_module(command.target.partition(":")[0])
        for name in LAZY:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


LAZY = ("torch.distributed.checkpoint", "torch._dynamo")
"""What those modules import while they run."""


def main(number: int) -> None:
    """Make the image and serve forks of it; returns only in a new process, when that has done its work."""
    channel = socket.socket(fileno=number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    image_environment = early(dict(os.environ))
    path = sys.path[1:]
    preload()
    channel.send(b"ready")
    request = serve(channel)
    while True:  # a new process: it forks the image for its own children, then runs
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():
            theirs.close()
            break
        ours.close()
        keep_only(theirs.fileno())
        request = serve(theirs)
    global _client
    _client = Client(ours, image_environment)
    install()
    run(request, path)


def keep_only(*numbers: int) -> None:
    """Close every file but these, and let 0, 1 and 2 lead nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    close_but({0, 1, 2, *numbers})


def close_but(kept: set[int]) -> None:
    """Close every open file whose number is not in `kept`."""
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in kept:
            with contextlib.suppress(OSError):
                os.close(number)


def serve(channel: socket.socket) -> dict[str, Any]:
    """Fork for every request, until the caller is gone. Returns in the new processes only."""
    while True:
        message, files, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 64)
        if not message:
            os._exit(0)
        request: dict[str, Any] = json.loads(message)
        reader, writer = os.pipe()
        middle = os.fork()  # ends at once, so that the caller inherits its child
        if middle == 0:
            child = os.fork()
            if child == 0:
                become(request, files)
                channel.detach()  # its number may be another file's by now
                return request
            os.write(writer, str(child).encode())
            os._exit(0)
        os.close(writer)
        for number in files:
            os.close(number)
        pid = os.read(reader, 64)
        os.close(reader)
        os.waitpid(middle, 0)
        channel.send(pid)


def become(request: dict[str, Any], files: list[int]) -> None:
    """Take the process group and the files of the new process."""
    if request["session"]:
        os.setsid()
    else:
        os.setpgid(0, request["group"])
    while os.getppid() != request["parent"]:
        time.sleep(0.0005)
    high = [fcntl.fcntl(number, fcntl.F_DUPFD, HIGHEST_TARGET) for number in files]
    for number, target in zip(high, request["targets"], strict=True):
        os.dup2(number, target)
    close_but(set(request["targets"]))


def run(request: dict[str, Any], path: list[str]) -> None:
    """Be `python -m WORDS`, or `python WORDS`, with the request's folder and environment."""
    environment = request["environment"]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["folder"])
    if request["umask"] >= 0:
        os.umask(request["umask"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    unbuffered = bool(environment.get("PYTHONUNBUFFERED"))
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = _stream(1, "strict", unbuffered)
    sys.stderr = _stream(2, "backslashreplace", unbuffered)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    program, *words = request["words"]
    first = os.path.dirname(program) if request["script"] else request["folder"]
    sys.path[:] = [first, *_python_path(environment), *path]
    sys.argv[:] = [program, *words]
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    try:
        if request["script"]:
            runpy.run_path(program, run_name="__main__")
        else:
            is_package = hasattr(sys.modules.get(program), "__path__")
            # runpy complains where what it runs has been imported
            sys.modules.pop(f"{program}.__main__" if is_package else program, None)
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            raise
        end(error.code or 0)
    end(0)


def end(code: int) -> None:
    """What Python does at its end but for taking every module down: most of a short command's time."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    os._exit(code & 0xFF)


def _stream(number: int, errors: str, unbuffered: bool) -> io.TextIOWrapper:
    """Standard output or error as Python opens them."""
    raw = io.FileIO(number, "w", closefd=False)
    line_by_line = unbuffered or raw.isatty() or number == 2
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding="utf-8",
        errors=errors,
        line_buffering=line_by_line,
        write_through=unbuffered,
    )
