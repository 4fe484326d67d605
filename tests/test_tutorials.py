"""The files and commands of docs/tutorials run as they stand, in the order of the page, in an empty folder.

A block whose first line is `# NAME.EXT` is a file. Every line of a bash block is a command; after a line
`# refused: TEXT` it must end with exit code 2 and one line that has TEXT in it.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
PAGES = sorted(path.stem for path in TUTORIALS.glob("*.md") if path.stem != "README")
TIMEOUT_S = 300


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, text) of each fenced block."""
    text = (TUTORIALS / f"{page}.md").read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield match[1], match[2]


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command line as a user types it; phi4r and python are those of this interpreter."""
    words = shlex.split(line)
    command = {
        "phi4r": [sys.executable, "-m", "phi4r", *words[1:]],
        "python": [sys.executable, *words[1:]],
    }.get(words[0], ["bash", "-c", line])
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.mark.parametrize("page", PAGES)
def test_a_tutorial_runs_as_it_stands(page: str, tmp_path: Path) -> None:
    num_commands = 0
    for language, text in blocks(page):
        name = re.match(r"# (\S+\.\w+)\n", text)
        if name:
            (tmp_path / name[1]).write_text(text, encoding="utf-8")
            continue
        assert language == "bash", f"a block of {page} is neither a file nor commands: {text[:60]!r}"
        refused = ""
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("# refused: "):
                refused = line.removeprefix("# refused: ")
            elif line and not line.startswith("#"):
                ended = run(line, tmp_path)
                told = f"{line}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
                assert ended.returncode == (2 if refused else 0), told
                assert refused in ended.stderr, told
                assert not refused or ended.stderr.count("\n") == 1, told
                refused, num_commands = "", num_commands + 1
    assert num_commands >= 3


def test_every_tutorial_is_on_the_first_page() -> None:
    listed = re.findall(r"\]\((\w+)\.md\)", (TUTORIALS / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == PAGES
