"""`phi4r verify` and `phi4r reward`: grade a file of responses, or work out every part of their rewards.

    verify   {"gold": str or [str], "response": str} -> {"outcome": str, "answer": str}, with an audit also
             {"method": str, "second": str, "second_method": str, "disagrees": bool}
    reward   {"gold": str, "response": str, "num_tokens": int, "finished": bool, "tokens"?: [int]}
             -> {"outcome", "answer", "method", "repetition_unit", and every field of `RewardParts`}

Of several gold answers one is enough; an audit does not check such rows. `answer` is the extracted text, ""
if there is none; an `id` in a row is passed on. The n-grams of the repetition penalty are counted over
`tokens` where a row has them (as in training), else over the response's words and signs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from phi4r.configs.sections import RewardConfig
from phi4r.core.console import Progress
from phi4r.core.errors import UserError
from phi4r.core.io import JsonlWriter
from phi4r.data.records import BadRow
from phi4r.rewards.length_aware import check_lengths, compute_reward
from phi4r.verify.audit import disagrees, with_second
from phi4r.verify.extract import think_block_is_valid
from phi4r.verify.pool import VerifierPool
from phi4r.verify.strict import Verdict

OnBadRow = Literal["stop", "skip"]
Row = dict[str, Any]

CHUNK_ROWS = 512
PAPER_MAX_TOKENS = 31_744
_WORDS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class GradeReport:
    """What a run did: `rows` = `graded` + `rejected`; `outcomes` counts the graded rows by outcome;
    `disagreements`: of an audit."""

    rows: int
    graded: int
    rejected: int
    reject_file: str
    outcomes: dict[str, int]
    disagreements: int | None = None

    def summary(self) -> str:
        """One line for the console."""
        counts = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        rejected = f"; {self.rejected:,} rows rejected -> {self.reject_file}" if self.rejected else ""
        apart = "" if self.disagreements is None else f"; {self.disagreements:,} disagreements"
        return f"{self.graded:,} responses graded: {counts or 'none'}{apart}{rejected}"


class _BadFieldError(Exception):
    """A row that does not fit: the field ("" for the row as a whole) and the reason. Never leaves this
    module.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field, self.reason = field, reason


# --- rows


def _field(row: Row, name: str, kind: type, expected: str) -> Any:
    if name not in row:
        raise _BadFieldError(name, f"missing (expected {expected})")
    value = row[name]
    # bool is an int in Python, not in JSON.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _BadFieldError(name, f"expected {expected}, found {json.dumps(value)[:40]}")
    return value


def _text_field(row: Row, name: str) -> str:
    value: str = _field(row, name, str, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadFieldError(name, f"unpaired surrogate at character {error.start}") from None
    return value


def _check_verify_row(row: Row) -> None:
    golds = row.get("gold")
    for gold in golds if isinstance(golds, list) and golds else [golds]:
        if not _text_field({"gold": gold} if "gold" in row else {}, "gold").strip():
            raise _BadFieldError("gold", "empty (expected the right answer)")
    _text_field(row, "response")


def _check_reward_row(row: Row) -> None:
    _check_verify_row(row)
    if _field(row, "num_tokens", int, "a whole number") < 0:
        raise _BadFieldError("num_tokens", f"expected 0 or more, found {row['num_tokens']}")
    _field(row, "finished", bool, "true or false")
    if row.get("tokens") is not None:
        tokens = _field(row, "tokens", list, "an array of token ids")
        if not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
            raise _BadFieldError("tokens", "expected whole numbers between 0 and 2^31 - 1")


def _parse_row(raw: bytes) -> Row:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _BadFieldError("", f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise _BadFieldError("", f"not valid JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise _BadFieldError("", f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise _BadFieldError("", f"expected a JSON object, found {json.dumps(row)[:40]}")
    return row


def _read_rows(
    path: Path, check: Callable[[Row], None], reject: Callable[[BadRow, str], None]
) -> Iterator[Row]:
    """Well-formed rows of a JSONL file; bad ones go to `reject`. Blank lines are not rows."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = _parse_row(raw)
                check(row)
            except _BadFieldError as error:
                reject(
                    BadRow(str(path), line, error.field, error.reason), raw.decode(errors="backslashreplace")
                )
            else:
                yield row


def _count_rows(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for raw in file if raw.strip())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


# --- runs


def _grade_file(
    description: str,
    source: Path,
    target: Path,
    pool: VerifierPool,
    on_bad_row: OnBadRow,
    reject_path: Path,
    check: Callable[[Row], None],
    result: Callable[[Row, Verdict], Row],
    audit: bool = False,
) -> GradeReport:
    """Grade `source` chunk by chunk into `target`, which appears when all of it is done."""
    total = _count_rows(source)
    outcomes: Counter[str] = Counter()
    num_rejected = num_apart = 0
    with ExitStack() as stack:
        writer = stack.enter_context(JsonlWriter(target))
        progress = stack.enter_context(Progress(description, total, every=max(1, total // 20)))
        rejects: list[JsonlWriter] = []

        def reject(bad: BadRow, raw: str) -> None:
            nonlocal num_rejected
            if on_bad_row == "stop":
                raise UserError(str(bad))
            if not rejects:
                rejects.append(stack.enter_context(JsonlWriter(reject_path)))
            rejects[0].write({**asdict(bad), "raw": raw.rstrip("\r\n")})
            num_rejected += 1

        rows = _read_rows(source, check, reject)
        while chunk := list(islice(rows, CHUNK_ROWS)):
            verdicts = pool.map(
                [(row["gold"], row["response"]) for row in chunk],
                on_done=lambda number: progress.update(progress.done + number),
            )
            if audit:
                verdicts = with_second([row["gold"] for row in chunk], verdicts, pool)
            for row, verdict in zip(chunk, verdicts, strict=True):
                outcomes[verdict.outcome] += 1
                num_apart += disagrees(verdict)
                kept = {"id": row["id"]} if "id" in row else {}
                writer.write(kept | result(row, verdict))
    graded = sum(outcomes.values())
    return GradeReport(
        graded + num_rejected,
        graded,
        num_rejected,
        str(reject_path) if num_rejected else "",
        dict(outcomes),
        num_apart if audit else None,
    )


def _reject_path(target: Path) -> Path:
    return target.with_name(f"{target.stem}.rejects.jsonl")


def run_verify(
    source: str | Path,
    target: str | Path,
    *,
    workers: int = 2,
    timeout_s: float = 5.0,
    memory_gib: float = 1.0,
    on_bad_row: OnBadRow = "stop",
    audit: bool = False,
) -> GradeReport:
    """Grade every response of a JSONL file; one line of {"outcome", "answer"} each, in the same order.

    `timeout_s`: CPU seconds one answer may take. `audit`: a second, independent method checks each answer
    too (`verify.audit`); the lines then also have `method`, `second`, `second_method` and `disagrees`. A
    malformed row raises UserError with file, line and field ("stop"; no output appears), or is written to
    `<target's stem>.rejects.jsonl` and left out ("skip").
    """
    source, target = Path(source), Path(target)

    def result(_: Row, verdict: Verdict) -> Row:
        row = {"outcome": verdict.outcome, "answer": verdict.answer or ""}
        if not audit:
            return row
        methods = {name: getattr(verdict, name) for name in ("method", "second", "second_method")}
        return row | methods | {"disagrees": disagrees(verdict)}

    with VerifierPool(workers, timeout_s, memory_gib) as pool:
        return _grade_file(
            "verify",
            source,
            target,
            pool,
            on_bad_row,
            _reject_path(target),
            _check_verify_row,
            result,
            audit,
        )


def word_ids(text: str) -> list[int]:
    """Words and signs of a text as small integers, equal words as equal integers: n-gram units without a
    tokenizer.
    """
    seen: dict[str, int] = {}
    return [seen.setdefault(word, len(seen)) for word in _WORDS.findall(text)]


def run_reward(
    source: str | Path,
    target: str | Path,
    *,
    settings: RewardConfig | None = None,
    memory_gib: float = 1.0,
    on_bad_row: OnBadRow = "stop",
) -> GradeReport:
    """Work out the reward of every response of a JSONL file, part by part, in the same order.

    `settings`: lengths that are 0 are filled in from the paper's L_max = 31,744. Bad rows as in
    `run_verify`. UserError if the lengths do not fit together.
    """
    source, target = Path(source), Path(target)
    settings = (settings or RewardConfig()).resolved(PAPER_MAX_TOKENS)
    try:
        check_lengths(settings)
    except ValueError as error:
        raise UserError(str(error)) from None

    def result(row: Row, verdict: Verdict) -> Row:
        tokens = row.get("tokens")
        parts = compute_reward(
            correct=verdict.correct,
            think_valid=think_block_is_valid(row["response"]),
            finished=row["finished"],
            tokens=word_ids(row["response"]) if tokens is None else tokens,
            num_tokens=row["num_tokens"],
            settings=settings,
        )
        return {
            "outcome": verdict.outcome,
            "answer": verdict.answer or "",
            "method": verdict.method,
            "repetition_unit": "words" if tokens is None else "tokens",
            **parts.as_dict(),
        }

    with VerifierPool(settings.verifier_workers, settings.verifier_timeout_s, memory_gib) as pool:
        return _grade_file(
            "reward",
            source,
            target,
            pool,
            on_bad_row,
            _reject_path(target),
            _check_reward_row,
            result,
        )
