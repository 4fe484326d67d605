"""Files that appear whole or not at all, and JSON lines that know their line numbers.

Standard library only: the command line, the configs and the data tools import this on a login node.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from phi4r.core.errors import UserError


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_beside(path: Path) -> TextIO:
    """A new text file beside `path` under a temporary name, with the permissions a plain `open` would
    give."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(name, 0o666 & ~mask)
    return open(
        name, "w", encoding="utf-8", newline="\n"
    )  # opened by name: the rename needs `.name` to be a path


def _commit(file: TextIO, path: Path) -> None:
    """Give the finished temporary `file` its real name: readers see the old file or the whole new one."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)
    _sync_folder(path.parent)


def _discard(file: TextIO) -> None:
    file.close()
    Path(file.name).unlink(missing_ok=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` so that the file is never seen half written. Makes the folder if
    needed."""
    path = Path(path)
    file = _open_beside(path)
    try:
        file.write(text)
        _commit(file, path)
    except BaseException:
        _discard(file)
        raise


def atomic_write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` to `path` as indented JSON, whole or not at all. NaN and infinities are refused
    (ValueError)."""
    atomic_write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def parse_json_object(line: str, where: str) -> dict[str, Any]:
    """One JSON object from `line`; `where` (`file:line`) opens the UserError that a bad line raises."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) for every non-blank line of a UTF-8 file.

    Raises UserError naming the file if it cannot be opened, and file:line where the text is not UTF-8.
    """
    path = Path(path)
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        for number, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line)") from None
            if text:
                yield number, text


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every non-blank line; a bad line raises UserError with
    file:line."""
    for number, text in read_lines(path):
        yield number, parse_json_object(text, f"{path}:{number}")


class JsonlWriter:
    """Write JSON lines, as a context manager.

    `append=False`: the file appears under its name only when the block ends without an error (temporary name,
    fsync, rename). `append=True`: lines go to the end of the file at once, each as one write; a last line
    without a newline, left by a process that was killed while writing, is dropped first.
    """

    def __init__(self, path: str | Path, append: bool = False) -> None:
        self.path = Path(path)
        self.append = append
        self.num_written = 0
        if append:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            drop_partial_line(self.path)
            self._file: TextIO = open(self.path, "a", encoding="utf-8", newline="\n")
        else:
            self._file = _open_beside(self.path)

    def write(self, row: dict[str, Any]) -> None:
        """Add one line. NaN and infinities are written as Python's json does (`NaN`), for they are news, not
        noise."""
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.num_written += 1
        if self.append:
            self._file.flush()

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Finish: an appended file is synced, a new one gets its name. Calling it again does nothing."""
        if self._file.closed:
            return
        if self.append:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        else:
            _commit(self._file, self.path)

    def discard(self) -> None:
        """Give a new file up: nothing appears. (An appended file keeps the lines it has.)"""
        if self._file.closed:
            return
        if self.append:
            self._file.close()
        else:
            _discard(self._file)

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def drop_partial_line(path: str | Path) -> None:
    """Cut off what follows the last newline of a file: the half line of a killed writer. No file, nothing to
    do."""
    path = Path(path)
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            file.truncate(position)
