"""A copy of the benchmarks with planted tests, and one small run of every entry in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLANTED = ("kernels/test_attention_planted.py", "kernels/test_linear_loss_planted.py",
           "sampling/test_embedded.py", "data/test_packing.py")  # fmt: skip
SMALL = ["--device", "cpu", "--shape", "tiny", "--seconds", "0", "--min-rounds", "2"]
ENTRIES: dict[str, list[str]] = {
    "attention": [*SMALL, "--tokens", "64", "128", "--mixes", "dense", "uniform"],
    "grpo_head": [*SMALL, "--tokens", "64", "128"],
    "elementwise": [*SMALL, "--tokens", "64"],
    "step": [*SMALL, "--tokens", "64"],
    "rollout": ["--seconds", "0", "--min-rounds", "2", "--slots", "1", "4", "--num-requests", "4",
                "--new-tokens", "4", "--only", "embedded"],
    "data": ["--seconds", "0", "--min-rounds", "2", "--num-documents", "30"],
}  # fmt: skip


def copy_of_benchmarks(folder: Path, planted: str) -> Path:
    """The benchmarks and kernels under `folder`, with `planted` as the tests that decide."""
    for name in ("benchmarks", "kernels/phi4r_kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "results", "out", "*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in PLANTED:
        path = folder / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(planted, encoding="utf-8")
    return folder


def python(folder: Path, *words: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder`, its benchmarks first on the path. The planted tests need no plugins, which take
    most of a small run's time."""
    path = os.pathsep.join([str(folder), str(folder / "kernels"), str(ROOT)])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the rows of one small run of all entries (one process: torch is imported once)."""
    folder = copy_of_benchmarks(tmp_path_factory.mktemp("green"), "def test_it() -> None:\n    pass\n")
    code = "import importlib, sys\n"
    for name, words in ENTRIES.items():
        code += f"sys.argv = ['{name}', *{words!r}, '--results', 'rows']\n"
        code += f"assert importlib.import_module('benchmarks.{name}').main() == 0\n"
    ended = python(folder, "-c", code)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return folder / "rows"
