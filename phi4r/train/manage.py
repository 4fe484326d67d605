"""`phi4r checkpoint ls|verify|rm`, and what `phi4r replay` needs to know first. No torch here."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi4r.core.console import print_table, say
from phi4r.core.errors import UserError
from phi4r.train import folders
from phi4r.train.folders import DAMAGED, MANIFEST, all_steps, checkpoints_folder, damage, incompleteness

GIB = 1 << 30


def describe(folder: Path) -> dict[str, Any]:
    """What `ls` says about a checkpoint folder: name, step, size_gib, age_s, layout, metrics, and the problem
    with it ("": all files are there with their sizes)."""
    problem = incompleteness(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    row: dict[str, Any] = {
        "name": folder.name,
        "step": folders.step_of(Path(folder.name.removeprefix(DAMAGED))),
        "size_gib": sum(path.stat().st_size for path in files) / GIB,
        "age_s": time.time() - folder.stat().st_mtime,
        "problem": problem,
        "layout": {},
        "metrics": {},
    }
    if not problem:
        manifest = folders.read_manifest(folder)
        row |= {"layout": manifest.layout, "metrics": manifest.metrics, "optimizer": manifest.optimizer}
    return row


def ls(run_dir: Path, *, metric: str = "", as_json: bool = False) -> None:
    """Print a run's checkpoints, oldest first, those that were set aside last. metric: a column of its own
    ("": loss)."""
    folder = checkpoints_folder(run_dir)
    paths = [*all_steps(run_dir).values(), *sorted(folder.glob(f"{DAMAGED}step_*"))]
    if not paths:
        raise UserError(f"{run_dir}: no checkpoints (expected {folder}/step_*)")
    newest = folders.find_latest(run_dir)
    rows = [describe(path) for path in paths]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    name = metric or "loss"
    table = [
        [
            row["name"],
            f"{row['size_gib']:.3g} GiB",
            row["metrics"].get(name, ""),
            " ".join(f"{k}{v}" for k, v in row["layout"].items() if not isinstance(v, bool) and v > 1)
            or "1 rank",
            row["problem"] or ("newest" if newest is not None and row["name"] == newest.name else ""),
        ]
        for row in rows
    ]
    print_table("", ["checkpoint", "size", name, "saved on", ""], table)


def _layout_text(layout: dict[str, Any]) -> str:
    sizes = [f"{name}{n}" for name, n in layout.items() if not isinstance(n, bool) and n > 1]
    return " ".join(sizes) or "1 rank"


def verify(path: Path) -> None:
    """Read every byte of a checkpoint, or of all checkpoints of a run; UserError names what is damaged."""
    targets = [path] if (path / MANIFEST).exists() else list(all_steps(path).values())
    if not targets:
        raise UserError(f"{path}: neither a checkpoint ({MANIFEST}) nor a run folder with checkpoints")
    whole, problems = [], []
    for folder in targets:
        began = time.perf_counter()
        found = damage(folder)
        seconds = max(time.perf_counter() - began, 1e-9)
        if found:
            problems += found
        else:
            whole.append(folder)
            size = describe(folder)["size_gib"]
            say(f"{folder}: whole ({size:.3g} GiB read at {size / seconds:.2g} GiB/s)")
    if problems:
        for problem in problems[1:]:
            say(problem)
        rest = f"; the newest whole one is {whole[-1]}" if whole else "; no other checkpoint was found whole"
        raise UserError(problems[0] + rest)


def rm(run_dir: Path, steps: Sequence[int]) -> None:
    """Delete checkpoints of a run by their steps."""
    for step in steps:
        say(f"removed {folders.remove(run_dir, step)}")


def stage_to_replay(run_dir: Path) -> str:
    """Which stage's step RUN/replay holds, "sft" or "rl". UserError if it holds none."""
    path = folders.replay_folder(run_dir) / folders.BATCH_INFO
    if not path.is_file():
        raise UserError(
            f"{run_dir}: nothing to replay (no {path}): a run leaves it when it gives up at a step"
        )
    return str(json.loads(path.read_text(encoding="utf-8"))["stage"])
