"""Rows of a data set: read from JSONL or Parquet, checked, and turned into `Problem` and `Conversation`.

Three kinds of row are understood, told apart by their fields:

    {"messages": [{"role": "system"|"user"|"assistant", "content": str}, ...]}               a conversation
    {"problem": str, "answer": str, "trace"?, "solution"?, "id"?, "task"?, "difficulty"?}    a problem, maybe
    with its working {"question": str, "answer": "worked steps\\n#### final"}
    GSM8K's form of the same

Every other field is kept in `meta`. A row that does not fit is a bad row: it stops the load, or is written to
a reject file and counted. Rows read = rows kept + rows rejected, always (`LoadReport`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from phi4r.core.errors import UserError
from phi4r.core.io import JsonlWriter
from phi4r.core.problem import ROLES, Conversation, Message, Problem, Record

OnBadRow = Literal["stop", "skip"]
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)

_CALCULATOR_NOTE = re.compile(r"<<[^<>]*>>")
_GROUPED_NUMBER = re.compile(r"[-+]?\$?\d{1,3}(,\d{3})+(\.\d+)?")


Check = Callable[[Record], object]


@dataclass(frozen=True)
class BadRow:
    """Where a row failed and why. `field` is "" when the row as a whole is unreadable."""

    file: str
    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        where = f" field '{self.field}':" if self.field else ""
        return f"{self.file}:{self.line}:{where} {self.reason}"


@dataclass
class LoadReport:
    """Counts of one load: `rows` = `kept` + `rejected`; blank lines are not rows. `reasons` counts rejections
    by kind."""

    files: list[str] = field(default_factory=list)
    ignored_files: list[str] = field(default_factory=list)
    rows: int = 0
    kept: int = 0
    rejected: int = 0
    blank_lines: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    reject_file: str = ""

    def summary(self) -> str:
        """One line for the console."""
        text = f"{self.kept:,} of {self.rows:,} rows kept from {len(self.files)} file(s)"
        if self.rejected:
            text += f", {self.rejected:,} rejected -> {self.reject_file}"
        if self.ignored_files:
            text += f", {len(self.ignored_files)} other file(s) ignored"
        return text


class _RowError(Exception):
    """A row that does not fit: the field, and what is wrong with it. Never leaves this module."""

    def __init__(self, field_name: str, reason: str) -> None:
        super().__init__(reason)
        self.field_name, self.reason = field_name, reason


# --- one row


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _text(row: Mapping[str, Any], key: str, where: str = "", *, may_be_empty: bool = False) -> str:
    name = f"{where}.{key}" if where else key
    if key not in row:
        raise _RowError(name, "missing (expected a string)")
    value = row[key]
    if not isinstance(value, str):
        raise _RowError(name, f"expected a string, found {_type_name(value)}")
    if not may_be_empty and not value.strip():
        raise _RowError(name, "empty (expected text)")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _RowError(
            name, f"unpaired surrogate at character {error.start}, not valid Unicode text"
        ) from None
    return value


def _optional_text(row: Mapping[str, Any], key: str) -> str | None:
    return None if row.get(key) is None else _text(row, key, may_be_empty=True)


def _identifier(row: Mapping[str, Any], default: str) -> str:
    value = row.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return default if value is None else _text(row, "id")


def _conversation(row: Mapping[str, Any], default_id: str) -> Conversation:
    raw = row["messages"]
    if not isinstance(raw, list) or not raw:
        found = "an empty array" if isinstance(raw, list) else _type_name(raw)
        raise _RowError("messages", f"expected a non-empty array of messages, found {found}")
    messages = []
    for index, item in enumerate(raw):
        where = f"messages[{index}]"
        if not isinstance(item, Mapping):
            raise _RowError(where, f"expected an object with role and content, found {_type_name(item)}")
        role = _text(item, "role", where)
        if role not in ROLES:
            raise _RowError(f"{where}.role", f"unknown role {role!r} (known: {', '.join(ROLES)})")
        messages.append(Message(role, _text(item, "content", where, may_be_empty=role != "assistant")))
    if not any(message.role == "assistant" for message in messages):
        raise _RowError("messages", "no assistant message, so nothing to train on")
    meta = {key: value for key, value in row.items() if key not in ("messages", "id")}
    return Conversation(_identifier(row, default_id), tuple(messages), meta)


def _problem(row: Mapping[str, Any], default_id: str) -> Problem:
    difficulty = row.get("difficulty")
    if difficulty is not None:
        if isinstance(difficulty, bool) or not isinstance(difficulty, (int, float)):
            raise _RowError("difficulty", f"expected a number, found {_type_name(difficulty)}")
        if not math.isfinite(difficulty):
            raise _RowError("difficulty", f"expected a finite number, found {difficulty}")
    trace = _optional_text(row, "trace")
    if trace is not None and ("<think>" in trace or "</think>" in trace):
        raise _RowError("trace", "contains a think tag (expected only the text inside the think block)")
    known = ("id", "problem", "answer", "task", "difficulty", "trace", "solution")
    return Problem(
        id=_identifier(row, default_id),
        problem=_text(row, "problem"),
        answer=_text(row, "answer"),
        task=_optional_text(row, "task") or "",
        difficulty=difficulty,
        trace=trace,
        solution=_optional_text(row, "solution"),
        meta={key: value for key, value in row.items() if key not in known},
    )


def _gsm8k(row: Mapping[str, Any], default_id: str) -> Problem:
    """GSM8K: the steps become the trace, `final` the answer, and the solution is `\\boxed{final}`.

    Two things are changed in the text, both machine marks and not prose: calculator notes (`<<48/2=24>>`) are
    taken out, and thousands separators of the final number are (1,200 -> 1200).
    """
    question, answer = _text(row, "question"), _text(row, "answer")
    steps, marker, final = answer.rpartition("####")
    final = final.strip()
    if not marker or not final:
        reason = (
            "expected steps that end in '#### final answer' (for a bare answer name the question 'problem')"
        )
        raise _RowError("answer", reason)
    if _GROUPED_NUMBER.fullmatch(final):
        final = final.replace(",", "")
    return Problem(
        id=_identifier(row, default_id),
        problem=question,
        answer=final,
        trace=_CALCULATOR_NOTE.sub("", steps).strip(),
        solution=rf"\boxed{{{final}}}",
        meta={key: value for key, value in row.items() if key not in ("question", "answer", "id")},
    )


def _record(row: Any, default_id: str) -> Record:
    if not isinstance(row, Mapping):
        raise _RowError("", f"expected a JSON object, found {_type_name(row)}")
    kinds = [key for key in ("messages", "problem", "question") if key in row]
    if len(kinds) > 1:
        raise _RowError(kinds[1], f"a row has either '{kinds[0]}' or '{kinds[1]}', not both")
    if not kinds:
        found = ", ".join(sorted(map(str, row))) or "none"
        reason = f"expected 'messages', 'problem' + 'answer' or 'question' + 'answer' (fields found: {found})"
        raise _RowError("messages|problem|question", reason)
    if kinds[0] == "messages":
        return _conversation(row, default_id)
    return _problem(row, default_id) if kinds[0] == "problem" else _gsm8k(row, default_id)


# --- files


def _printable(text: str) -> str:
    """`text` with unpaired surrogates, which JSON may hold and a terminal cannot show, as escapes."""
    return text.encode("utf-8", errors="backslashreplace").decode()


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


@dataclass(frozen=True)
class Span:
    """A piece of a data file: bytes [start, stop) of JSONL, cut between lines, or row groups [start, stop) of
    Parquet; its first row has the number `first_line`."""

    file: str
    start: int
    stop: int
    first_line: int


def _jsonl_rows(path: Path, report: LoadReport, span: Span | None = None) -> Iterator[tuple[int, Any, str]]:
    """Yields (line, row or _RowError, raw text)."""
    with path.open("rb") as stream:
        stream.seek(span.start if span else 0)
        for line, data in enumerate(stream, start=span.first_line if span else 1):
            if span and stream.tell() > span.stop:
                return
            raw = data.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
            if not raw.strip():
                report.blank_lines += 1
                continue
            try:
                row = json.loads(
                    data.decode("utf-8-sig" if line == 1 else "utf-8"), parse_constant=_reject_constant
                )
            except UnicodeDecodeError as error:
                row = _RowError("", f"not UTF-8 (byte {error.start} of the line)")
            except json.JSONDecodeError as error:
                row = _RowError("", f"not valid JSON: {error.msg} (column {error.colno})")
            except (ValueError, RecursionError) as error:
                row = _RowError("", f"not valid JSON: {error}")
            yield line, row, raw


def _parquet_rows(path: Path, span: Span | None = None) -> Iterator[tuple[int, Any, str]]:
    """Yields (row number from 1, row, its JSON text); columns that are null in a row are absent from it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    line = span.first_line - 1 if span else 0
    try:
        with pq.ParquetFile(path) as file:
            groups = range(span.start, span.stop) if span else range(file.num_row_groups)
            for batch in file.iter_batches(batch_size=1024, row_groups=list(groups)):
                for full in batch.to_pylist():
                    line += 1
                    row = {key: value for key, value in full.items() if value is not None}
                    yield line, row, json.dumps(full, default=str)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as Parquet after row {line}: {reason}") from None


def find_files(path: str | Path) -> tuple[list[Path], list[Path]]:
    """The data files at `path` (a file, or a folder searched one level deep, in name order), and those it
    ignores."""
    path = Path(path)
    suffixes = JSONL_SUFFIXES + PARQUET_SUFFIXES
    if path.is_file():
        if path.suffix not in suffixes:
            raise UserError(
                f"{path}: unknown kind of data file (expected a name ending in {', '.join(suffixes)})"
            )
        return [path], []
    if not path.is_dir():
        raise UserError(f"{path}: no such data file or folder")
    inside = sorted(entry for entry in path.iterdir() if entry.is_file())
    files = [entry for entry in inside if entry.suffix in suffixes]
    if not files:
        raise UserError(
            f"{path}: no data files in this folder (expected names ending in {', '.join(suffixes)})"
        )
    return files, [entry for entry in inside if entry.suffix not in suffixes]


class _Loader:
    """One load: the records kept, the report, and the reject file, opened when the first row needs it."""

    def __init__(self, on_bad_row: OnBadRow, reject_path: str | Path | None, check: Check | None) -> None:
        self.on_bad_row, self.reject_path, self.check = on_bad_row, reject_path, check
        self.report = LoadReport()
        self.records: list[Record] = []
        self._first_use: dict[str, str] = {}
        self._stack = ExitStack()
        self._rejects: JsonlWriter | None = None

    def __enter__(self) -> _Loader:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _accept(self, row: Any, place: str) -> None:
        if isinstance(row, _RowError):
            raise row
        record = _record(row, place)
        if record.id in self._first_use:
            raise _RowError("id", f"{record.id!r} is already used at {self._first_use[record.id]}")
        if self.check is not None:
            try:
                self.check(record)
            except UserError as error:
                raise _RowError("", str(error)) from None
        self._first_use[record.id] = place
        self.records.append(record)
        self.report.kept += 1

    def _reject(self, bad: BadRow, raw: str) -> None:
        if self.on_bad_row == "stop":
            raise UserError(str(bad))
        assert self.reject_path is not None
        if self._rejects is None:
            self._rejects = self._stack.enter_context(JsonlWriter(self.reject_path))
            self.report.reject_file = str(self.reject_path)
        self._rejects.write({**asdict(bad), "raw": raw})
        self.report.rejected += 1
        kind = f"{bad.field}: {bad.reason}" if bad.field else bad.reason.split(":")[0]
        self.report.reasons[kind] = self.report.reasons.get(kind, 0) + 1

    def read(self, file: Path) -> None:
        rows = _jsonl_rows(file, self.report) if file.suffix in JSONL_SUFFIXES else _parquet_rows(file)
        for line, row, raw in rows:
            self.report.rows += 1
            try:
                self._accept(row, f"{file.name}:{line}")
            except _RowError as error:
                bad = BadRow(str(file), line, _printable(error.field_name), _printable(error.reason))
                self._reject(bad, _printable(raw))


def read_span(
    span: Span, report: LoadReport, check: Check | None = None
) -> Iterator[tuple[Record | BadRow, int, str]]:
    """(record or bad row, its line, its raw text) for every row of a piece of a file, counted in `report`.
    That ids are used once is not checked: another piece may hold the other use."""
    path = Path(span.file)
    is_jsonl = path.suffix in JSONL_SUFFIXES
    for line, row, raw in _jsonl_rows(path, report, span) if is_jsonl else _parquet_rows(path, span):
        report.rows += 1
        try:
            if isinstance(row, _RowError):
                raise row
            record = _record(row, f"{path.name}:{line}")
            if check is not None:
                check(record)
        except _RowError as error:
            yield (
                BadRow(span.file, line, _printable(error.field_name), _printable(error.reason)),
                line,
                _printable(raw),
            )
        except UserError as error:
            yield BadRow(span.file, line, "", str(error)), line, _printable(raw)
        else:
            report.kept += 1
            yield record, line, ""


def load_records(
    path: str | Path,
    on_bad_row: OnBadRow = "stop",
    reject_path: str | Path | None = None,
    check: Check | None = None,
) -> tuple[list[Record], LoadReport]:
    """Reads every row of a JSONL or Parquet file, or of a folder of them, in file and line order.

    A bad row raises `UserError` with file, line, field and reason ("stop"), or is written to `reject_path` as
    {"file", "line", "field", "reason", "raw"} and counted ("skip"). `check` may refuse a well-formed record
    that a stage cannot use, by raising `UserError`. A load that keeps no row at all is an error either way.
    """
    if on_bad_row == "skip" and reject_path is None:
        raise ValueError("on_bad_row='skip' needs reject_path: a skipped row has to be written somewhere")
    files, ignored = find_files(path)
    with _Loader(on_bad_row, reject_path, check) as loader:
        for file in files:
            loader.read(file)
    report = loader.report
    report.files, report.ignored_files = list(map(str, files)), list(map(str, ignored))
    if not loader.records:
        more = f" (all {report.rows} rejected, see {report.reject_file})" if report.rows else ""
        raise UserError(f"{path}: no usable rows{more}")
    return loader.records, report


def load_problems(
    path: str | Path, on_bad_row: OnBadRow = "stop", reject_path: str | Path | None = None
) -> tuple[list[Problem], LoadReport]:
    """`load_records` for a stage that needs a gold answer in every row (RL, evaluation, curation).

    A valid messages row here means the wrong file, not a damaged line, so it is an error whatever
    `on_bad_row` says.
    """
    records, report = load_records(path, on_bad_row, reject_path)
    problems = []
    for record in records:
        if isinstance(record, Conversation):
            raise UserError(
                f"{path}: row {record.id} has 'messages'; this stage needs rows with 'problem' and 'answer'"
            )
        problems.append(record)
    return problems, report


def problem_row(problem: Problem) -> dict[str, Any]:
    """The JSON row of a problem: `load_problems` of these rows gives the same problems back."""
    row: dict[str, Any] = {"id": problem.id, "problem": problem.problem, "answer": problem.answer}
    for key in ("task", "difficulty", "trace", "solution"):
        value = getattr(problem, key)
        if value not in (None, "") or (key in ("trace", "solution") and value == ""):
            row[key] = value
    return row | problem.meta
