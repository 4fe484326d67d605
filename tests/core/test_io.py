"""Files appear whole or not at all, and JSON lines know their line numbers."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from phi4r.core.errors import UserError
from phi4r.core.io import JsonlWriter, atomic_write_json, atomic_write_text, drop_partial_line, read_jsonl


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    atomic_write_text(path, "one")
    atomic_write_text(path, "two\n")
    assert path.read_text() == "two\n"
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_written_file_has_the_permissions_a_plain_open_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    atomic_write_text(tmp_path / "atomic", "")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")]
    assert modes[0] == modes[1]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="Out of range"):
        atomic_write_json(path, {"x": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_lines_appear_when_the_block_ends_well_and_not_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    def fail_halfway() -> None:
        with JsonlWriter(path) as writer:
            writer.write({"x": 1})
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert os.listdir(tmp_path) == []
    with JsonlWriter(path) as writer:
        writer.write({"x": 1})
        assert not path.exists()
        writer.write({"x": "ü"})
    assert list(read_jsonl(path)) == [(1, {"x": 1}), (2, {"x": "ü"})]
    assert writer.num_written == 2


def test_appended_lines_are_there_at_once_and_a_half_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": 1}\n{"x": 2')
    with JsonlWriter(path, append=True) as writer:
        writer.write({"x": 3})
        assert path.read_text() == '{"x": 1}\n{"x": 3}\n'


@pytest.mark.parametrize("kept", ["", "a\n", "a\n" + "b" * 200_000 + "\n"])
@pytest.mark.parametrize("half", ["", "c", "c" * 200_000])
def test_only_what_follows_the_last_newline_is_dropped(tmp_path: Path, kept: str, half: str) -> None:
    path = tmp_path / "a"
    path.write_text(kept + half)
    drop_partial_line(path)
    assert path.read_text() == kept


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"x": 1}\n\n{"x": }\n', r"a.jsonl:3: not valid JSON: Expecting value at column 7"),
        (b"[1]\n", r"a.jsonl:1: expected a JSON object, found list"),
        (b'{"x": 1}\n{"x": "\xff"}\n', r"a.jsonl:2: not UTF-8"),
        (b"[" * 100_000, r"a.jsonl:1: not valid JSON: nested too deeply"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_jsonl(path))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nope.jsonl: cannot be read: No such file"):
        list(read_jsonl(tmp_path / "nope.jsonl"))


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"x": 1}\r\n')
    assert list(read_jsonl(path)) == [(1, {"x": 1})]
