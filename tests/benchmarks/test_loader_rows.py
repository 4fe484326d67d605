"""docs/data.md says what the newest rows of the loader's benchmark say."""

from __future__ import annotations

import re

from benchmarks.rows import RESULTS, read_rows
from tests.benchmarks.conftest import ROOT


def test_the_page_on_data_says_what_the_rows_say() -> None:
    rows = read_rows(RESULTS / "loader.csv")
    commit = [row for row in rows if row["what"] == "dali"][-1]["commit"]
    rate = {row["what"]: float(row["tokens_per_s"]) for row in rows if row["commit"] == commit}
    needed = float(rows[-1]["needed_per_s"] or rows[-2]["needed_per_s"])
    page = " ".join((ROOT / "docs" / "data.md").read_text(encoding="utf-8").split())
    said = re.search(r"DALI hands on (\d+) million tokens a second and the thread (\d+) million", page)
    assert said is not None
    assert [int(number) for number in said.groups()] == [
        round(rate[what] / 1e6) for what in ("dali", "sequence")
    ]
    assert f"to train on is {needed / 1e6:.1f} million" in page
    assert round(rate["sequence"] / rate["dali"]) == 6, "a sixth of the work"
