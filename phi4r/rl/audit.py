"""RUN/audit: where two independent checks of an answer disagree, and `phi4r rollouts audit RUN` to read them.

One file a step that has any, step_000012.jsonl, whole or not there at all, written again by a resumed run. A
row has

    step, prompt_index, sample_index, problem_id, gold, answer, outcome, method, second, second_method, tail

with `outcome` and `method` of the verdict that the reward is made of, `second` and `second_method` of the
check beside it (`verify.audit`), and `tail`, the end of the response. At most `MAX_ROWS` rows a step, drawn
by the run's seed; metrics.jsonl counts all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from phi4r.core.errors import UserError
from phi4r.core.io import JsonlWriter, read_jsonl
from phi4r.core.problem import Problem
from phi4r.sampling.types import Response, Sample
from phi4r.verify.audit import audit_row, disagrees, drawn
from phi4r.verify.strict import Verdict

MAX_ROWS = 64
TAIL_CHARS = 600


def write_audit(
    folder: Path, step: int, graded: Iterable[tuple[Problem, Sample | Response, Verdict]], seed: int
) -> None:
    """Log the disagreements of a step (of an evaluation: a run); a file of the same step is replaced, or
    removed where there are none."""
    path = folder / f"step_{step:06d}.jsonl"
    rows = [
        {
            "step": step,
            "prompt_index": sample.prompt_index,
            "sample_index": sample.sample_index,
            "problem_id": problem.id,
            **audit_row(problem.answer, verdict),
            "tail": sample.text[-TAIL_CHARS:],
        }
        for problem, sample, verdict in graded
        if disagrees(verdict)
    ]
    if not rows:
        path.unlink(missing_ok=True)
        return
    with JsonlWriter(path) as writer:
        for row in drawn(rows, MAX_ROWS, seed, step):
            writer.write(row)


def read_audit(run_dir: Path) -> list[dict[str, Any]]:
    """All logged disagreements of a run, step by step. UserError where there is no such run."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder")
    return [row for path in sorted(run_dir.glob("audit/step_*.jsonl")) for _, row in read_jsonl(path)]


def show_audit(
    run_dir: Path, limit: int = 8, seed: int = 0, as_json: bool = False, console: Console | None = None
) -> None:
    """Print `limit` disagreements (0: all), drawn by `seed` from all that the run has logged."""
    if limit < 0:
        raise UserError(f"--limit: expected 0 (all) or more, got {limit}")
    rows = read_audit(run_dir)
    shown = drawn(rows, limit, seed)
    if as_json:
        print(json.dumps({"logged": len(rows), "rows": shown}, ensure_ascii=False))
        return
    console = console or Console()
    for row in shown:
        console.print(_panel(row))
    lenient = sum(row["outcome"] == "correct" for row in rows)
    console.print(
        Text(
            f"{len(rows):,} disagreements logged: {lenient:,} right by the reward's verdict only,"
            f" {len(rows) - lenient:,} by the second check only; {len(shown):,} shown"
        )
    )


def _panel(row: dict[str, Any]) -> Panel:
    style = "green" if row["outcome"] == "correct" else "red"
    text = Text.assemble(
        (f"… {row['tail']}\n", "dim"),
        ("gold ", "bold"), row["gold"], ("   answer ", "bold"), row["answer"], "\n",
        ("verdict ", "bold"), (f"{row['outcome']} ({row['method']})", style),
        ("   second ", "bold"), f"{row['second']} ({row['second_method']})",
    )  # fmt: skip
    title = f"step {row['step']}  prompt {row['prompt_index']}  sample {row['sample_index']}"
    return Panel(text, title=Text(f"{title}  {row['problem_id']}"), title_align="left", border_style=style)
