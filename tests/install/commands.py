"""What people are told to install with, read from where they are told: README, docs, hints and the Makefile.

A command becomes lists of pip's arguments: `make` is asked what it would run, install.py what it would give
pip. So nothing is listed here a second time.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from phi4r.core import optional

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", ".ci/run")
PASSED_ON = ("PIP_FLAGS", "ARGS", "TESTS", "PYTHON", "VENV", "VLLM_VENV")
"""Variables of make that do not change what is installed, or are an example's."""


def told() -> dict[str, str]:
    """command -> where it stands. `make` with its targets and variables, or `pip install` with arguments."""
    texts = {f"the hint for {module}": entry.install for module, entry in optional.TABLE.items()}
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            texts[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for where, text in texts.items():
        for match in re.finditer(r"\bmake((?: [A-Z_]+=\S+| [a-z]+(?:-[a-z]+)*)+)", text):
            words = [word.strip('`,.;:()"') for word in match[1].split()]
            command = " ".join(word for word in words if word.split("=")[0] not in PASSED_ON)
            if all("=" in word or word in targets() for word in command.split()):
                found.setdefault(f"make {command}", where)
        for match in re.finditer(r"\bpip install ([^`\n#;]+)", text):
            found.setdefault(f"pip install {match[1].strip()}", where)
    return found


@functools.cache
def targets() -> frozenset[str]:
    """The targets that the Makefile documents."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    return frozenset(match[1] for line in lines if (match := re.match(r"# make ([a-z-]+) ", line)))


@functools.cache
def run(*command: str) -> str:
    """Standard output of a command in the clone that may not fail."""
    variables = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", *PASSED_ON)}
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
    return done.stdout


@functools.cache
def pip_arguments(command: str, build: str) -> tuple[tuple[str, ...], ...]:
    """What pip is called with by a command of `told`, on a machine where `build` of torch is found."""
    words = shlex.split(command)
    if words[0] != "make":
        return (tuple(words[2:]),)
    asks_for_build = any(word.startswith(("CUDA=", "CPU=")) for word in words)
    chosen = [] if asks_for_build else [f"{build.upper()}=1"]
    # -B: as if nothing had been made; a VENV of its own, so that nothing there is looked at.
    planned = run("make", "-nB", "VENV=no-such-environment", *words[1:], *chosen)
    return tuple(_calls(planned))


def _calls(planned: str) -> Iterator[tuple[str, ...]]:
    for line in planned.splitlines():
        words = shlex.split(line, comments=True) if "install" in line else []
        if "install.py" in words:
            arguments = words[words.index("install.py") + 1 :]
            for printed in run(sys.executable, "install.py", "--print", *arguments).splitlines():
                yield tuple(shlex.split(printed)[1:])
        elif words[1:4] == ["-m", "pip", "install"]:
            yield tuple(words[4:])
