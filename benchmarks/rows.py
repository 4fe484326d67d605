"""Rows of benchmarks/results/*.csv: appended by the tools, with their provenance; never typed."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def git(*arguments: str) -> str:
    """Output of a git command in this repository, "" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def cpu_name() -> str:
    """The processor's name as Linux gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def provenance(*paths: str) -> dict[str, Any]:
    """date (UTC), commit, dirty (1: `paths`, relative to the repository, had changes), cpu."""
    root = Path(__file__).parents[1]
    changed = git("status", "--porcelain", "--", *(str(root / path) for path in paths))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": int(bool(changed)),
        "cpu": cpu_name(),
    }


def append_rows(name: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Append rows to results/NAME.csv, with a header where the file is new; returns the file."""
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    return path
