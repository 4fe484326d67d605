"""What a checkpoint looks like on disk, and which of a run's checkpoints can be trusted. No torch here.

    RUN/checkpoints/step_000100/
        phi4r.json      written last: format, step, model config, layout it was saved under, training state,
                        metrics, and size and CRC-32 of every other file and of itself
        tokenizer/      the tokenizer's own files
        dist/           megatron-core `torch_dist`: .metadata, *.distcp, common.pt, metadata.json
    RUN/checkpoints/latest      one line, the newest checkpoint's name

A checkpoint is written under `.tmp-*` and renamed when it is whole; one that is replaced or retired is
renamed to `.old-*` or `.trash-*` before it is deleted. So `step_*` is whole at every moment, and what a
killed process leaves behind is told by its name (`remove_leftovers`). What a disk does to it afterwards is
seen by the sizes (`incompleteness`, cheap) and the checksums (`damage`, reads everything).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from phi4r.configs.schema import as_dict
from phi4r.configs.sections import ModelConfig
from phi4r.core.errors import UserError
from phi4r.core.io import atomic_write_json, atomic_write_text
from phi4r.models.huggingface import is_hf_folder, read_hf_config
from phi4r.train.retention import Retention

FORMAT = 2
MANIFEST = "phi4r.json"
DIST = "dist"
TOKENIZER = "tokenizer"
DAMAGED = "damaged-"
"""Put before the name of a checkpoint that was set aside."""
_STEP = re.compile(r"step_(\d{6,})")
_BLOCK = 1 << 22


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
    metrics: dict[str, float] = field(default_factory=dict)
    """The numbers that the step of the checkpoint logged."""


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


BATCH_INFO = "batch.json"
"""What is said of a batch kept for `phi4r replay`."""


def replay_folder(run_dir: str | Path) -> Path:
    """RUN/replay: the batch of a step that was not finite, and the weights as a checkpoint."""
    return Path(run_dir) / "replay"


# --- the manifest


def crc32(path: Path) -> int:
    """CRC-32 of a file's bytes, read in blocks."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _own_crc32(raw: Mapping[str, Any]) -> str:
    """The checksum that phi4r.json holds of its own content."""
    rest = {name: value for name, value in raw.items() if name != "own_crc32"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def write_manifest(folder: Path, manifest: Manifest, known: Mapping[str, int] | None = None) -> None:
    """Finish a checkpoint folder: sync its files, then write phi4r.json with their sizes and checksums.

    known: CRC-32 by name of files that their writer has synced already; the others are read.
    """
    files, checksums = {}, {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            name = path.relative_to(folder).as_posix()
            if known is None or name not in known:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            files[name] = path.stat().st_size
            checksums[name] = f"{known[name] if known and name in known else crc32(path):08x}"
    rest = {k: v for k, v in asdict(manifest).items() if k not in ("model", "tokenizer")}
    head = {"format": FORMAT, "model": as_dict(manifest.model), "tokenizer": list(manifest.tokenizer)}
    raw = {**head, **rest, "files": files, "crc32": checksums}
    atomic_write_json(folder / MANIFEST, {**raw, "own_crc32": _own_crc32(raw)})


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
        metrics=raw["metrics"],
    )


def incompleteness(folder: Path) -> str:
    """Why a checkpoint folder cannot be used, naming the file; "" if all its files are there with their
    sizes."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"{folder}: not a phi4r checkpoint (no {MANIFEST})"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        found = raw["format"]
    except (ValueError, KeyError, TypeError):
        return f"{path}: not a phi4r checkpoint's {MANIFEST}"
    if found != FORMAT:
        return f"{path}: checkpoint format {found}, this phi4r reads format {FORMAT}"
    if raw.get("own_crc32") != _own_crc32(raw):
        return f"{path}: its checksum does not fit its content: the checkpoint is damaged"
    for name, size in raw["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{file}: missing from the checkpoint"
        if file.stat().st_size != size:
            return f"{file}: {file.stat().st_size} bytes, expected {size}: the checkpoint is damaged"
    return ""


def damage(folder: Path, part: int = 0, num_parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint folder, one sentence a file; [] if every byte is the one that was
    written.

    Reads the files of one of `num_parts` shares of about equal size, so that ranks can share the work.
    """
    problem = incompleteness(folder)
    if problem:
        return [problem]
    raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    sizes: dict[str, int] = raw["files"]
    loads = [0] * num_parts
    found = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner = loads.index(min(loads))
        loads[owner] += sizes[name] + 1
        if owner == part and crc32(folder / name) != int(raw["crc32"][name], 16):
            found.append(
                f"{folder / name}: its checksum is not the one it was written with: the checkpoint is damaged"
            )
    return found


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
    """An empty folder under a temporary name for the checkpoint of `step`, with dist/ inside. Raises
    FileNotFoundError where the run folder is gone: it is not made anew."""
    folder = checkpoints_folder(run_dir)
    folder.mkdir(exist_ok=True)
    temporary = folder / f".tmp-{step_name(step)}"
    if temporary.exists():
        shutil.rmtree(temporary)
    (temporary / DIST).mkdir(parents=True)
    return temporary


def publish(run_dir: str | Path, step: int, temporary: Path, retention: Retention) -> Path:
    """Give a whole checkpoint its name, point `latest` at it, and delete those that nothing asks to keep."""
    final = reveal(run_dir, step, temporary)
    for trash in retire(run_dir, retention):
        shutil.rmtree(trash)
    return final


def reveal(run_dir: str | Path, step: int, temporary: Path) -> Path:
    """Give a whole checkpoint its name and point `latest` at it."""
    assert (temporary / MANIFEST).is_file(), "a checkpoint without its manifest is not whole"
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
    return final


def retire(run_dir: str | Path, retention: Retention) -> list[Path]:
    """Take the names of checkpoints that nothing asks to keep; returns the folders to delete.

    Only whole checkpoints are counted and retired: a damaged one is for a person to look at.
    """
    found = {step: path for step, path in all_steps(run_dir).items() if not incompleteness(path)}
    metrics = {step: read_manifest(path).metrics for step, path in found.items()}
    trashes = []
    for step in retention.to_retire(metrics):
        trash = found[step].with_name(f".trash-{found[step].name}")
        found[step].rename(trash)
        trashes.append(trash)
    return trashes


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that nothing resumes from it; returns its new path."""
    aside = folder.with_name(DAMAGED + folder.name)
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)
    return aside


def remove(run_dir: str | Path, step: int) -> Path:
    """Delete a checkpoint of a run, or one that was set aside; `latest` then names the newest that is left.

    Returns the folder. Raises UserError where there is none.
    """
    folder = checkpoints_folder(run_dir)
    path = next(
        (p for p in (folder / step_name(step), folder / (DAMAGED + step_name(step))) if p.exists()), None
    )
    if path is None:
        there = ", ".join(p.name for p in all_steps(run_dir).values()) or "none"
        raise UserError(f"{folder / step_name(step)}: no such checkpoint; there are: {there}")
    trash = folder / f".trash-{path.name}"
    path.rename(trash)
    newest = find_latest(run_dir)
    if newest is None:
        (folder / "latest").unlink(missing_ok=True)
    else:
        atomic_write_text(folder / "latest", newest.name + "\n")
    shutil.rmtree(trash)
    return path


# --- finding


def all_steps(run_dir: str | Path) -> dict[int, Path]:
    """Every `step_*` folder of a run by its step, oldest first, whole or not."""
    found = {step_of(path): path for path in checkpoints_folder(run_dir).glob("step_*")}
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


def find_latest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run folder whose files are all there, None if there is none."""
    return next((p for p in reversed(list(all_steps(run_dir).values())) if not incompleteness(p)), None)


def older_whole(folder: Path) -> Path | None:
    """The newest checkpoint before `folder` in its run whose bytes are all right; None without one."""
    step = step_of(folder)
    if step is None:
        return None
    older: Sequence[Path] = [path for s, path in all_steps(folder.parent.parent).items() if s < step]
    return next((path for path in reversed(older) if not damage(path)), None)


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
