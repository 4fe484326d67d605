"""The build: it says what is missing and goes on, unless it was told that the module must be there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake")

pytestmark = pytest.mark.skipif(
    CMAKE is None or not shutil.which("ninja"), reason="needs cmake and ninja on the PATH"
)


def configure(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(CMAKE), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_a_compiler_the_install_succeeds_with_a_warning(tmp_path: Path) -> None:
    result = configure(tmp_path / "build", "-DCMAKE_CXX_COMPILER:FILEPATH=NOTFOUND")
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler was found" in result.stderr
    for step in ("--build", "--install"):
        subprocess.run([str(CMAKE), step, str(tmp_path / "build")], check=True, capture_output=True)


def test_a_module_that_must_be_there_makes_the_missing_compiler_an_error(tmp_path: Path) -> None:
    result = configure(tmp_path / "build", "-DCMAKE_CXX_COMPILER:FILEPATH=NOTFOUND", "-DPHI4R_NATIVE=ON")
    assert result.returncode != 0
    assert "PHI4R_NATIVE=ON, but no C++ compiler" in result.stderr


def test_the_module_can_be_switched_off(tmp_path: Path) -> None:
    result = configure(tmp_path / "build", "-DPHI4R_NATIVE=OFF")
    assert result.returncode == 0, result.stderr
    assert "PHI4R_NATIVE=OFF, the C++ module is not built" in result.stdout


def test_without_nanobind_the_install_succeeds_with_a_warning(tmp_path: Path) -> None:
    # A Python with headers but without packages: this one, started by a link in isolated mode.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" = nanobind ] && exit 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    result = configure(
        tmp_path / "build", f"-DPython_EXECUTABLE={python}", "-DCMAKE_DISABLE_FIND_PACKAGE_nanobind=ON"
    )
    assert result.returncode == 0, result.stderr
    assert "nanobind was not found" in result.stderr
