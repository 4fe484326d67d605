"""Everything that README, docs and hints say to install can be had from the package index, for both Pythons
and builds of torch: uv resolves it from metadata, without a look at the wheels of this machine."""

from __future__ import annotations

import os
import re
import tomllib
from concurrent.futures import ThreadPoolExecutor
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
    """pip's arguments -> where they come from: every command that people are told, every extra alone, and all
    but vLLM (which has an environment of its own) together."""
    asked: dict[tuple[str, ...], str] = {}
    for command, where in told().items():
        if system == "macos" and re.search(r"vllm-deps|test-vllm", command):
            continue  # vLLM has wheels for Linux only
        if build == "cpu" and ("CUDA=1" in command or any(f"EXTRAS={e}" in command for e in GPU_ONLY)):
            continue
        for arguments in pip_arguments(command, build):
            asked.setdefault(arguments, f"{command} ({where})")
    extras = EXTRAS if build == "cuda" else [extra for extra in EXTRAS if extra not in GPU_ONLY]
    for chosen in (*extras, ",".join(extra for extra in extras if extra != "vllm")):
        arguments = ("-c", f"constraints-{build}.txt", "-e", f".[{chosen}]")
        asked.setdefault(arguments, f"extra {chosen}")
    return asked


def conflicts(python: str, system: str, build: str, tmp_path: Path) -> tuple[int, list[str]]:
    """(number of questions, what has no answer and why)."""
    links = resolver.cpu_torch(tmp_path / "wheels", TORCH) if (build, system) == ("cpu", "linux") else None

    def ask(item: tuple[int, tuple[tuple[str, ...], str]]) -> str:
        number, (arguments, where) = item
        scratch = tmp_path / str(number)
        scratch.mkdir()
        pins, why = resolver.resolve(arguments, python, system, scratch, links)
        return "" if pins else f"{where}: {why}"

    asked = questions(system, build)
    with ThreadPoolExecutor(2) as pool:
        return len(asked), [why for why in pool.map(ask, enumerate(asked.items())) if why]


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
