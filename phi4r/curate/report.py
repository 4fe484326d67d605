"""What curation did, for people and programs: the funnel, the removed items, the console table.

    curation_report.json   {"stages": [{"name", "before", "kept", "removed", "reasons", "examples",
    "notes"}, ...], ...} removed.jsonl          every removed item: stage, reason, what it clashed with, and
    the whole row

Counts add up along the funnel: a stage's `before` is its `kept` plus its `removed`, and is the `kept` of
the stage before.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phi4r.curate.stage import Removed, StageResult
from phi4r.data.records import problem_row

EXAMPLES_PER_REASON = 3
_EXAMPLE_CHARS = 240


def removed_row(stage: str, item: Removed) -> dict[str, Any]:
    """One line of removed.jsonl."""
    return {
        "stage": stage,
        "reason": item.reason,
        "id": item.problem.id,
        "problem": item.problem.problem,
        "clash_id": item.clash_id,
        "clash": item.clash_text,
        "detail": item.detail,
        "row": problem_row(item.problem),
    }


def stage_summary(
    name: str, before: int, kept: int, removed: Sequence[dict[str, Any]], notes: dict[str, Any]
) -> Any:
    """The report entry of one stage from its counts and its lines of removed.jsonl."""
    if before != kept + len(removed):
        raise ValueError(f"stage {name} loses items: {before} before, {kept} kept and {len(removed)} removed")
    reasons: dict[str, int] = {}
    examples: list[dict[str, Any]] = []
    for row in removed:
        reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
        if reasons[row["reason"]] <= EXAMPLES_PER_REASON:
            texts = {"problem": _shorten(row["problem"]), "clash": _shorten(row["clash"])}
            examples.append({key: row[key] for key in ("reason", "id", "clash_id", "detail")} | texts)
    ordered = dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0])))
    return {
        "name": name,
        "before": before,
        "kept": kept,
        "removed": len(removed),
        "reasons": ordered,
        "examples": examples,
        "notes": notes,
    }


def summarise(result: StageResult) -> Any:
    """`stage_summary` of a stage's result."""
    rows = [removed_row(result.name, item) for item in result.removed]
    return stage_summary(result.name, result.num_before, len(result.kept), rows, result.notes)


def build_report(stages: Sequence[dict[str, Any]], extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """The whole report; refuses (ValueError) a funnel in which a stage does not take up what the one
    before kept."""
    for before, after in itertools.pairwise(stages):
        if before["kept"] != after["before"]:
            raise ValueError(
                f"{before['before']} items enter {before['name']}, {before['kept']} leave it, "
                f"but {after['before']} enter {after['name']}"
            )
    total = stages[0]["before"] if stages else 0
    kept = stages[-1]["kept"] if stages else 0
    return {"input": total, "kept": kept, "removed": total - kept, **(extra or {}), "stages": list(stages)}


def print_funnel(report: dict[str, Any], console: Console) -> None:
    """The funnel as a table: a line per stage, a bar for the share that is left, and the reasons below
    each stage."""
    total = max(1, report["input"])
    table = Table(title="Curation", title_justify="left", header_style="bold")
    table.add_column("stage")
    for name in ("before", "removed", "kept"):
        table.add_column(name, justify="right")
    table.add_column("left of the input")
    for stage in report["stages"]:
        share = stage["kept"] / total
        bar = Text("█" * round(20 * share), style="green") + Text("░" * (20 - round(20 * share)), style="dim")
        table.add_row(
            Text(stage["name"], style="bold"),
            f"{stage['before']:,}",
            f"{stage['removed']:,}",
            f"{stage['kept']:,}",
            bar + Text(f" {share:6.1%}"),
            end_section=not stage["reasons"],
        )
        for position, (reason, count) in enumerate(stage["reasons"].items(), start=1):
            last = position == len(stage["reasons"])
            label = Text(f"  {reason.replace('_', ' ')}", style="dim")
            table.add_row(label, "", Text(f"{count:,}", style="dim"), "", "", end_section=last)
    console.print(table)
    for line in report.get("skipped", []):
        console.print(Text(line, style="yellow"))


def _shorten(text: str) -> str:
    return text if len(text) <= _EXAMPLE_CHARS else text[: _EXAMPLE_CHARS - 1] + "…"
