"""Parts by registered name or import path, and what is said where that fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi4r.core.errors import ConfigError
from phi4r.core.registry import is_import_path, resolve

REGISTERED = {"plain": 1, "lazy": "my_parts:TWO"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of the user's, which Python does not know yet."""
    (tmp_path / "my_parts.py").write_text("TWO = 2\n\n\nclass Box:\n    three = 3\n")
    (tmp_path / "my_broken.py").write_text("x = 1\nraise RuntimeError('no\\nluck')\n")
    (tmp_path / "my_typo.py").write_text("x = (\n")
    (tmp_path / "my_needs.py").write_text("import a_package_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    for name in ("my_parts", "my_broken", "my_typo", "my_needs"):
        sys.modules.pop(name, None)


def integer(found: object) -> int:
    if not isinstance(found, int):
        raise TypeError(f"expected an integer, got {type(found).__name__}")
    return found * 10


def find(name: str) -> int:
    return resolve("part", name, REGISTERED, key="section.part", fit=integer)


def test_registered_names_and_import_paths_resolve() -> None:
    assert find("plain") == 1, "a registered object is taken as it is"
    assert find("lazy") == 20, "a registered import path is imported, then checked"
    assert find("my_parts:TWO") == 20
    assert find("my_parts:Box.three") == 30


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plane", "unknown part 'plane', did you mean 'plain'? Registered: plain, lazy; or an import path"),
        ("my_parts:", "expected the import path of a part, package.module:name, got 'my_parts:'"),
        ("my parts:TWO", "expected the import path of a part"),
        ("./my_parts.py:TWO", "expected the import path of a part"),
        ("my_part:TWO", "there is no module 'my_part' in Python's path or in "),
        ("my_parts.deep:TWO", "there is no module 'my_parts.deep'"),
        ("my_parts:TW0", "defines no 'TW0', did you mean 'TWO'?"),
        ("my_parts:Box", "my_parts:Box is not a part: expected an integer, got type"),
        ("my_broken:x", "my_broken cannot be imported: RuntimeError: no luck ("),
        ("my_broken:x", "my_broken.py, line 2)"),
        ("my_typo:x", "my_typo.py, line 1)"),
        ("my_needs:x", "my_needs imports 'a_package_nobody_has', which is not installed"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find(name)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("section.part: ")
    assert "\n" not in str(caught.value)


def test_an_import_path_is_told_from_a_name() -> None:
    assert is_import_path("a.b:c.d")
    assert not any(is_import_path(name) for name in ("modchain", "a.b", "a:b:c", "a-b:c", ":c", "a:"))
