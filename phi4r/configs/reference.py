"""Every key of a stage as text: what `phi4r COMMAND --help` ends with."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from phi4r.configs.schema import reference
from phi4r.configs.sections import ParallelConfig
from phi4r.configs.stages import STAGES


def reference_text(stage: str) -> str:
    """Every key that a command takes, as plain text: by section, key, type, default and what it does."""
    width = min(110, shutil.get_terminal_size((100, 24)).columns)
    out: list[str] = ["", "Settings (in a recipe, or as --section.key value):"]
    if stage:
        names = list(STAGES) if stage == "*" else [stage]
        chapters = {chapter[0]: chapter for name in names for chapter in reference(STAGES[name])}
    else:
        chapters = {"parallel": ("parallel", reference(ParallelConfig)[0][1], _only_parallel())}
    for name, doc, entries in chapters.values():
        out += ["", f"  [{name}]  {doc}" if name else "  (top level)"]
        for key, type_text, default, text in entries:
            out.append(f"    --{key}  {type_text}  (default: {_default_text(default)})")
            out += textwrap.wrap(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    if stage == "*":
        out += ["", "  --STAGE.section.key value sets a key for one stage only: --rl.train.num_steps 20"]
    return "\n".join(out) + "\n"


def _only_parallel() -> list[Any]:
    return next(entries for name, _, entries in reference(STAGES["sft"]) if name == "parallel")


def _default_text(default: Any) -> str:
    if isinstance(default, bool):
        return "true" if default else "false"
    return '""' if default == "" else f"{default:.6g}" if isinstance(default, float) else str(default)
