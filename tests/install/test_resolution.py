"""Everything that README, docs and hints say to install can be had from the package index, for both Pythons
and builds of torch: uv resolves it from metadata, without a look at the wheels of this machine."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.install import resolver
from tests.install.commands import ROOT, pip_arguments, told

pytestmark = pytest.mark.skipif(
    os.environ.get(resolver.OFFLINE) == "1", reason=f"{resolver.OFFLINE}=1: no package index"
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = list(PROJECT["optional-dependencies"])
TORCH = "2.13.0"
GPU_ONLY = ("te", "flash-attn", "flash-attn-4", "vllm")
"""Extras that a CPU build of torch is of no use to."""


def questions(system: str, build: str) -> dict[tuple[str, ...], str]:
    """pip's arguments -> where they come from: every command that people are told, and every extra."""
    asked: dict[tuple[str, ...], str] = {}
    for command, where in told().items():
        if system == "macos" and re.search(r"vllm-deps|test-vllm", command):
            continue  # vLLM has wheels for Linux only
        if f"{'CPU' if build == 'cuda' else 'CUDA'}=1" in command:
            continue
        if build == "cpu" and any(f"EXTRAS={extra}" in command for extra in GPU_ONLY):
            continue
        for arguments in pip_arguments(command, build):
            asked.setdefault(arguments, f"{command} ({where})")
    for extra in EXTRAS:
        if build == "cuda" or extra not in GPU_ONLY:
            arguments = ("-c", f"constraints-{build}.txt", "-e", f".[{extra}]")
            asked.setdefault(arguments, f"extra {extra}")
    return asked


def unions(asked: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """All that is wanted under the same constraints as one question -> the questions in it: the answer of the
    union is one of each part."""
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for arguments in asked:
        groups.setdefault(tuple(resolver.requirements(arguments)[0]), []).append(arguments)
    found = {}
    for constraints, parts in groups.items():
        extras = sorted({extra for part in parts for extra in resolver.requirements(part)[1] if extra})
        wanted = sorted({word for part in parts for word in resolver.requirements(part)[2]})
        project = ("-e", f".[{','.join(extras)}]") if constraints else ()
        found[(*(word for file in constraints for word in ("-c", file)), *project, *wanted)] = parts
    return found


def conflicts(python: str, system: str, build: str, scratch: Path) -> tuple[int, list[str]]:
    """(number of questions, what has no answer and why). What cannot be had together is asked for singly."""
    links = resolver.cpu_torch(scratch / "wheels", TORCH) if (build, system) == ("cpu", "linux") else None
    asked = questions(system, build)
    found = []
    for union, parts in unions(asked).items():
        if not resolver.resolve(union, python, system, scratch, links)[0]:
            for part in parts:
                pins, why = resolver.resolve(part, python, system, scratch, links)
                found += [] if pins else [f"{asked[part]}: {why}"]
    return len(asked), found


@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize(("system", "build"), [("linux", "cuda"), ("linux", "cpu"), ("macos", "cpu")])
def test_all_that_people_are_told_to_install_resolves(
    python: str, system: str, build: str, tmp_path: Path
) -> None:
    number, found = conflicts(python, system, build, tmp_path)
    assert number >= 8
    assert not found, "\n".join(found)


def test_the_commands_of_readme_docs_and_hints_are_found() -> None:
    found = told()
    for command, where in {
        "make quickstart": "README.md",
        "make vllm-deps": "the hint for vllm",
        "make install EXTRAS=te": "the hint for transformer_engine",
        "make install CUDA=1": "docs/install.md",
    }.items():
        assert command in found, f"{command} ({where}) in {sorted(found)}"
    assert pip_arguments("make install EXTRAS=te", "cuda")[-1][-1].startswith("transformer-engine[pytorch]")
    assert ("vllm==0.32.0",) in pip_arguments("make vllm-deps CUDA=1", "cpu")


def test_a_conflict_is_named(tmp_path: Path) -> None:
    old = tmp_path / "constraints.txt"
    old.write_text("torch==2.13.0\ntriton==3.6.0\n")
    pins, why = resolver.resolve(("-c", str(old), "-e", "."), "3.11", "linux", tmp_path)
    assert not pins
    assert "torch==2.13.0 depends on triton" in why
    assert "==3.7.1" in why


def test_trainer_and_vllm_get_the_same_torch_triton_and_nccl(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    ours, _ = resolver.resolve(("-c", "constraints-cuda.txt", "-e", "."), "3.12", "linux", tmp_path / "ours")
    theirs, _ = resolver.resolve(("vllm==0.32.0",), "3.12", "linux", tmp_path / "theirs")
    for name in ("torch", "triton", "nvidia-nccl-cu13"):
        (mine,) = [pin for pin in ours if pin.startswith(f"{name}==")]
        assert mine in theirs


def test_the_builds_name_one_torch() -> None:
    texts = [(ROOT / f"constraints-{build}.txt").read_text() for build in ("cpu", "cuda")]
    assert set(re.findall(r"torch==([\d.]+)", "\n".join(texts))) == {TORCH}
