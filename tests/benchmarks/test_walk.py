"""The walk counts what one step enters, and nothing before or after it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from benchmarks.walk import Tracer, totals

PROGRAM = """\
def begin_step():
    pass


def first():
    return 1


def second():
    return [third() for _ in range(3)]


def third():
    return 3


for work in (first, second, first):
    begin_step()
    work()
"""


def test_the_walk_counts_the_functions_of_the_second_step(tmp_path: Path) -> None:
    path = tmp_path / "phi4r" / "loop.py"
    path.parent.mkdir()
    path.write_text(PROGRAM)
    tracer, before = Tracer(tmp_path), sys.getprofile()
    sys.setprofile(tracer)
    try:
        runpy.run_path(str(path))
    finally:
        sys.setprofile(before)
    found = tracer.found()
    assert found == {"phi4r/loop.py": {"lines": 19, "functions": {"begin_step": 2, "second": 2, "third": 2}}}
    assert totals(found) == {"files": 1, "functions": 3, "lines": 19, "function_lines": 6}
