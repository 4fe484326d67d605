"""No number of something that is wrong: the tests of an op, run before its times may be written.

    python -m benchmarks.check [attention grpo_head ...]

On a GPU those of tests/gpu, without one those of tests/kernels, in a process of their own. A success is
remembered under benchmarks/out/green for exactly these sources, versions and this device, so that a series of
benchmarks runs its tests once; a failure is never remembered. Exit code 1 where a test fails or there is
none.
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
LIMIT_S = 900


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
    "rollout": Tests(("tests/rl/test_rollout.py",), ("phi4r", "kernels/phi4r_kernels")),
    "data": Tests(
        ("tests/data/test_packing.py", "tests/data/test_render.py"), ("phi4r", "kernels/phi4r_kernels")
    ),
}


def files_of(op: str, device: str, root: Path) -> list[Path]:
    """The files that must pass before times of `op` on `device` ("cuda" or "cpu") are written."""
    where = "gpu" if device == "cuda" else "kernels"
    return sorted(path for pattern in TESTS[op].patterns for path in root.glob(pattern.format(where=where)))


def _fingerprint(op: str, files: list[Path], device: str, root: Path) -> str:
    digest = hashlib.sha256(repr(versions(device)).encode())
    sources = [path for folder in TESTS[op].sources for path in sorted((root / folder).rglob("*.py"))]
    for path in [*sources, *files]:
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def failure(op: str, device: str, root: Path = ROOT, green: Path = GREEN) -> str:
    """Why times of `op` may not be written, "" if its tests pass (or passed with these very sources)."""
    if op not in TESTS:
        return ""
    files = files_of(op, device, root)
    if not files:
        return f"no tests of {op} for {device} are there ({', '.join(TESTS[op].patterns)})"
    stamp = green / f"{op}-{_fingerprint(op, files, device, root)}"
    if stamp.exists():
        return ""
    names = [str(path.relative_to(root)) for path in files]
    print(f"testing {op} first: {' '.join(names)}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *names]
    on_gpu = device == "cuda" and all("{where}" in pattern for pattern in TESTS[op].patterns)
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
        return f"the tests of {op} took more than {LIMIT_S} s"
    lines = ended.stdout.strip().splitlines()
    if ended.returncode:
        print("\n".join(lines[-40:]))
        return f"the tests of {op} fail (exit code {ended.returncode}): {lines[-1] if lines else 'no output'}"
    if not lines or " passed" not in lines[-1]:
        return f"the tests of {op} did not run: {lines[-1] if lines else 'no output'}"
    print(lines[-1])
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.touch()
    return ""


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
