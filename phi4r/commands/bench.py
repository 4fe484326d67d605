"""`phi4r bench`: starts an entry of the benchmarks folder, which lives beside the package in a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import phi4r
from phi4r.core.errors import UserError

ENTRIES = (
    "attention", "grpo_head", "elementwise", "step", "rollout", "data", "native", "plot", "targets",
)  # fmt: skip


def main(entry: str, arguments: Sequence[str], root: Path | None = None) -> int:
    """Run `python -m benchmarks.ENTRY ARGUMENTS` in the current folder; returns its exit code. UserError for
    an unknown entry, or where `root` (default: where phi4r is imported from) is no checkout."""
    root = root or Path(phi4r.__file__).resolve().parents[1]
    if entry not in ENTRIES:
        raise UserError(f"bench: expected one of {', '.join(ENTRIES)}, got {entry!r}")
    if not (root / "benchmarks" / f"{entry}.py").exists():
        raise UserError(
            f"bench: {root} has no benchmarks folder: benchmarks run from a checkout of phi4r's repository"
        )
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    # -P: a folder named benchmarks where the user stands must not come first.
    command = [sys.executable, "-P", "-m", f"benchmarks.{entry}", *arguments]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}, check=False
    ).returncode
