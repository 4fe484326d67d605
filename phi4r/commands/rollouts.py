"""`phi4r rollouts show RUN`: read what the model wrote, sample by sample; `phi4r rollouts audit RUN`: where
two checks of an answer disagree.

A panel per sample (prompt, think block dimmed, answer highlighted, every part of the reward), a table per
prompt that sets its group side by side, and aggregates over everything selected. `--json` prints the same
as one JSON object.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from phi4r.core.errors import UserError
from phi4r.families.registry import chat_formats
from phi4r.rl.rollout_log import read_audit, read_rollouts, rollout_steps
from phi4r.verify.audit import drawn

Sort = Literal["file", "reward", "length"]
SORTS = ("file", "reward", "length")
_SHORT_CHARS = 800
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_OUTCOME_STYLES = {
    "correct": "green",
    "wrong": "red",
    "no_answer": "yellow",
    "timeout": "magenta",
    "error": "magenta",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample as it is shown; `reward` is the total, `parts` what it is made of."""

    step: int
    prompt_index: int
    sample_index: int
    problem_id: str
    prompt: str
    text: str
    num_tokens: int
    finished: bool
    outcome: str
    answer: str
    gold: str
    reward: float
    advantage: float
    mean_logprob: float | None = None
    parts: dict[str, Any] = field(default_factory=dict)


def parse_row(raw: dict[str, Any], where: str = "rollouts") -> Row:
    """A line of a rollout file as a `Row`. Raises UserError naming the missing field."""
    try:
        return Row(
            step=int(raw["step"]),
            prompt_index=int(raw["prompt_index"]),
            sample_index=int(raw["sample_index"]),
            problem_id=str(raw["problem_id"]),
            prompt=str(raw["prompt"]),
            text=str(raw["text"]),
            num_tokens=int(raw["num_tokens"]),
            finished=bool(raw["finished"]),
            outcome=str(raw["outcome"]),
            answer=str(raw.get("answer") or ""),
            gold=str(raw.get("gold") or ""),
            reward=float(raw["reward"]),
            advantage=float(raw.get("advantage") or 0.0),
            mean_logprob=raw.get("rollout_logprob_mean"),
            parts=dict(raw.get("reward_parts") or {}),
        )
    except KeyError as error:
        raise UserError(
            f"{where}: a row lacks the field {error.args[0]!r} (is this a rollout file of phi4r?)"
        ) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: a row has a field of the wrong type: {error}") from None


def load(run_dir: str | Path, step: int | None = None) -> list[Row]:
    """All rows of a step, or of every step, in file order."""
    return [parse_row(raw, str(run_dir)) for raw in read_rollouts(run_dir, step)]


def select(
    rows: Sequence[Row],
    problem: str | None = None,
    outcome: str | None = None,
    sort: Sort = "file",
) -> list[Row]:
    """Rows of one problem and one outcome, sorted: best reward first, or longest first; ties stay in file
    order.

    Raises UserError where a filter leaves nothing, listing what there is.
    """
    if sort not in SORTS:
        raise UserError(f"--sort: expected one of {', '.join(SORTS)}, got {sort!r}")
    chosen = [row for row in rows if problem is None or row.problem_id == problem]
    if not chosen:
        known = list(dict.fromkeys(row.problem_id for row in rows))
        more = f", ... ({len(known)} in all)" if len(known) > 8 else ""
        raise UserError(f"--problem: no rollouts of {problem!r} (there are {', '.join(known[:8])}{more})")
    if outcome is not None:
        counts = Counter(row.outcome for row in chosen)
        chosen = [row for row in chosen if row.outcome == outcome]
        if not chosen:
            found = ", ".join(f"{name}: {count}" for name, count in counts.most_common())
            raise UserError(f"--outcome: no rollouts with outcome {outcome!r} ({found})")
    if sort == "reward":
        chosen.sort(key=lambda row: -row.reward)
    elif sort == "length":
        chosen.sort(key=lambda row: -row.num_tokens)
    return chosen


def aggregates(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over all rows, outcomes, and the share of groups whose rewards are all equal (they teach
    nothing)."""
    groups = group_rows(rows)
    return {
        "samples": len(rows),
        "groups": len(groups),
        "steps": len({row.step for row in rows}),
        "accuracy": _mean([row.outcome == "correct" for row in rows]),
        "outcomes": dict(Counter(row.outcome for row in rows).most_common()),
        "reward_mean": _mean([row.reward for row in rows]),
        "length_mean": _mean([row.num_tokens for row in rows]),
        "length_mean_correct": _mean([row.num_tokens for row in rows if row.outcome == "correct"]),
        "length_mean_wrong": _mean([row.num_tokens for row in rows if row.outcome == "wrong"]),
        "finished": _mean([row.finished for row in rows]),
        "groups_without_variance": _mean(
            [len({row.reward for row in group}) == 1 for group in groups.values()]
        ),
    }


def group_rows(rows: Sequence[Row]) -> dict[tuple[int, int], list[Row]]:
    """Rows by (step, prompt index), groups and samples in order of appearance."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.step, row.prompt_index), []).append(row)
    return groups


def show(
    run_dir: str | Path,
    step: int | None = None,
    problem: str | None = None,
    outcome: str | None = None,
    limit: int = 8,
    sort: Sort = "file",
    full: bool = False,
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """Print the rollouts of a run.

    Without `step`, the newest one is shown, or with `problem` every step, so that one problem can be
    followed through training. `limit` bounds the panels (0: all), never the aggregates; `full` prints whole
    texts instead of their first `_SHORT_CHARS` characters. Raises UserError if there is nothing to show.
    """
    if limit < 0:
        raise UserError(f"--limit: expected 0 (all) or more, got {limit}")
    steps = rollout_steps(run_dir)
    if step is None and problem is None and steps:
        step = steps[-1]
    rows = load(run_dir, step)
    if not rows:
        raise UserError(f"{run_dir}: the rollouts of step {step} are empty")
    chosen = select(rows, problem, outcome, sort)
    shown = chosen[:limit] if limit else chosen
    if as_json:
        totals = aggregates(chosen)
        print(
            json.dumps({"aggregates": totals, "rollouts": [asdict(row) for row in shown]}, ensure_ascii=False)
        )
        return
    console = console or Console()
    for row in shown:
        console.print(_panel(row, full))
    console.print(_group_table(chosen, shown))
    console.print(_totals(chosen))
    if len(shown) < len(chosen):
        rest = len(chosen) - len(shown)
        console.print(Text(f"{rest:,} more not shown (--limit 0 shows all)", style="dim"))


def _panel(row: Row, full: bool) -> Panel:
    style = _OUTCOME_STYLES.get(row.outcome, "white")
    head = Text.assemble(("prompt ", "bold"), _cut(row.prompt, full))
    foot = Text.assemble(
        ("answer ", "bold"),
        (row.answer or "none", f"bold {style}"),
        ("  gold ", "bold"),
        row.gold or "none",
        ("  reward ", "bold"),
        f"{row.reward:+.4f}",
        ("  advantage ", "bold"),
        f"{row.advantage:+.3f}",
        ("  tokens ", "bold"),
        str(row.num_tokens),
    )
    if not row.finished:
        foot.append("  cut off", style="yellow")
    if row.mean_logprob is not None:
        foot.append_text(Text.assemble(("  log-prob/token ", "bold"), f"{row.mean_logprob:.4f}"))
    body: list[Text] = [head, response_text(row.text, row.answer, full, style), foot]
    if row.parts:
        body.append(
            Text("  ".join(f"{name}={_number(value)}" for name, value in row.parts.items()), style="dim")
        )
    title = f"step {row.step}  prompt {row.prompt_index}  sample {row.sample_index}  {row.problem_id}"
    return Panel(
        Group(*body),
        title=Text(f"{title}  {row.outcome}", style=style),
        title_align="left",
        border_style=style,
    )


def response_text(text: str, answer: str, full: bool = True, style: str = "green") -> Text:
    """The response with its think block dimmed and the last mention of the answer after it highlighted."""
    think_end = text.find(_THINK_CLOSE)
    split = think_end + len(_THINK_CLOSE) if think_end >= 0 else (len(text) if _THINK_OPEN in text else 0)
    think, final = text[:split], text[split:]
    out = Text(_cut(think, full), style="dim")
    place = final.rfind(answer) if answer else -1
    if place < 0:
        return out.append(_cut(final, full), style="not dim")
    out.append(final[:place], style="not dim")
    out.append(answer, style=f"not dim bold reverse {style}")
    return out.append(final[place + len(answer) :], style="not dim")


def _problem_text(prompt: str) -> str:
    """The last turn of a user in a rendered prompt, without the special tokens of its chat format."""
    for chat in chat_formats():
        header = chat.header.format(role="user")
        turns: list[str] = re.findall(f"{re.escape(header)}(.*?){re.escape(chat.end)}", prompt, re.DOTALL)
        if turns:
            return turns[-1]
    return prompt


def _spread(values: Sequence[float], form: str) -> str:
    """`mean (least to most)`."""
    low, high = format(min(values), form), format(max(values), form)
    return f"{format(statistics.fmean(values), form)} ({low} to {high})"


def _group_table(rows: Sequence[Row], shown: Sequence[Row]) -> Table:
    """The groups that the shown samples belong to, over all selected samples; fits 80 characters."""
    wanted = dict.fromkeys((row.step, row.prompt_index) for row in shown)
    table = Table(title="Groups", title_justify="left", header_style="bold")
    for name in ("step", "prompt", "correct", "reward", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("problem", overflow="ellipsis", no_wrap=True)
    groups = group_rows(rows)
    for step, prompt_index in wanted:
        group = groups[step, prompt_index]
        right = sum(row.outcome == "correct" for row in group)
        cells = [
            str(step),
            str(prompt_index),
            f"{right}/{len(group)}",
            _spread([row.reward for row in group], "+.2f"),
            _spread([row.num_tokens for row in group], ".0f"),
            _problem_text(group[0].prompt),
        ]
        table.add_row(*map(Text, cells))
    return table


def _totals(rows: Sequence[Row]) -> Text:
    totals = aggregates(rows)
    outcomes = ", ".join(f"{name} {count:,}" for name, count in totals["outcomes"].items())
    lengths = [
        f"{name} {value:.1f}"
        for name, value in (
            ("correct", totals["length_mean_correct"]),
            ("wrong", totals["length_mean_wrong"]),
        )
        if value is not None
    ]
    return Text(
        f"{totals['samples']:,} samples in {totals['groups']:,} groups of {totals['steps']:,} step(s): "
        f"{outcomes}\n"
        f"accuracy {totals['accuracy']:.1%}   reward {totals['reward_mean']:+.4f}   "
        f"tokens {totals['length_mean']:.1f}{' (' + ', '.join(lengths) + ')' if lengths else ''}   "
        f"finished {totals['finished']:.1%}   groups without variance {totals['groups_without_variance']:.1%}"
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _cut(text: str, full: bool) -> str:
    if full or len(text) <= _SHORT_CHARS:
        return text
    return text[:_SHORT_CHARS] + f" … [{len(text) - _SHORT_CHARS:,} characters more, --full shows them]"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- audit


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
        console.print(_disagreement(row))
    lenient = sum(row["outcome"] == "correct" for row in rows)
    console.print(
        Text(
            f"{len(rows):,} disagreements logged: {lenient:,} right by the reward's verdict only,"
            f" {len(rows) - lenient:,} by the second check only; {len(shown):,} shown"
        )
    )


def _disagreement(row: dict[str, Any]) -> Panel:
    style = "green" if row["outcome"] == "correct" else "red"
    text = Text.assemble(
        (f"… {row['tail']}\n", "dim"),
        ("gold ", "bold"), row["gold"], ("   answer ", "bold"), row["answer"], "\n",
        ("verdict ", "bold"), (f"{row['outcome']} ({row['method']})", style),
        ("   second ", "bold"), f"{row['second']} ({row['second_method']})",
    )  # fmt: skip
    title = f"step {row['step']}  prompt {row['prompt_index']}  sample {row['sample_index']}"
    return Panel(text, title=Text(f"{title}  {row['problem_id']}"), title_align="left", border_style=style)
