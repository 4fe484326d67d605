"""The shape every curation stage shares: what it kept, what it removed, and why, item by item."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from phi4r.core.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Removed:
    """One removed item. `problem` is the item itself; `clash_id` and `clash_text` are what it clashed with
    ("": nothing).

    `detail` adds what a reader needs to judge the removal: the overlap, the pass rate, the answer that was
    expected.
    """

    problem: Problem
    reason: str
    clash_id: str = ""
    clash_text: str = ""
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """Outcome of one stage: `kept` and `removed` together are its input, each item once, each in input order.

    `notes` are findings about the stage as a whole (counts, settings that were switched off) for the report.
    """

    name: str
    kept: list[Problem]
    removed: list[Removed]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def num_before(self) -> int:
        return len(self.kept) + len(self.removed)

    @property
    def reasons(self) -> dict[str, int]:
        """Removed items per reason, most frequent first."""
        return dict(Counter(item.reason for item in self.removed).most_common())


def split(
    name: str, problems: Sequence[Problem], removed: dict[int, Removed], notes: dict[str, Any] | None = None
) -> StageResult:
    """A result from the removals by input index: everything else is kept, so nothing can be lost between
    the two."""
    kept = [problem for index, problem in enumerate(problems) if index not in removed]
    return StageResult(
        name=name, kept=kept, removed=[removed[index] for index in sorted(removed)], notes=notes or {}
    )
