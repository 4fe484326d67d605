"""Rows of benchmarks/results/*.csv: appended by the tools, with their provenance; never typed."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def git(*arguments: str) -> str:
    """Output of a git command in this repository, "" outside of one or without git."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def cpu_name() -> str:
    """The processor's name as Linux gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def provenance(*paths: str) -> dict[str, Any]:
    """date (UTC), commit, dirty (1: `paths`, relative to the repository, had changes other than rows), cpu.

    A copy without its git folder takes the commit from the variable PHI4R_COMMIT and cannot say whether it is
    dirty ("")."""
    root = Path(__file__).parents[1]
    commit = git("rev-parse", "--short", "HEAD")
    sources = [str(root / path) for path in paths]
    changed = git("status", "--porcelain", "--", *sources, f":(exclude){RESULTS}")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or os.environ.get("PHI4R_COMMIT", "unknown"),
        "dirty": int(bool(changed)) if commit else "",
        "cpu": cpu_name(),
    }


def append_rows(
    name: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], folder: Path = RESULTS
) -> Path:
    """Append rows to FOLDER/NAME.csv, with a header where the file is new; returns the file. ValueError where
    the file has other columns."""
    path = folder / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        with open(path, newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
        if header != list(columns):
            raise ValueError(f"{path} has the columns {header}, these rows {list(columns)}: move it away")
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a result file, every value as it is written."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
