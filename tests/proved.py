"""docs/proved.md, made from the tests themselves: every test marked

    @pytest.mark.proves("a claim", how="what it is compared with", layouts="where, if its cases do not say")

is a row; layouts are those of its cases (a parameter `layout` or `run`, or `case` with an attribute
`layout`) where the marker gives none. `pytest --collect-only -q --proved=docs/proved.md` writes the file, and
`test_proved.py` holds that it is current.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
HEADER = """\
# What is proved, how, and on which layouts

Made by `pytest --collect-only -q --proved=docs/proved.md` from the tests marked `proves`; do not edit.
All of it runs on two CPU cores over gloo: tests/vllm by `make test-vllm`, tests/slurm by `make test-slurm`,
of the others those marked `slow` by `make test-slow` and the rest by `make test`.

| claim | how | layouts | cases | test |
|---|---|---|---|---|
"""


def layout_of(item: pytest.Item) -> str:
    """The layout that a case is about, "" where its parameters do not say."""
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    found = next((parameters[name] for name in ("layout", "case", "run") if name in parameters), None)
    found = getattr(found, "layout", found)
    return found if isinstance(found, str) else ""


def table(items: Iterable[pytest.Item]) -> str:
    """The page for the collected tests."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("proves"):
            groups.setdefault(item.nodeid.split("[")[0], []).append(item)
    rows = []
    for name, cases in sorted(groups.items()):
        marker = cases[0].get_closest_marker("proves")
        assert marker is not None
        unknown = set(marker.kwargs) - {"how", "layouts"}
        assert len(marker.args) == 1, f"{name}: proves(claim, how=, layouts=)"
        assert not unknown, f"{name}: proves(claim, how=, layouts=)"
        found = ", ".join(dict.fromkeys(filter(None, map(layout_of, cases))))
        layouts = marker.kwargs.get("layouts") or found or "one rank"
        slow = " (slow)" if cases[0].get_closest_marker("slow") else ""
        path, test = name.split("::")
        cells = [marker.args[0], marker.kwargs.get("how", ""), layouts, str(len(cases))]
        rows.append("| " + " | ".join([*cells, f"`{path}`: `{test}`{slow}"]) + " |")
    return HEADER + "\n".join(rows) + "\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    """--proved FILE."""
    parser.addoption("--proved", metavar="FILE", default="", help="write the table of what is proved")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Write the table if it was asked for."""
    if path := session.config.getoption("--proved"):
        Path(path).write_text(table(session.items), encoding="utf-8")
