"""Programs that a model wrote, run where they can do no harm: bubblewrap, with limits.

A program sees a Python installation, an empty folder and its standard input: no network, no other files, no
environment, no processes but its own, and none that it could start. What it should print never enters the
sandbox, so it cannot be read there. A program that is still there at the deadline is killed with all it
started.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from phi4r.core import optional

# On the wall a program has this many times its CPU seconds: it may be waiting for a core.
WALL_FACTOR = 4.0
MAX_OUTPUT_BYTES = 1 << 20
MAX_FILES = 64
MAX_STATUS_BYTES = 1 << 16
_KILLED = frozenset((128 + signal.SIGXCPU, 128 + signal.SIGKILL, -signal.SIGXCPU, -signal.SIGKILL))

Ended = Literal["done", "failed", "out_of_time", "deadline"]


@dataclass(frozen=True)
class Run:
    """ended: "done" (exit code 0), "failed", "out_of_time" (CPU seconds used up) or "deadline" (on the wall);
    stdout: what it printed, the first MAX_OUTPUT_BYTES; detail: the last line of stderr, or ""."""

    ended: Ended
    stdout: str
    detail: str


def run_program(
    source: str, stdin: str, timeout_s: float = 5.0, memory_gib: float = 1.0, wall_s: float | None = None
) -> Run:
    """Run Python source. timeout_s: CPU seconds; wall_s: seconds on the wall (None: WALL_FACTOR times those).
    UserError where bubblewrap is missing, RuntimeError where it may not make a sandbox here."""
    wall_s = WALL_FACTOR * timeout_s if wall_s is None else wall_s
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        tempfile.TemporaryFile() as status,
    ):
        # A lone surrogate of a model's text is no reason to stop: the program's own decoder will complain.
        given.write(stdin.encode(errors="surrogatepass"))
        given.seek(0)
        # The program comes by a pipe of its own: standard input belongs to the problem.
        read, write = os.pipe()
        rules_read, rules_write = os.pipe()
        process = subprocess.Popen(
            [
                *_limits(timeout_s, memory_gib), *_sandbox(rules_read, status.fileno()),
                "-I", "-c", _RUNNER.format(fd=read),
            ],
            stdin=given, stdout=out, stderr=err, pass_fds=(read, rules_read, status.fileno()),
            start_new_session=True, env={},
        )  # fmt: skip
        os.close(read)
        os.close(rules_read)
        try:
            with os.fdopen(rules_write, "wb") as rules:
                rules.write(_no_processes())
            with os.fdopen(write, "wb") as program:
                program.write(source.encode(errors="surrogatepass"))
        except BrokenPipeError:
            pass  # it ended before it had read its program; the exit code tells why
        try:
            code = process.wait(wall_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return Run("deadline", "", "")
        out.seek(0)
        err.seek(0)
        printed = out.read(MAX_OUTPUT_BYTES).decode(errors="replace")
        said = err.read(MAX_OUTPUT_BYTES).decode(errors="replace").strip().splitlines()
        status.seek(0)
        has_run = _has_run(status.read(MAX_STATUS_BYTES))
    if not has_run and code not in _KILLED:
        why = said[-1] if said else f"exit code {code}"
        raise RuntimeError(f"{why}; programs cannot be run safely on this machine")
    ended: Ended = "done" if code == 0 else "out_of_time" if code in _KILLED else "failed"
    return Run(ended, printed, said[-1] if said else "")


def _has_run(status: bytes) -> bool:
    """Whether bubblewrap says that it started the program. It writes the exit code only where that worked, to
    a file that the program has no descriptor of: what a program prints cannot pass for a failing sandbox."""
    for line in status.splitlines():
        try:
            if "exit-code" in json.loads(line):
                return True
        except ValueError:
            continue
    return False


def check_cases(
    source: str,
    cases: Sequence[tuple[str, str]],
    timeout_s: float,
    memory_gib: float = 1.0,
    wall_s: float | None = None,
) -> tuple[bool | None, str]:
    """(does the program print what it should in every case, which case it failed and how). None: nobody can
    tell, as it met the deadline on the wall, which all cases have together. cases: (standard input, expected
    output); trailing blanks do not count."""
    until = time.monotonic() + (WALL_FACTOR * timeout_s if wall_s is None else wall_s)
    for number, (given, expected) in enumerate(cases, 1):
        left = until - time.monotonic()
        if left <= 0:
            return None, f"case {number}: deadline"
        run = run_program(source, given, timeout_s, memory_gib, left)
        if run.ended == "deadline":
            return None, f"case {number}: deadline"
        if run.ended != "done":
            return False, f"case {number}: {run.ended.replace('_', ' ')} {run.detail}".rstrip()
        if _lines(run.stdout) != _lines(expected):
            return False, f"case {number}: another output"
    return True, "all cases"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


_RUNNER = "import os; exec(compile(os.fdopen({fd}).read(), 'program', 'exec'), {{'__name__': '__main__'}})"


def _limits(timeout_s: float, memory_gib: float) -> list[str]:
    """Of each process."""
    return [
        optional.program("prlimit"), f"--cpu={math.ceil(timeout_s)}", f"--as={int(memory_gib * 2**30)}",
        f"--fsize={MAX_OUTPUT_BYTES}", f"--nofile={MAX_FILES}", "--core=0",
    ]  # fmt: skip


def _sandbox(rules: int, status: int) -> list[str]:
    """bubblewrap and the interpreter in it. File descriptors: rules: of the seccomp filter; status: where
    bubblewrap says what became of it."""
    shown = dict.fromkeys(("/usr", sys.base_prefix))
    binds = [word for path in shown for word in ("--ro-bind", path, path)]
    for path in ("/lib", "/lib64", "/bin", "/etc/ld.so.cache"):
        binds += ["--ro-bind-try", path, path]
    return [
        optional.program("bwrap"), "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session",
        "--clearenv", *binds, "--proc", "/proc", "--dev", "/dev", "--size", str(64 << 20), "--tmpfs", "/tmp",
        "--chdir", "/tmp", "--seccomp", str(rules), "--json-status-fd", str(status),
        os.path.realpath(sys.executable),
    ]  # fmt: skip


def _no_processes() -> bytes:
    """A seccomp filter (classic BPF) under which threads can be started and processes cannot. Linux on
    x86-64; elsewhere everything is allowed and only the deadline ends a fork bomb."""
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, not_there = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
    if platform.machine() != "x86_64":
        return struct.pack("HBBI", answer, 0, 0, allow)
    clone, fork, vfork, clone3, clone_thread, x32 = 56, 57, 58, 435, 0x10000, 0x40000000
    program = [  # (code, jump if true, jump if false, operand), jumps counted from the next line
        (load, 0, 0, 4), (equal, 0, 8, 0xC000003E),  # numbers of another architecture: refused
        (load, 0, 0, 0), (at_least, 6, 0, x32),
        (equal, 5, 0, fork), (equal, 4, 0, vfork), (equal, 4, 0, clone3), (equal, 0, 4, clone),
        (load, 0, 0, 16), (any_bit, 2, 0, clone_thread),
        (answer, 0, 0, refuse), (answer, 0, 0, not_there), (answer, 0, 0, allow),
    ]  # fmt: skip
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
