"""What a checkpoint looks like on disk, and which of a run's checkpoints can be trusted. No torch here.

    RUN/checkpoints/step_000100/
        phi4r.json      written last: format, step, model config, layout it was saved under, training state,
                        and the size of every other file, so that a half-copied folder is recognised
        tokenizer/      the tokenizer's own files
        dist/           megatron-core `torch_dist`: .metadata, *.distcp, common.pt, metadata.json
    RUN/checkpoints/latest      one line, the newest checkpoint's name

A checkpoint is written under `.tmp-*` and renamed when it is whole; one that is replaced or retired is
renamed to `.old-*` or `.trash-*` before it is deleted. So `step_*` is whole at every moment, and what a
killed process leaves behind is told by its name (`remove_leftovers`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from phi4r.configs.schema import as_dict
from phi4r.configs.sections import ModelConfig
from phi4r.errors import UserError
from phi4r.huggingface import is_hf_folder, read_hf_config
from phi4r.io import atomic_write_json, atomic_write_text

FORMAT = 1
MANIFEST = "phi4r.json"
DIST = "dist"
TOKENIZER = "tokenizer"
_STEP = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Manifest:
    """The content of phi4r.json."""

    step: int
    model: ModelConfig
    layout: dict[str, Any] = field(default_factory=dict)
    """tp, pp, ... it was saved under, for people to read: any layout can load it."""
    optimizer: Literal["distributed", "plain", ""] = ""
    """Which optimizer's state lies in dist/ ("": weights only)."""
    state: dict[str, Any] = field(default_factory=dict)
    """The small JSON state the trainer asked to keep (data position, counters)."""
    tokenizer: tuple[str, ...] = ()
    """File names in tokenizer/."""
    source: str = ""
    """Where the weights came from, if not from training."""


# --- names


def checkpoints_folder(run_dir: str | Path) -> Path:
    """RUN/checkpoints."""
    return Path(run_dir) / "checkpoints"


def step_name(step: int) -> str:
    """`step_000100`."""
    return f"step_{step:06d}"


def step_of(folder: Path) -> int | None:
    """The step that a folder's name says, None if it is not a checkpoint's name."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


# --- the manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Finish a checkpoint folder: sync its files to disk, then write phi4r.json with their sizes."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            files[path.relative_to(folder).as_posix()] = path.stat().st_size
    rest = {k: v for k, v in asdict(manifest).items() if k not in ("model", "tokenizer")}
    head = {"format": FORMAT, "model": as_dict(manifest.model), "tokenizer": list(manifest.tokenizer)}
    atomic_write_json(folder / MANIFEST, {**head, **rest, "files": files})


def read_manifest(folder: str | Path) -> Manifest:
    """phi4r.json of a checkpoint folder; UserError names what is wrong with the folder."""
    folder = Path(folder)
    problem = incompleteness(folder)
    if problem:
        raise UserError(problem)
    raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    try:
        model = ModelConfig(**raw["model"])
    except TypeError as error:
        raise UserError(f"{folder / MANIFEST}: model: {error}; was it written by a newer phi4r?") from None
    return Manifest(
        step=raw["step"],
        model=model,
        layout=raw["layout"],
        optimizer=raw["optimizer"],
        state=raw["state"],
        tokenizer=tuple(raw["tokenizer"]),
        source=raw["source"],
    )


def incompleteness(folder: Path) -> str:
    """Why a checkpoint folder cannot be used, naming the file; "" if it is whole."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"{folder}: not a phi4r checkpoint (no {MANIFEST})"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        found, files = raw["format"], raw["files"]
    except (ValueError, KeyError, TypeError):
        return f"{path}: not a phi4r checkpoint's {MANIFEST}"
    if found != FORMAT:
        return f"{path}: checkpoint format {found}, this phi4r reads format {FORMAT}"
    for name, size in files.items():
        file = folder / name
        if not file.is_file():
            return f"{file}: missing from the checkpoint"
        if file.stat().st_size != size:
            return f"{file}: {file.stat().st_size} bytes, expected {size}: the checkpoint is damaged"
    return ""


# --- appearing and disappearing


def _sync(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(run_dir: str | Path) -> list[str]:
    """Clear up what a killed process left in RUN/checkpoints; returns the names. Call on one rank, before
    resuming.

    A checkpoint caught between being set aside and being replaced gets its name back.
    """
    folder = checkpoints_folder(run_dir)
    names = []
    for path in sorted(folder.glob(".*")):
        kind, _, name = path.name.partition("-")
        if kind == ".old" and not (folder / name).exists():
            path.rename(folder / name)
        elif kind in (".old", ".tmp", ".trash"):
            shutil.rmtree(path)
        elif path.match(".latest.*.tmp"):
            path.unlink()
        else:
            continue
        names.append(path.name)
    return names


def begin(run_dir: str | Path, step: int) -> Path:
    """An empty folder under a temporary name for the checkpoint of `step`, with dist/ inside."""
    folder = checkpoints_folder(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".tmp-{step_name(step)}"
    if temporary.exists():
        shutil.rmtree(temporary)
    (temporary / DIST).mkdir(parents=True)
    return temporary


def publish(run_dir: str | Path, step: int, temporary: Path, keep_last: int) -> Path:
    """Give a whole checkpoint its name, point `latest` at it, and retire all but the newest `keep_last`."""
    folder = checkpoints_folder(run_dir)
    final, aside = folder / step_name(step), folder / f".old-{step_name(step)}"
    if aside.exists():
        shutil.rmtree(aside)
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    _sync(folder)
    atomic_write_text(folder / "latest", final.name + "\n")
    if aside.exists():
        shutil.rmtree(aside)
    others = [path for path in folder.iterdir() if step_of(path) is not None and path != final]
    others.sort(key=lambda path: step_of(path) or 0)
    for old in others[: len(others) - (keep_last - 1)] if keep_last > 1 else others:
        trash = folder / f".trash-{old.name}"
        old.rename(trash)
        shutil.rmtree(trash)
    return final


# --- finding


def find_latest(run_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run folder, None if there is none; damaged folders are passed over."""
    folder = checkpoints_folder(run_dir)
    steps = [path for path in folder.glob("step_*") if step_of(path) is not None]
    for path in sorted(steps, key=lambda p: step_of(p) or 0, reverse=True):
        if not incompleteness(path):
            return path
    return None


def resolve_checkpoint(path: str | Path) -> tuple[Literal["phi4r", "hf"], Path]:
    """What `path` names: a checkpoint folder, a run folder (its newest checkpoint) or a Hugging Face folder.

    Raises UserError that says what was found instead.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint, run or Hugging Face folder")
    if (path / MANIFEST).exists():
        read_manifest(path)
        return "phi4r", path
    if checkpoints_folder(path).is_dir():
        newest = find_latest(path)
        if newest is None:
            raise UserError(f"{path}: a run folder without a whole checkpoint")
        return "phi4r", newest
    if is_hf_folder(path):
        return "hf", path
    raise UserError(
        f"{path}: neither a phi4r checkpoint ({MANIFEST}), nor a run folder (checkpoints/), "
        "nor a Hugging Face folder (config.json with an architecture)"
    )


def read_model_config(path: str | Path) -> ModelConfig:
    """The model of a checkpoint, run or Hugging Face folder."""
    kind, folder = resolve_checkpoint(path)
    return read_manifest(folder).model if kind == "phi4r" else read_hf_config(folder)


def tokenizer_folder(path: str | Path) -> Path | None:
    """The folder that holds the tokenizer of a checkpoint, run or Hugging Face folder; None if it has
    none.
    """
    kind, folder = resolve_checkpoint(path)
    if kind == "phi4r":
        return folder / TOKENIZER if read_manifest(folder).tokenizer else None
    return folder if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")) else None
