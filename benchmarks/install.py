"""phi4r installed in an empty folder, as a newcomer would: by uv with Python 3.12 and the CUDA build of torch
from the package index, and by pip with Python 3.11 and a CPU build; then doctor, the small quick start and
the suite.

    python -m benchmarks.install [--only uv-cuda] [--folder DIR] [--stages install] [--suite tests]
        [--write]

`make test-install` calls it. Each environment is made in a fresh clone of HEAD; the CUDA build needs no GPU,
but about 3 GB to download. Stages: install, doctor, pipeline (tests/test_pipeline.py), suite (the default
tests, or those of --suite). Exits 1 if one failed; what failed is printed. --write appends a row per stage to
results/install.csv as soon as the stage has ended.

Columns: date (UTC), commit, dirty, cpu, environment, python, torch, triton, stage, tests (those of --suite),
seconds (wall clock, other load included), packages (with what tests need), download_gb (their wheels, as the
index gives their sizes), disk_gb (the environment's folder), passed, failed, skipped (tests).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import append_rows, provenance

ROOT = Path(__file__).parents[1]
COLUMNS = [
    "date", "commit", "dirty", "cpu", "environment", "python", "torch", "triton", "stage", "tests", "seconds",
    "packages", "download_gb", "disk_gb", "passed", "failed", "skipped",
]  # fmt: skip
DEADLINES_S = {"install": 3600, "doctor": 600, "pipeline": 3600, "suite": 4 * 3600}
DEFAULT_SUITE = "not slow and not gpu and not vllm and not slurm"


@dataclass(frozen=True)
class Environment:
    """A way to install: python ("3.12"), tool (uv or pip), build of torch."""

    python: str
    tool: str
    build: str

    @property
    def name(self) -> str:
        return f"{self.tool}-{self.build}"


ENVIRONMENTS = (Environment("3.12", "uv", "cuda"), Environment("3.11", "pip", "cpu"))


def find_python(version: str) -> str:
    """An interpreter of this version: on PATH, or of pyenv. SystemExit where there is none."""
    name = f"python{version}"
    candidates = [shutil.which(name), *Path.home().glob(f".pyenv/versions/{version}.*/bin/{name}")]
    for candidate in map(str, filter(None, candidates)):
        if subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return candidate
    raise SystemExit(f"benchmarks.install: no {name} here (on PATH or of pyenv)")


def uv() -> str:
    """The uv of this environment."""
    import uv

    return uv.find_uv_bin()


def commands(environment: Environment) -> dict[str, list[list[str]]]:
    """Stage -> what it runs, in the clone."""
    python = find_python(environment.python)
    tests = [".venv/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if environment.tool == "uv":
        install = [
            [uv(), "venv", "-q", "--python", python, ".venv"],
            [uv(), "pip", "install", "-q", "-c", f"constraints-{environment.build}.txt", "-e", ".[test]"],
        ]
    else:
        install = [["make", "test-deps", f"PYTHON={python}", f"{environment.build.upper()}=1"]]
    return {
        "install": install,
        "doctor": [[".venv/bin/phi4r", "doctor"]],
        "pipeline": [[*tests, "-m", "slow", "tests/test_pipeline.py"]],
        "suite": [[*tests, "-n", "2", "--dist", "loadfile", "-m", DEFAULT_SUITE]],
    }


def download_gb(clone: Path, environment: Environment) -> tuple[int, float]:
    """(packages, GB of their wheels): sizes as the index gives them; of torch's CPU build, of pip's file."""
    resolved = subprocess.run(
        [
            uv(), "pip", "compile", "-q", "--no-config", "--format", "pylock.toml", "--python-version",
            environment.python, "-c", "constraints-cuda.txt", "--extra", "test", "pyproject.toml",
        ],
        cwd=clone, capture_output=True, text=True, check=True, timeout=600,
    ).stdout  # fmt: skip
    packages = tomllib.loads(resolved)["packages"]
    sizes = {p["name"]: min(w["size"] for w in p.get("wheels") or [p["sdist"]]) for p in packages}
    if environment.build == "cpu":
        listed = subprocess.run(
            [".venv/bin/python", "-m", "pip", "list", "--format", "json"],
            cwd=clone, capture_output=True, text=True, check=True, timeout=600,
        ).stdout  # fmt: skip
        there = {package["name"].lower().replace("_", "-") for package in json.loads(listed)}
        sizes = {name: size for name, size in sizes.items() if name in there}
        sizes["torch"] = cpu_torch_bytes(clone)
    return len(sizes), sum(sizes.values()) / 1e9


def cpu_torch_bytes(clone: Path) -> int:
    """Size of the wheel of torch's CPU build that pip finds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [".venv/bin/python", "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        command += ["-c", "constraints-cpu.txt", "torch"]
        subprocess.run(command, cwd=clone, check=True, capture_output=True, timeout=1800)
        (wheel,) = Path(folder).glob("torch-*.whl")
        return wheel.stat().st_size


def folder_gb(folder: Path) -> float:
    """Bytes of the files in a folder, in GB."""
    return sum(file.stat().st_size for file in folder.rglob("*") if not file.is_symlink()) / 1e9


def counts(text: str) -> dict[str, int]:
    """passed, failed (with errors) and skipped of pytest's last line."""
    last = next(
        (line for line in reversed(text.splitlines()) if re.search(r"\d+ \w+.* in [\d.]+s", line)), ""
    )
    found = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", last)}
    failed = found.get("failed", 0) + found.get("error", 0) + found.get("errors", 0)
    return {"passed": found.get("passed", 0), "failed": failed, "skipped": found.get("skipped", 0)}


def run_stage(calls: Sequence[Sequence[str]], clone: Path, deadline_s: float) -> tuple[bool, str, float]:
    """(all went well, output, seconds); what it says is also shown."""
    start, said, good = time.monotonic(), "", True
    variables = {
        k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "VIRTUAL_ENV", "PYTHONPATH"))
    }
    variables["OMP_NUM_THREADS"] = "1"
    for call in calls:
        print(f"$ {' '.join(call)}", flush=True)
        try:
            done = subprocess.run(
                call, cwd=clone, env=variables, text=True, timeout=deadline_s, check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            said, good = said + done.stdout, done.returncode == 0
        except subprocess.TimeoutExpired:
            said, good = f"{said}\nno end within {deadline_s:.0f} s", False
        if not good:
            break
    print(said if not good else "\n".join(said.splitlines()[-3:]), flush=True)
    return good, said, time.monotonic() - start


def measure(
    environment: Environment, folder: Path, stages: Sequence[str], suite: Sequence[str]
) -> Iterator[tuple[bool, dict[str, Any]]]:
    """(went well, row) of each of `stages` (install always) as it ends; none after a failed installation."""
    clone = folder / environment.name
    subprocess.run(["git", "clone", "-q", "--depth", "1", ROOT.as_uri(), str(clone)], check=True)
    shared: dict[str, Any] = {"environment": environment.name}
    for stage, calls in commands(environment).items():
        if stage not in ("install", *stages):
            continue
        print(f"== {environment.name}: {stage}", flush=True)
        calls = [[*call, *suite] for call in calls] if stage == "suite" else calls
        good, said, seconds = run_stage(calls, clone, DEADLINES_S[stage])
        if stage == "install" and good:
            shared |= describe(clone, environment)
        tested: dict[str, Any] = counts(said) if stage in ("pipeline", "suite") else {}
        if stage == "suite":
            tested["tests"] = " ".join(suite)
        yield good, shared | {"stage": stage, "seconds": round(seconds, 1)} | tested
        if stage == "install" and not good:
            return


def describe(clone: Path, environment: Environment) -> dict[str, Any]:
    """Versions and sizes of an environment: the columns python to triton, packages to disk_gb."""
    code = (
        "import json, platform; from importlib.metadata import version; "
        "found = {name: version(name) for name in ('torch', 'triton')}; "
        "print(json.dumps(found | {'python': platform.python_version()}))"
    )
    asked = subprocess.run([".venv/bin/python", "-c", code], cwd=clone, capture_output=True, check=True)
    number, size = download_gb(clone, environment)
    sizes = {"download_gb": round(size, 2), "disk_gb": round(folder_gb(clone / ".venv"), 2)}
    return json.loads(asked.stdout) | {"packages": number} | sizes


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if a stage failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.install", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[e.name for e in ENVIRONMENTS], help="one environment")
    parser.add_argument(
        "--folder", type=Path, help="an empty folder to work in, kept (default: a temporary one)"
    )
    parser.add_argument("--stages", nargs="+", default=list(DEADLINES_S), choices=list(DEADLINES_S))
    parser.add_argument("--suite", nargs="*", default=[], help="what of the default suite to run (all)")
    parser.add_argument("--write", action="store_true", help="append rows to results/install.csv")
    options = parser.parse_args(arguments)
    if options.folder and options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty")
    chosen = [e for e in ENVIRONMENTS if options.only in (None, e.name)]
    shared, failed = provenance("."), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for environment in chosen:
            for good, found in measure(environment, folder, options.stages, options.suite):
                row = shared | found
                words = [f"{row[word]} {word}" for word in ("passed", "failed", "skipped") if word in row]
                line = f"{row['environment']}, {row['stage']}: {row['seconds']} s"
                print(", ".join([line, *words]), flush=True)
                if not good:
                    failed.append(line)
                if options.write:
                    append_rows("install", COLUMNS, [row])
    for stage in failed:
        print(f"failed: {stage}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
