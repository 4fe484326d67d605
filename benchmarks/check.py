"""No number of something that is wrong: the tests of an op, run before its times may be written.

    python -m benchmarks.check [attention grpo_head ...]

Kernels are tested on a GPU by tests/gpu, without one by tests/kernels, each file in a process of its own. A
success is remembered under benchmarks/out/green for exactly these sources, versions and this device, so that
a series of benchmarks runs its tests once; a failure is never remembered. Exit code 1 where a test fails or
there is none.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import default_device, versions

ROOT = Path(__file__).resolve().parents[1]
GREEN = ROOT / "benchmarks" / "out" / "green"
LIMIT_S = 600


@dataclass(frozen=True)
class Tests:
    """What must pass: patterns of test files below the repository, {where} being "gpu" on a GPU and "kernels"
    without; and the folders whose sources decide it."""

    patterns: tuple[str, ...]
    sources: tuple[str, ...] = ("kernels/phi4r_kernels",)


_ATTENTION, _HEAD = "tests/{where}/test_attention*.py", "tests/{where}/test_linear_loss*.py"
TESTS: dict[str, Tests] = {
    "attention": Tests((_ATTENTION,)),
    "grpo_head": Tests((_HEAD,)),
    "step": Tests((_ATTENTION, _HEAD)),
    "kernels": Tests(("tests/{where}/test_*.py",)),
    "rollout": Tests(("tests/sampling/test_embedded.py",), ("phi4r", "kernels/phi4r_kernels")),
    "data": Tests(
        ("tests/data/test_packing.py", "tests/data/test_render.py"), ("phi4r", "kernels/phi4r_kernels")
    ),
}


def files_of(op: str, device: str, root: Path) -> list[Path]:
    """The files that must pass before times of `op` on `device` ("cuda" or "cpu") are written."""
    where = "gpu" if device == "cuda" else "kernels"
    return sorted(path for pattern in TESTS[op].patterns for path in root.glob(pattern.format(where=where)))


def _stamp(op: str, file: Path, device: str, root: Path) -> str:
    """A name that changes with the sources, the test, the versions and the device."""
    digest = hashlib.sha256(repr(versions(device)).encode())
    sources = [path for folder in TESTS[op].sources for path in sorted((root / folder).rglob("*.py"))]
    for path in [*sources, file]:
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return f"{file.stem}-{digest.hexdigest()[:24]}"


def _run(file: Path, device: str, root: Path) -> str:
    """Why the tests of one file do not pass, "" if they do. A process per file: one that crashes loses no
    other."""
    on_gpu = device == "cuda" and "gpu" in file.relative_to(root).parts
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(file.relative_to(root)),
    ]
    command += ["-m", "gpu" if on_gpu else "not gpu and not slow"]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    try:
        ended = subprocess.run(
            command,
            cwd=root,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return f"{file.name} took more than {LIMIT_S} s"
    lines = ended.stdout.strip().splitlines() or ["no output"]
    if ended.returncode:
        print("\n".join(lines[-40:]))
        return f"{file.name} fails (exit code {ended.returncode}): {lines[-1]}"
    if " passed" not in lines[-1]:
        return f"{file.name} did not run: {lines[-1]}"
    print(f"  {file.name}: {lines[-1]}", flush=True)
    return ""


def failure(op: str, device: str, root: Path = ROOT, green: Path = GREEN) -> str:
    """Why times of `op` may not be written, "" if its tests pass (or passed with these very sources)."""
    if op not in TESTS:
        return ""
    files = files_of(op, device, root)
    if not files:
        return f"no tests of {op} for {device} are there ({', '.join(TESTS[op].patterns)})"
    reasons = []
    for file in files:
        stamp = green / _stamp(op, file, device, root)
        if stamp.exists():
            continue
        print(f"testing {op} first: {file.relative_to(root)}", flush=True)
        if reason := _run(file, device, root):
            reasons.append(reason)
            continue
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    return "; ".join(reasons)


def main() -> int:
    """Test the ops named on the command line, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(TESTS)} (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default_device())
    options = parser.parse_args()
    if unknown := set(options.ops) - set(TESTS):
        parser.error(f"no tests are known for {', '.join(sorted(unknown))}")
    reasons = [reason for op in options.ops or TESTS if (reason := failure(op, options.device))]
    for reason in reasons:
        print(f"benchmarks.check: {reason}", file=sys.stderr)
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
