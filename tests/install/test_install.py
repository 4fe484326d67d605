"""install.py takes the build of torch that is asked for or found, and says what to do where that fails."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.install.commands import ROOT

linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have one build of torch")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with nothing but pip."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=True, symlinks=True)
    return folder / "bin" / "python"


def install(python: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """install.py, with pip cut off from every index but the given options; `path` comes first on PATH."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    variables |= {"PIP_CONFIG_FILE": os.devnull, "PATH": f"{path or python.parent}:/usr/bin:/bin"}
    return subprocess.run(
        [str(python), "install.py", *arguments],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@linux
def test_what_is_found_decides_between_the_builds(python: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    options = ("--print", "--no-index", f"--find-links={wheels}")
    assert "constraints-cuda.txt" in install(python, *options).stdout
    # A name is all that pip reads of a wheel before it downloads.
    (wheels / f"torch-2.13.0+cpu-{tag}-{tag}-linux_x86_64.whl").write_bytes(b"")
    (wheels / f"torch-2.13.0+cpu-{tag}-{tag}-linux_aarch64.whl").write_bytes(b"")
    assert "constraints-cpu.txt" in install(python, *options).stdout
    assert "constraints-cuda.txt" in install(python, *options, "--build", "cuda").stdout
    programs = tmp_path / "bin"
    programs.mkdir()
    nvidia_smi = programs / "nvidia-smi"
    nvidia_smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200'\n")
    nvidia_smi.chmod(0o755)
    assert "constraints-cuda.txt" in install(python, *options, path=programs).stdout
    nvidia_smi.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert "constraints-cpu.txt" in install(python, *options, path=programs).stdout


@linux
def test_a_cpu_build_that_no_index_has_is_refused_with_a_way_out(python: Path) -> None:
    done = install(python, "--build", "cpu", "--no-index")
    assert (done.returncode, done.stdout) == (2, "")
    assert "CPU=1: pip finds no torch 2.13.0+cpu" in done.stderr
    assert "PIP_FLAGS='--extra-index-url=ADDRESS'" in done.stderr


def test_an_index_without_the_packages_ends_with_what_to_do(python: Path, tmp_path: Path) -> None:
    done = install(python, "--build", "cuda", "--no-index", f"--find-links={tmp_path}")
    assert done.returncode == 1, done.stderr
    assert "the CUDA build (asked for), about" in done.stdout
    assert "installation failed: the index lacks a package" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_index_out_of_reach_ends_with_what_to_do(python: Path) -> None:
    # Port 9 of this machine: nobody listens.
    nowhere = ("--index-url=http://127.0.0.1:9/simple", "--retries=1", "--timeout=5")
    done = install(python, "--build", "cuda", *nowhere)
    assert done.returncode == 1, done.stderr
    assert "installation failed: pip does not reach its index" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--build", "cuda", "--extras", "tee"), "no extra is called 'tee'; there are test, wandb"),
        (("--build", "cpu", "--extras", "te"), "te is for GPUs and the CUDA build of torch: add CUDA=1"),
    ],
)
def test_extras_that_cannot_be_had_are_refused(python: Path, arguments: tuple[str, ...], why: str) -> None:
    done = install(python, *arguments, "--print")
    assert (done.returncode, done.stdout) == (2, "")
    assert why in done.stderr


def test_both_builds_at_once_are_refused() -> None:
    done = subprocess.run(
        ["make", "-n", "install", "CPU=1", "CUDA=1"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "CUDA=1 and CPU=1: one of them" in done.stderr
