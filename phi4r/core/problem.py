"""The two kinds of row that stages exchange: a problem with a gold answer, and a conversation. `data.records`
reads them; tasks generate and check them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A messages row. `id` is the row's own, or "file:line"; `meta` holds every field that the reader of
    `data.records` does not know."""

    id: str
    messages: tuple[Message, ...]
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A question with a gold answer, and maybe its working.

    `trace` is the text inside the think block ("" is an empty block, None means there is none to train on);
    `solution` is the text after `</think>`. `task` names the checker ("" = free-form mathematics),
    `difficulty` is in that task's unit.
    """

    id: str
    problem: str
    answer: str
    task: str = ""
    difficulty: float | None = None
    trace: str | None = None
    solution: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


Record = Problem | Conversation
