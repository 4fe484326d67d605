"""Plants known bugs in the kernels, one at a time, and tells which test sees each.

    python -m tests.kernels.drills [attention hopper plan head] [--only TEXT] [--new] [--write]

`planted_bugs.py` lists them. Each is planted in a copy of the kernels, in a process of its own that runs the
tests named with it; a crash, or no end within DEADLINE_S, counts as seen. Exits 1 if one is not seen: then a
test is missing. --write records in README.md, between the marks, what failed; rows of bugs that were not
planted this time stay. Minutes for each part; needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kernels.planted_bugs import BUGS, PARTS, Bug

ROOT = Path(__file__).parents[2]
README = Path(__file__).with_name("README.md")
DEADLINE_S = 150


@dataclass(frozen=True)
class Outcome:
    """test: the first test that failed, "" if all passed; error: how it failed."""

    test: str
    error: str = ""

    @property
    def cell(self) -> str:
        """For the table: the test's name, and the error if it is not that of an assertion."""
        name = self.test.removeprefix("test_").split("[")[0].replace("_", " ")
        return f"{name} ({self.error})" if self.error != "AssertionError" else name


class Collector:
    """A pytest plugin that counts tests and keeps the first failure."""

    def __init__(self) -> None:
        self.num_run, self.test, self.error = 0, "", ""

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        if not self.test:
            self.test, self.error = node.name, call.excinfo.typename

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.num_run += report.when == "call"


def planted(bug: Bug, folder: Path) -> Path:
    """A copy of the kernels with the bug in it, below `folder`. ValueError unless its text is there once."""
    package = folder / "phi4r_kernels"
    shutil.copytree(ROOT / "kernels" / "phi4r_kernels", package, ignore=shutil.ignore_patterns("__pycache__"))
    file = package / bug.file
    text = file.read_text(encoding="utf-8")
    if text.count(bug.old) != 1:
        raise ValueError(f"{bug.name}: {text.count(bug.old)} places in {bug.file} read {bug.old!r}, not one")
    file.write_text(text.replace(bug.old, bug.new), encoding="utf-8")
    return package


def _child(bug: Bug, folder: Path, answer: int) -> None:
    """The forked process: run the tests on the copy and write which failed first."""
    signal.alarm(DEADLINE_S)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    # An editable installation finds phi4r_kernels in the repository before sys.path is looked at.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
    sys.path[:0] = [str(folder), str(ROOT)]
    import hypothesis
    import phi4r_kernels
    import pytest

    from tests.kernels import gluon_simulator

    assert Path(phi4r_kernels.__file__).parent == folder / "phi4r_kernels", phi4r_kernels.__file__
    # One failure is enough: no search for the smallest example.
    hypothesis.settings.register_profile("drill", phases=[hypothesis.Phase.generate], database=None)
    hypothesis.settings.load_profile("drill")
    gluon_simulator.DEADLINE_S = 4  # it waits microseconds unless the bug is a wait without end
    file, _, selected = bug.tests.partition("::")
    collector = Collector()
    pytest.main(
        ["-q", "-x", "-p", "no:cacheprovider", "-o", f"pythonpath={folder} {ROOT}", file, "-k", selected],
        plugins=[collector],
    )
    assert collector.num_run, f"no test for {bug.tests}"
    os.write(answer, json.dumps([collector.test, collector.error]).encode())
    os._exit(0)


def drill(bug: Bug) -> Outcome:
    """Plant one bug and run its tests in a fork of this process, which has imported torch and triton."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted(bug, folder)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                _child(bug, folder, writing)
            finally:
                os._exit(70)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if text:
        return Outcome(*json.loads(text))
    if status == 70:
        raise RuntimeError(f"{bug.name}: the drill itself failed")
    ended = f"no end within {DEADLINE_S} s" if status == -signal.SIGALRM else f"status {status}"
    return Outcome("the process died", ended)


def _table(part: str) -> tuple[str, dict[str, str], str]:
    """(README.md up to the table of `part`, its rows: bug -> what failed, README.md after the table)."""
    begin, end = f"<!-- drills: {part} -->\n", "<!-- end -->"
    before, rest = README.read_text(encoding="utf-8").split(begin)
    table, after = rest.split(end, 1)
    header, *rows = re.findall(r"^\| (.+) \| (.+) \|$", table, re.MULTILINE)
    assert header == ("planted", "seen by")
    return before + begin, dict(rows), end + after


def write(bug: Bug, cell: str) -> None:
    """Set the row of a bug in README.md; rows of bugs that are no longer listed go."""
    before, known, after = _table(bug.part)
    known[bug.name] = cell
    rows = [f"| {b.name} | {known[b.name]} |" for b in BUGS if b.part == bug.part and b.name in known]
    table = "\n".join(["", "| planted | seen by |", "|---|---|", *rows, "", ""])
    README.write_text(before + table + after, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a bug was not seen."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels.drills", description=__doc__.splitlines()[0]
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="bugs whose name contains TEXT")
    parser.add_argument("--new", action="store_true", help="bugs without a row in README.md")
    parser.add_argument("--write", action="store_true", help="record the outcome in README.md")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}, expected {', '.join(PARTS)}")
    known = {part: _table(part)[1] if options.new else {} for part in PARTS}
    named = [b for b in BUGS if b.part in (options.parts or PARTS) and options.only in b.name]
    chosen = [b for b in named if b.name not in known[b.part]]
    if not named:
        parser.error(f"no bug contains {options.only!r}")
    os.environ["TRITON_INTERPRET"] = "1"
    os.chdir(ROOT)
    import hypothesis  # noqa: F401 - what the children share
    import torch  # noqa: F401
    import triton  # noqa: F401

    missed = 0
    for bug in chosen:
        start = time.monotonic()
        outcome = drill(bug)
        missed += not outcome.test
        words = outcome.cell if outcome.test else "NOT SEEN"
        print(f"{bug.part}: {bug.name}: {words} [{time.monotonic() - start:.0f} s]", flush=True)
        if options.write and outcome.test:
            write(bug, outcome.cell)
    print(f"{len(chosen)} bugs, {missed} not seen")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
