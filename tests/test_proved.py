"""The table of what is proved says what the tests say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_table_of_what_is_proved_is_current(tmp_path: Path) -> None:
    """Only the files that name the marker are collected, which is quicker and gives the same rows."""
    tests = (ROOT / "tests").rglob("test_*.py")
    marked = sorted(str(path) for path in tests if "mark.proves(" in path.read_text(encoding="utf-8"))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "--proved",
        str(tmp_path / "proved.md"),
        *marked,
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    found = (tmp_path / "proved.md").read_text(encoding="utf-8")
    assert found.count("\n| ") > 20
    assert found == (ROOT / "docs" / "proved.md").read_text(encoding="utf-8"), (
        "run: pytest --collect-only -q --proved=docs/proved.md"
    )
