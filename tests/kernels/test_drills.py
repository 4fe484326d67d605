"""The planted bugs can still be planted, and each was seen by a test when it last was."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels import drills
from tests.kernels.planted_bugs import BUGS, PARTS, Bug


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.part}: {bug.name}")
def test_a_bugs_text_is_in_the_kernels_once_and_its_tests_exist(bug: Bug) -> None:
    source = drills.ROOT / "kernels" / "phi4r_kernels" / bug.file
    assert source.read_text(encoding="utf-8").count(bug.old) == 1
    assert bug.old != bug.new
    assert (drills.ROOT / bug.tests.partition("::")[0]).exists()


def test_every_bug_has_a_row_in_the_readme() -> None:
    for part in PARTS:
        assert list(drills._table(part)[1]) == [bug.name for bug in BUGS if bug.part == part]


def test_a_bug_that_cannot_be_planted_is_an_error(tmp_path: Path) -> None:
    gone = Bug("plan", "gone", "attention_plan.py", "no such text", "", "tests/kernels/test_attention.py")
    with pytest.raises(ValueError, match="gone: 0 places in"):
        drills.planted(gone, tmp_path)
