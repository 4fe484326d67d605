"""What can be set, read off the dataclasses: keys, types, defaults and the documentation string under each
field.

A stage (`stages.SFTConfig`) is a dataclass whose fields are plain values (`seed`) or sections (`optimizer`),
and a section's fields are int, float, bool, str or a Literal of strings. Nothing else, so that every setting
has one dotted key and fits on a command line.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from phi4r.core.errors import ConfigError


class Field(NamedTuple):
    """One setting of a section (or of a stage itself): its name, type hint and default."""

    name: str
    hint: Any
    default: Any

    @property
    def type_text(self) -> str:
        """The type in words for the reference: `int`, `true|false`, `fp32|bf16`."""
        if typing.get_origin(self.hint) is Literal:
            return "|".join(typing.get_args(self.hint))
        return "true|false" if self.hint is bool else str(self.hint.__name__)


class Entry(NamedTuple):
    """A line of the reference: dotted key, type, default and documentation."""

    key: str
    type_text: str
    default: Any
    doc: str


@functools.cache
def sections_of(stage: type) -> dict[str, type]:
    """The sections of a stage, in order: name -> dataclass."""
    hints: dict[str, Any] = typing.get_type_hints(stage)
    return {
        name: hint
        for name, hint in hints.items()
        if isinstance(hint, type) and dataclasses.is_dataclass(hint)
    }


@functools.cache
def fields_of(cls: type) -> dict[str, Field]:
    """The plain settings of a section or stage, in order (a stage's sections are not among them)."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: Field(field.name, hints[field.name], field.default)
        for field in dataclasses.fields(cls)
        if not dataclasses.is_dataclass(hints[field.name])
    }


@functools.cache
def _module_tree(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text(encoding="utf-8"))


@functools.cache
def docs_of(cls: type) -> dict[str, str]:
    """Field name -> the string literal that stands under it in the source, as one line of text."""
    tree = _module_tree(inspect.getfile(cls))
    body = next(
        node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    )
    docs: dict[str, str] = {}
    for node, below in itertools.pairwise(body):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[node.target.id] = " ".join(str(below.value.value).split())
    return docs


def _summary(cls: type) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


def reference(stage: type) -> list[tuple[str, str, list[Entry]]]:
    """Everything that can be set for a stage: (section, what it is, its entries), the stage's own values
    first."""
    chapters = [("", _summary(stage), stage)]
    chapters += [(name, _summary(cls), cls) for name, cls in sections_of(stage).items()]
    return [
        (
            name,
            doc,
            [
                Entry(
                    f"{name}.{f.name}" if name else f.name,
                    f.type_text,
                    f.default,
                    docs_of(cls).get(f.name, ""),
                )
                for f in fields_of(cls).values()
            ],
        )
        for name, doc, cls in chapters
    ]


def closest(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'X'?` for the known word most like `word`, otherwise a full stop."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {match[0]!r}?" if match else "."


def unknown(key: str, what: str, word: str, known: Iterable[str], source: str) -> ConfigError:
    """The error for a key (or section) nobody knows: it lists the known ones and the closest match."""
    known = list(known)
    return ConfigError(
        key, f"unknown {what} {word!r}{closest(word, known)} Known: {', '.join(known)}", source
    )


def _expected(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}[hint]


def _number(text: str, hint: type) -> int | float | None:
    try:
        return int(text, 10) if hint is int else float(text)
    except ValueError:
        return None


def from_text(text: str, hint: Any) -> Any:
    """A command-line word as the value a TOML file would hold, or the word itself if it is not of that
    type."""
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if hint in (int, float):
        number = _number(text, hint)
        return text if number is None else number
    return text


def coerce(key: str, value: Any, hint: Any, source: str) -> Any:
    """`value` as the type of setting `key`, or ConfigError naming key, value, source and what was expected.

    The only conversion is int -> float; a bool is not a number here.
    """
    ok: bool
    if typing.get_origin(hint) is Literal:
        ok = value in typing.get_args(hint)
    elif hint is float:
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        value = float(value) if ok else value
    elif hint is int:
        ok = isinstance(value, int) and not isinstance(value, bool)
    else:
        ok = isinstance(value, hint)
    if not ok:
        raise ConfigError(key, f"expected {_expected(hint)}, got {value!r}", source)
    return value


def as_dict(config: Any) -> dict[str, Any]:
    """A stage's (or section's) values as nested plain dicts."""
    return dataclasses.asdict(config)


def check_hint(hint: Any) -> bool:
    """Whether a field type is one this module understands (held by a test over all sections)."""
    if typing.get_origin(hint) is Literal:
        return all(isinstance(choice, str) for choice in typing.get_args(hint))
    return hint in (int, float, bool, str) and not isinstance(hint, types.UnionType)
