"""The plan beside a run: what the benchmark writes, and what docs/plan.md says of its rows."""

from __future__ import annotations

import re

from benchmarks.plan_accuracy import COLUMNS, LAYOUTS, run
from benchmarks.rows import RESULTS, read_rows
from tests.benchmarks.conftest import ROOT

SMALL = ("--data.num_generated", "40", "--data.heldout", "0", "--data.seq_length", "64")


def test_a_run_measures_what_was_planned_for_it() -> None:
    row = run("tiny", "tp=1", 2, [*SMALL, "--model.num_layers", "1"])
    assert row["planned_bytes"] == row["measured_bytes"] > 1e6
    assert (row["layout"], row["ranks"], row["device"]) == ("tp=1", 1, "cpu")
    assert float(row["step_s"]) > 0
    assert set(row) <= set(COLUMNS)


def test_the_plans_page_says_what_the_rows_say() -> None:
    rows = read_rows(RESULTS / "plan_accuracy.csv")
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    said = re.search(r"in all (\d+) so far, on a CPU, planned and measured state are equal to the byte", page)
    assert said is not None
    assert len(rows) == int(said[1]) >= len(LAYOUTS.split(";"))
    assert {row["layout"] for row in rows} >= {layout.strip() for layout in LAYOUTS.split(";")}
    assert all(row["device"] == "cpu" and row["planned_bytes"] == row["measured_bytes"] for row in rows)
    assert all(row["dirty"] == "0" and not row["peak_measured_gib"] for row in rows)
