"""Rows: every bad one is named, every one is counted, GSM8K becomes what a person would make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4r.core.errors import UserError
from phi4r.core.problem import Conversation, Problem
from phi4r.data.records import load_problems, load_records, problem_row

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl"
GOOD = {"problem": "1+1?", "answer": "2"}


def write_lines(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_the_three_kinds_of_row_are_told_apart(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "rows.jsonl",
        {
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
            "source": "x",
        },
        b"",
        {"problem": "1+1?", "answer": "2", "trace": "", "difficulty": 3, "id": 7, "level": "easy"},
        {"question": "How many?", "answer": "6*2=<<6*2=12>>12\nso 1,200 <<12*100=1200>>in all\n#### 1,200"},
    )
    records, report = load_records(path)
    conversation, problem, gsm8k = records
    assert isinstance(conversation, Conversation)
    assert [m.content for m in conversation.messages] == ["hi", "ho"]
    assert (conversation.id, conversation.meta) == ("rows.jsonl:1", {"source": "x"})
    assert problem == Problem("7", "1+1?", "2", difficulty=3, trace="", meta={"level": "easy"})
    assert gsm8k == Problem(
        "rows.jsonl:4", "How many?", "1200", trace="6*2=12\nso 1,200 in all", solution=r"\boxed{1200}"
    )
    assert (report.rows, report.kept, report.rejected, report.blank_lines) == (3, 3, 0, 1)


BAD_ROWS = [
    (b'{"problem": "x", ', "", "not valid JSON"),
    (b"[1, 2]", "", "expected a JSON object, found an array"),
    (b'{"problem": "\xff", "answer": "2"}', "", "not UTF-8"),
    (b'{"problem": "x", "answer": "2", "difficulty": NaN}', "", "NaN is not a JSON value"),
    (b"[" * 100_000, "", "not valid JSON"),
    ({}, "messages|problem|question", "fields found: none"),
    ({"text": "x"}, "messages|problem|question", "fields found: text"),
    ({"problem": "x"}, "answer", "missing"),
    ({"problem": "x", "answer": 5}, "answer", "expected a string, found a number"),
    ({"problem": " ", "answer": "5"}, "problem", "empty"),
    ({"problem": "\ud800", "answer": "5"}, "problem", "unpaired surrogate"),
    ({"\ud800": "x"}, "messages|problem|question", "fields found"),
    ({"problem": "x", "answer": "5", "trace": ["a"]}, "trace", "expected a string, found an array"),
    ({"problem": "x", "answer": "5", "trace": "a</think>b"}, "trace", "think tag"),
    (
        {"problem": "x", "answer": "5", "difficulty": "hard"},
        "difficulty",
        "expected a number, found a string",
    ),
    ({"problem": "x", "answer": "5", "difficulty": True}, "difficulty", "expected a number, found a boolean"),
    ({"problem": "x", "answer": "5", "id": {"a": 1}}, "id", "expected a string, found an object"),
    ({"problem": "x", "messages": []}, "problem", "not both"),
    ({"question": "x", "answer": "no marker"}, "answer", "####"),
    ({"question": "x", "answer": "steps ####  "}, "answer", "####"),
    ({"messages": []}, "messages", "found an empty array"),
    ({"messages": "hi"}, "messages", "found a string"),
    ({"messages": ["hi"]}, "messages[0]", "expected an object"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role", "unknown role 'bot'"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "found null"),
    ({"messages": [{"role": "user", "content": "x"}]}, "messages", "no assistant message"),
    ({"messages": [{"role": "assistant", "content": ""}]}, "messages[0].content", "empty"),
    ({**GOOD, "id": "first"}, "id", "already used at rows.jsonl:1"),
]


@pytest.mark.parametrize(("bad", "field", "reason"), BAD_ROWS)
def test_a_bad_row_is_named_with_file_line_field_and_reason(
    tmp_path: Path, bad: Any, field: str, reason: str
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {**GOOD, "id": "first"}, b"", bad, GOOD)
    with pytest.raises(UserError) as caught:
        load_records(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3:")
    assert (f"field '{field}':" in message) == bool(field)
    assert reason in message
    assert "\n" not in message

    rejects = tmp_path / "out" / "rejects.jsonl"
    records, report = load_records(path, "skip", rejects)
    (reject,) = [json.loads(line) for line in rejects.read_text(encoding="utf-8").splitlines()]
    assert (reject["file"], reject["line"], reject["field"]) == (str(path), 3, field)
    assert reason in reject["reason"]
    if isinstance(bad, dict):
        assert json.loads(reject["raw"]) == bad
    assert len(records) == report.kept == 2
    assert (report.rows, report.rejected, report.reject_file) == (3, 1, str(rejects))
    assert sum(report.reasons.values()) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(range(len(BAD_ROWS) + 2)), max_size=12))
def test_nothing_is_lost_silently(tmp_path_factory: pytest.TempPathFactory, choice: list[int]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    rows = [
        BAD_ROWS[i][0] if i < len(BAD_ROWS) - 1 else b"  " if i == len(BAD_ROWS) else GOOD for i in choice
    ]
    path = write_lines(folder / "rows.jsonl", GOOD, *rows)
    records, report = load_records(path, "skip", folder / "rejects.jsonl")
    rejects = folder / "rejects.jsonl"
    written = rejects.read_text(encoding="utf-8").splitlines() if rejects.exists() else []
    assert report.rows + report.blank_lines == len(rows) + 1
    assert report.rows == report.kept + report.rejected
    assert (report.kept, report.rejected) == (len(records), len(written))


def test_skipping_without_a_reject_file_is_not_possible(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reject_path"):
        load_records(write_lines(tmp_path / "rows.jsonl", GOOD), "skip")


def test_a_file_without_a_usable_row_is_an_error_and_its_rejects_are_there(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"text": "x"})
    with pytest.raises(UserError, match=r"no usable rows \(all 1 rejected"):
        load_records(path, "skip", tmp_path / "rejects.jsonl")
    assert (tmp_path / "rejects.jsonl").exists()


def test_parquet_rows_are_read_like_json_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"problem": "1+1?", "answer": "2", "trace": None, "difficulty": 1.0},
        {"problem": None, "answer": "3", "trace": "t", "difficulty": None},
        {"problem": "2+2?", "answer": "4", "trace": "", "difficulty": None},
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match=r"rows\.parquet:2: .*expected 'messages'"):
        load_records(path)
    records, report = load_records(path, "skip", tmp_path / "rejects.jsonl")
    assert records == [
        Problem("rows.parquet:1", "1+1?", "2", difficulty=1.0),
        Problem("rows.parquet:3", "2+2?", "4", trace=""),
    ]
    reject = json.loads((tmp_path / "rejects.jsonl").read_text())
    assert (json.loads(reject["raw"]), report.rejected) == (rows[1], 1)

    messages = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    pq.write_table(pa.Table.from_pylist(messages), tmp_path / "chat.parquet")
    (record,), _ = load_records(tmp_path / "chat.parquet")
    assert isinstance(record, Conversation)
    assert record.messages[1].content == "a"


def test_a_truncated_parquet_file_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD] * 100), path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"rows\.parquet: cannot be read as Parquet"):
        load_records(path)


def test_a_folder_is_read_in_name_order_and_other_files_are_reported(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", GOOD)
    write_lines(tmp_path / "a.jsonl", {**GOOD, "problem": "first"})
    (tmp_path / "notes.txt").write_text("x")
    records, report = load_records(tmp_path)
    assert [record.id for record in records] == ["a.jsonl:1", "b.jsonl:1"]
    assert report.ignored_files == [str(tmp_path / "notes.txt")]
    assert "1 other file(s) ignored" in report.summary()


def test_a_path_that_is_not_data_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    for path, reason in (
        (tmp_path / "none", "no such"),
        (tmp_path, "no data files"),
        (tmp_path / "x.csv", "unknown"),
    ):
        with pytest.raises(UserError, match=reason):
            load_records(path)


def test_a_stage_that_needs_answers_refuses_conversations(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"messages": [{"role": "assistant", "content": "x"}]})
    with pytest.raises(UserError, match=r"rows\.jsonl:1 has 'messages'"):
        load_problems(path)


def test_written_problem_rows_are_read_back_the_same(tmp_path: Path) -> None:
    problems = [
        Problem("a", "1+1?", "2"),
        Problem("b", "1+1?", "2", "addition", 2.5, "", r"\boxed{2}", {"pass_rate": 0.5}),
    ]
    path = write_lines(tmp_path / "rows.jsonl", *map(problem_row, problems))
    assert load_problems(path)[0] == problems


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"GSM8K is not on this machine ({GSM8K})")
def test_gsm8k_is_read_without_loss() -> None:
    problems, report = load_problems(GSM8K)
    assert (report.rows, report.kept) == (7473, 7473)
    first = problems[0]
    assert first.answer == "72"
    assert first.trace == (
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May."
    )
    assert first.solution == r"\boxed{72}"
    assert all("<<" not in (p.trace or "") and "####" not in (p.trace or "") for p in problems)
    assert all(p.trace and p.answer.lstrip("-").replace(".", "", 1).isdigit() for p in problems)
