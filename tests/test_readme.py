"""README claims nothing that has no row: its table and speed-ups stand in benchmarks/results."""

from __future__ import annotations

import csv
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows(name: str) -> list[dict[str, str]]:
    with open(ROOT / "benchmarks" / "results" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def quickstart_line(row: dict[str, str]) -> str:
    """The README's line for a row of quickstart.csv."""

    def percent(name: str) -> str:
        return f"{100 * float(row[name]):.1f}"

    cells = [
        row["seed"],
        f"{percent('sft_avg_at_8')}% ({percent('sft_low')} to {percent('sft_high')})",
        f"{percent('grpo_avg_at_8')}% ({percent('grpo_low')} to {percent('grpo_high')})",
        f"+{percent('gain')} points ({percent('gain_low')} to {percent('gain_high')})",
        f"{float(row['sft_length']):.1f} -> {float(row['grpo_length']):.1f} tokens",
        f"{float(row['seconds']) / 60:.1f} min",
    ]
    return "| " + " | ".join(cells) + " |"


def test_the_quick_start_table_is_what_the_rows_say() -> None:
    table = re.search(r"<!-- seeds -->\n(.*?)<!-- /seeds -->", README, flags=re.DOTALL)
    assert table is not None
    lines = [line for line in table[1].splitlines() if re.match(r"\| \d", line)]
    found = [row for row in rows("quickstart") if not row["settings"]]
    newest = [row for row in found if row["commit"] == found[-1]["commit"]]
    assert lines == [quickstart_line(row) for row in newest]


def test_the_native_speed_ups_are_what_the_rows_say() -> None:
    ratios = {(row["op"], row["size"]): row["ratio"] for row in rows("native")}
    packing = re.search(r"packing 25,600 documents is ([\d.]+)\s+times faster", README)
    counting = re.search(r"of 31,744\s+tokens ([\d.]+)\s+times", README)
    assert packing is not None
    assert counting is not None
    assert packing[1] == ratios["pack_ffd", "25600"]
    assert counting[1] == ratios["ngram_repetition", "31744"]
