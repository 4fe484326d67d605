"""A second, independent check of verdicts on mathematics: where the two disagree, a person should look.

Whatever decided a verdict, something else checks it, in the workers of the same pool, under the same deadline
and memory limit: what text or exact rationals decided is put to math-verify as it comes, on the texts as they
were written; what math-verify decided is evaluated in floating point by a reader of our own
(`verify.numeric`). The second check never changes a verdict or a reward. It has an opinion or it has none
(time-outs, errors, texts that it cannot read): no opinion is counted and is no disagreement.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

from phi4r.core.seeds import Stream, epoch_order
from phi4r.verify.extract import gold_answer
from phi4r.verify.notation import normalise
from phi4r.verify.pool import VerifierPool
from phi4r.verify.strict import SymbolicQuestion, Verdict, is_too_complex

# What decided -> the method that checks it. Other verdicts (nothing found, nothing decided) are not checked.
_BY_TEXT = ("string", "rational", "rounded", "grammar")
_BY_ALGEBRA = ("symbolic", "exact_guard", "unparsed")

BATCH_DEADLINES = 4.0
"""The second checks of a batch may take this many deadlines of one answer together, on the wall."""
MAX_CHARS = 400
"""Of each text in a logged case."""


def _question(gold: str | Sequence[str], verdict: Verdict) -> SymbolicQuestion | None:
    """What the second method is asked about a verdict, None where there is nothing to check: nothing decided,
    or several gold answers."""
    if not isinstance(gold, str) or verdict.outcome not in ("correct", "wrong") or verdict.answer is None:
        return None
    bare = gold_answer(gold)
    if is_too_complex(bare) or is_too_complex(verdict.answer):
        return None
    if verdict.method in _BY_TEXT:
        return SymbolicQuestion(bare, verdict.answer, "plain")
    if verdict.method in _BY_ALGEBRA:
        return SymbolicQuestion(normalise(bare), normalise(verdict.answer), "numeric")
    return None


def _uniform(question: SymbolicQuestion) -> float:
    """A number in [0, 1) that the two texts fix."""
    return zlib.crc32(f"{question.gold}\0{question.answer}".encode(errors="replace")) / 2**32


def with_second(
    golds: Sequence[str | Sequence[str]], verdicts: Sequence[Verdict], pool: VerifierPool, share: float = 1.0
) -> list[Verdict]:
    """The same verdicts, those that were checked with `second` and `second_method`.

    `share` of all different (gold, answer) pairs is checked, chosen by their texts alone; equal ones in a
    batch, such as a group's, are checked once.
    """
    questions = [_question(gold, verdict) for gold, verdict in zip(golds, verdicts, strict=True)]
    asked = [question for question in dict.fromkeys(questions) if question and _uniform(question) < share]
    found = dict(zip(asked, pool.ask(asked, BATCH_DEADLINES * pool.timeout_s), strict=True))
    return [
        dataclasses.replace(verdict, second=found[question].outcome, second_method=found[question].method)
        if question in found
        else verdict
        for verdict, question in zip(verdicts, questions, strict=True)
    ]


def disagrees(verdict: Verdict) -> bool:
    """Whether both methods have an opinion, and not the same."""
    return verdict.second in ("correct", "wrong") and verdict.second != verdict.outcome


def audit_counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Metrics of an audit; none where nothing was checked.

    `audit_checked`; `audit_only_first`: right by the verdict, wrong by the second method;
    `audit_only_second`: the other way round; `audit_undecided`: the second method had no opinion.
    """
    checked = [verdict for verdict in verdicts if verdict.second]
    if not checked:
        return {}
    apart = [verdict for verdict in checked if disagrees(verdict)]
    return {
        "audit_checked": len(checked),
        "audit_only_first": sum(verdict.correct for verdict in apart),
        "audit_only_second": sum(not verdict.correct for verdict in apart),
        "audit_undecided": sum(verdict.second not in ("correct", "wrong") for verdict in checked),
    }


def audit_row(gold: str, verdict: Verdict) -> dict[str, Any]:
    """A disagreement as it is logged: both answers, both outcomes, both methods; long texts cut."""
    return {
        "gold": gold_answer(gold)[:MAX_CHARS],
        "answer": (verdict.answer or "")[:MAX_CHARS],
        "outcome": verdict.outcome,
        "method": verdict.method,
        "second": verdict.second,
        "second_method": verdict.second_method,
    }


def drawn(rows: Sequence[Any], limit: int, seed: int, step: int = 0) -> list[Any]:
    """At most `limit` of the rows, drawn by the counters (seed, step), in their order (0: all)."""
    if not limit or len(rows) <= limit:
        return list(rows)
    return [rows[place] for place in sorted(epoch_order(seed, Stream.AUDIT, step, len(rows))[:limit])]
