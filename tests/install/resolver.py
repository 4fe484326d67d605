"""uv as a resolver that reads metadata only: whether pip's arguments have an answer on the package index."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import uv

ROOT = Path(__file__).parents[2]
OFFLINE = "PHI4R_OFFLINE"
"""Set to 1 where there is no package index; the tests here are then skipped."""
PLATFORMS = {"linux": "x86_64-unknown-linux-gnu", "macos": "aarch64-apple-darwin"}
IGNORED = ("-q", "--disable-pip-version-check", "--no-build-isolation")
DEADLINE_S = 300
"""For one resolution; with a cold cache it takes some seconds."""


@functools.cache
def index() -> str:
    """The index that pip is set up with; "" for the public one. Folders and extra indexes of this machine are
    left out."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60
    ).stdout
    found = dict(re.findall(r"^(\S+?)='(.*)'$", asked, re.MULTILINE))
    names = (":env:.index-url", "install.index-url", "global.index-url")
    return next((found[name] for name in names if name in found), "")


def requirements(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """pip's arguments as (constraints files, extras of phi4r, requirements). AssertionError on an argument
    that this does not know: it might change what is installed."""
    constraints, extras, wanted = [], [], []
    rest = [argument for argument in arguments if argument not in IGNORED]
    while rest:
        word = rest.pop(0)
        if word == "-c":
            constraints.append(rest.pop(0))
        elif word == "-e":
            project = re.fullmatch(r"\.(?:\[(.*)\])?", rest.pop(0))
            assert project, f"{arguments}: -e of something else than this clone"
            extras += ["", *(project[1] or "").split(",")]
        else:
            assert not word.startswith("-"), f"{arguments}: what does {word} do to the resolution?"
            wanted.append(word)
    return constraints, extras, wanted


def resolve(
    arguments: Sequence[str], python: str, system: str, scratch: Path, find_links: Path | None = None
) -> tuple[list[str], str]:
    """(pinned packages, "") of an installation by pip with `arguments`, or ([], why there is none). python:
    "3.11"; system: a key of PLATFORMS; scratch: an empty folder; find_links: wheels that the index lacks.
    Fails the test where the index cannot be reached."""
    constraints, extras, wanted = requirements(arguments)
    (scratch / "requirements.in").write_text("\n".join(wanted))
    command = [
        uv.find_uv_bin(), "pip", "compile", "--no-config", "-q", "--no-header", "--no-annotate",
        "--python", sys.executable, "--python-version", python, "--python-platform", PLATFORMS[system],
        *(word for file in constraints for word in ("-c", str(ROOT / file))),
        *(["pyproject.toml"] if extras else []),
        *(word for extra in extras if extra for word in ("--extra", extra)),
        *(["--find-links", str(find_links)] if find_links else []),
        str(scratch / "requirements.in"),
    ]  # fmt: skip
    variables = {k: v for k, v in os.environ.items() if k not in ("UV_FIND_LINKS", "UV_EXTRA_INDEX_URL")}
    # torch 2.13's wheels are for macOS 14.
    variables |= {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
    if index():
        variables.setdefault("UV_DEFAULT_INDEX", index())
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    if done.returncode == 0:
        return done.stdout.split("\n")[:-1], ""
    why = done.stderr.strip()
    if re.search(r"Failed to fetch|error sending request|dns error|tcp connect|timed out", why):
        pytest.fail(
            f"the package index cannot be reached ({OFFLINE}=1 skips this where there is none): {why}", False
        )
    return [], why


def cpu_torch(folder: Path, version: str) -> Path:
    """A folder with a wheel of the CPU build of torch, which the package index does not have: the name, the
    version and the requirements of the real one, without its code."""
    needs = importlib.metadata.requires("torch") or []
    needs = [need for need in needs if not re.match(r"nvidia|cuda|triton", need)]
    name = f"torch-{version}+cpu"
    metadata = ["Metadata-Version: 2.1", "Name: torch", f"Version: {version}+cpu"]
    metadata += [f"Requires-Dist: {need}" for need in needs]
    folder.mkdir()
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        inside = f"{name}.dist-info"
        wheel.writestr(f"{inside}/METADATA", "\n".join(metadata) + "\n")
        wheel.writestr(f"{inside}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{inside}/RECORD", "")
    return folder
