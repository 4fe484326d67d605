"""Tasks, rewards, objectives and model families by registered name or by import path.

A recipe names such a part either by the name under which phi4r registers it (`problems.task = "modchain"`)
or by where Python finds it, `package.module:name` (`problems.task = "my_project.tasks:Sorting"`). `resolve`
turns both into the object; each kind of part states what fits it with a check of its own.

Modules are looked for where Python looks for all modules, and then in the working directory, so that a file
beside the recipe needs no installation.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from phi4r.core.errors import ConfigError

Part = TypeVar("Part")


def is_import_path(name: str) -> bool:
    """Whether `name` is written `package.module:name`, each part a Python identifier."""
    module, colon, attribute = name.partition(":")
    words = [*module.split("."), *attribute.split(".")]
    return bool(colon) and all(word.isidentifier() for word in words)


def resolve(
    kind: str,
    name: str,
    registered: Mapping[str, Part | str],
    *,
    key: str,
    fit: Callable[[Any], Part] | None = None,
) -> Part:
    """The part that `name` stands for.

    kind: what it is, for messages ("task", "objective"). registered: name -> object, or its import path where
    importing it takes long. key: the setting that holds `name`, for messages. fit: returns the object to use
    (such as an instance of a class that was named) or raises TypeError or ValueError with the reason why the
    object is no such part; registered objects are trusted.

    Raises ConfigError, on one line, for a name that is not registered, a module that cannot be imported, a
    name that the module lacks, and an object that does not fit.
    """
    known = registered.get(name)
    if known is not None and not isinstance(known, str):
        return known
    if known is None and ":" not in name:
        close = difflib.get_close_matches(name, list(registered), n=1, cutoff=0.5)
        hint = f", did you mean {close[0]!r}?" if close else "."
        raise ConfigError(
            key,
            f"unknown {kind} {name!r}{hint} Registered: {', '.join(registered)}; or an import path,"
            " package.module:name",
        )
    found = load(known or name, kind, key)
    if fit is None:
        return found
    try:
        return fit(found)
    except (TypeError, ValueError) as error:
        raise ConfigError(key, f"{known or name} is not a {kind}: {error}") from error


def load(path: str, kind: str, key: str) -> Any:
    """The object at the import path `package.module:name`. Raises ConfigError, on one line."""
    if not is_import_path(path):
        raise ConfigError(key, f"expected the import path of a {kind}, package.module:name, got {path!r}")
    module_name, _, attributes = path.partition(":")
    found: Any = _import(module_name, key)
    for word in attributes.split("."):
        if not hasattr(found, word):
            names = [n for n in vars(found) if not n.startswith("_")] if hasattr(found, "__dict__") else []
            close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
            where = getattr(found, "__file__", None) or module_name
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise ConfigError(key, f"{path}: {where} defines no {word!r}{hint}")
        found = getattr(found, word)
    return found


def _import(name: str, key: str) -> ModuleType:
    """The module of that name, found in the working directory where it is nowhere else."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # and there it stays: the module may import its neighbours later
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if f"{name}.".startswith(f"{missing}."):
            raise ConfigError(
                key, f"there is no module {missing!r} in Python's path or in {here} (for {name})"
            ) from error
        raise ConfigError(key, f"{name} imports {missing!r}, which is not installed") from error
    except Exception as error:  # whatever the user's module raises, it is the setting that is wrong
        raise ConfigError(key, f"{name} cannot be imported: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    """Type, message and place of an error."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}{place}" if text else f"{type(error).__name__}{place}"
