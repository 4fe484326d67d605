"""Samples side by side for a report: how two evaluations answered the same problem, with think block, answer
and verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phi4r.evaluate.results import (
    OUTCOMES,
    Record,
    Results,
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The same problem before and after, and why it is shown."""

    reason: str
    before: Record
    after: Record


def pick_pairs(before: Results, after: Results) -> list[Pair]:
    """Up to four problems to show side by side, by rule and not by taste; needs results that kept their
    texts.

    Two that were wrong before and right after (the first two in the order of the set), the one with the
    largest growth in length among those right both times, and one that is wrong after: worsened if there is
    such, else still wrong.
    """
    shared = [problem_id for problem_id in before.problem_ids if problem_id in set(after.problem_ids)]
    runs = [run for run in before.runs if run in after.runs]
    rows = [
        (before.record(problem_id, run), after.record(problem_id, run))
        for run in runs
        for problem_id in shared
    ]
    rows = [(old, new) for old, new in rows if old.text is not None and new.text is not None]
    fixed = [row for row in rows if not row[0].correct and row[1].correct]
    right = sorted(
        (row for row in rows if row[0].correct and row[1].correct),
        key=lambda row: row[0].num_tokens - row[1].num_tokens,
    )
    worse = [row for row in rows if row[0].correct and not row[1].correct]
    stuck = [row for row in rows if not row[0].correct and not row[1].correct]
    chosen = [("wrong before, right after", row) for row in fixed[:2]]
    chosen += [("right both times, with the largest change in length", row) for row in right[:1]]
    if worse:
        chosen.append(("right before, wrong after", worse[0]))
    elif stuck:
        chosen.append(("wrong both times", stuck[0]))
    pairs: dict[str, Pair] = {}
    for reason, (old, new) in chosen:
        pairs.setdefault(old.problem_id, Pair(reason=reason, before=old, after=new))
    return list(pairs.values())


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response as the page shows it."""

    stage: str
    outcome: str
    think: str | None
    """Text inside the think block; None where there is no block."""
    answer: str | None
    """Text after the think block; None where the block was never closed."""
    gold: str | None
    num_tokens: int
    finished: bool
    reward: list[tuple[str, str]]

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        return {"correct": "right", "wrong": "wrong", "no_answer": "no answer"}.get(
            self.outcome, self.outcome
        )


_REWARD_LABELS = {
    "total": "reward R",
    "accuracy": "R_acc",
    "repetition": "R_rep",
    "accuracy_source": "rule",
    "advantage": "advantage",
}
_LONGEST_SHOWN = 20_000  # characters of one think block or answer


def response(stage: str, row: Mapping[str, Any]) -> Response:
    """A rollout row (`response` or `text`, `outcome`, `gold`, `num_tokens`, `finished`, `reward`?) ready to
    be shown.
    """
    text = row.get("response", row.get("text")) or ""
    think, answer = split_think(text)
    reward = row.get("reward")
    parts = reward if isinstance(reward, Mapping) else {} if reward is None else {"total": reward}
    outcome = row.get("outcome", "")
    return Response(
        stage=stage,
        outcome=outcome if outcome in OUTCOMES else str(outcome),
        think=None if think is None else _shorten(think),
        answer=None if answer is None else _shorten(answer),
        gold=row.get("gold"),
        num_tokens=int(row.get("num_tokens", 0)),
        finished=bool(row.get("finished", True)),
        reward=[(label, _value(parts[key])) for key, label in _REWARD_LABELS.items() if key in parts],
    )


def split_think(text: str) -> tuple[str | None, str | None]:
    """(text inside the think block, text after it). (None, text) without a block, (text, None) with an
    unclosed one.
    """
    head, closed, tail = text.partition("</think>")
    _, opened, inside = head.partition("<think>")
    if closed:
        return (inside if opened else head).strip(), tail.strip()
    return (inside.strip(), None) if opened else (None, text.strip())


def _shorten(text: str) -> str:
    if len(text) <= _LONGEST_SHOWN:
        return text
    return f"{text[:_LONGEST_SHOWN]}\n[... {len(text) - _LONGEST_SHOWN:,} more characters]"


def _value(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "0" if value == 0 else f"{value:+.3f}".replace("-", "\u2212")
