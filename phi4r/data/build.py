"""`phi4r data build`: JSONL or Parquet to packed shards, over many processes, in memory that does not grow
with the corpus's tokens.

Three passes. *Render*: the files are cut into spans of a fixed size, and each span becomes a part: its
documents' tokens one after another, and a table of them. *Plan*: from the tables alone (some 50 bytes a
document) held-out documents are drawn, mixture weights become copies, and rows are packed. *Write*: each
shard collects its rows from the memory-mapped parts. Parts and shards appear whole or not at all and depend
on the settings and the input only, so a build that was killed goes on where it stopped, and neither that nor
the number of workers changes a byte.

Without a mixture the rows are those that SFT packs from the same files in memory.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phi4r.configs.sections import DataConfig, TokenizerConfig
from phi4r.configs.stages import SFTConfig
from phi4r.core.console import say
from phi4r.core.errors import UserError
from phi4r.core.io import JsonlWriter, atomic_write_json
from phi4r.core.problem import Problem, Record
from phi4r.data import mixture
from phi4r.data.build_plan import DOCUMENT, Plan, hash64, part_paths, plan_rows, read_tables
from phi4r.data.build_report import picture, statistics, summary
from phi4r.data.packing import Document, fit_documents
from phi4r.data.records import JSONL_SUFFIXES, BadRow, LoadReport, Span, find_files, load_records, read_span
from phi4r.data.render import render_example
from phi4r.data.sft_data import question, trainable
from phi4r.data.shards import FORMAT, INDEX, SETTINGS, fingerprint, mark_targets, shard_paths, write_array
from phi4r.data.tokenizer import Tokenizer

TASK_DEADLINE_S = 3600.0
"""Seconds after which a part or a shard is given up."""


@dataclass(frozen=True)
class Options:
    """How to build. workers: processes; mixture: epochs per cluster, "web=1, math=2.5"; span_bytes and
    shard_tokens: sizes of the pieces of work and of the files."""

    workers: int = 1
    mixture: str = ""
    span_bytes: int = 8 * 2**20
    shard_tokens: int = 2**24


@dataclass(frozen=True)
class Job:
    """What a worker needs besides its piece."""

    out: str
    data: DataConfig
    tokenizer: TokenizerConfig


# --- cutting the input


def cut_files(path: str, span_bytes: int) -> tuple[list[Span], list[dict[str, Any]]]:
    """(spans in file and line order, [{file, bytes, blake2b}]). Reads every byte once."""
    spans: list[Span] = []
    inputs = []
    for file in find_files(path)[0]:
        cut = _cut_jsonl if file.suffix in JSONL_SUFFIXES else _cut_parquet
        digest = hashlib.blake2b(digest_size=16)
        spans += cut(file, span_bytes, digest.update)
        inputs.append({"file": file.name, "bytes": file.stat().st_size, "blake2b": digest.hexdigest()})
    return spans, inputs


def _cut_jsonl(file: Path, span_bytes: int, update: Callable[[bytes], None]) -> Iterator[Span]:
    start, first_line = 0, 1
    with open(file, "rb") as stream:
        while block := stream.read(span_bytes):
            if not block.endswith(b"\n"):
                block += stream.readline()
            update(block)
            yield Span(str(file), start, start + len(block), first_line)
            start += len(block)
            first_line += block.count(b"\n")


def _cut_parquet(file: Path, span_bytes: int, update: Callable[[bytes], None]) -> Iterator[Span]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open(file, "rb") as stream:
        while block := stream.read(span_bytes):
            update(block)
    try:
        metadata = pq.read_metadata(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"{file}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    first_line = 1
    for group in range(metadata.num_row_groups):
        yield Span(str(file), group, group + 1, first_line)
        first_line += metadata.row_group(group).num_rows


# --- pass 1: a span becomes a part

_tokenizers: dict[TokenizerConfig, Tokenizer] = {}


def _tokenizer(config: TokenizerConfig) -> Tokenizer:
    if config not in _tokenizers:
        _tokenizers[config] = Tokenizer.load(config.path, config.think_tokens)
    return _tokenizers[config]


def cluster_of(record: Record, file: str) -> str:
    """The mixture cluster of a record: its field `cluster`, else `source`, else its task, else the file's
    name."""
    for name in ("cluster", "source"):
        if isinstance(record.meta.get(name), str):
            return str(record.meta[name])
    return (record.task if isinstance(record, Problem) else "") or Path(file).stem


def render_part(job: Job, number: int, span: Span) -> None:
    """Write part `number`, unless it is there."""
    paths = part_paths(job.out, number)
    if paths["info"].exists():
        return
    tokenizer, data = _tokenizer(job.tokenizer), job.data
    report = LoadReport()
    pieces: list[npt.NDArray[np.int32]] = []
    table: list[tuple[int, ...]] = []
    clusters: dict[str, int] = {}
    rejects: list[dict[str, Any]] = []
    start = 0
    for found, line, raw in read_span(span, report, trainable):
        if isinstance(found, BadRow):
            if data.on_bad_row == "stop":
                raise UserError(str(found))
            rejects.append({**asdict(found), "raw": raw})
            continue
        document = Document(*render_example(tokenizer, found, data.system_message))
        kept, _, _ = fit_documents([document], data.seq_length, data.on_long, [found.id])
        length = len(kept[0].tokens) if kept else 0
        cluster = clusters.setdefault(cluster_of(found, span.file), len(clusters))
        epochs = found.meta.get("epochs")
        copies = epochs if isinstance(epochs, int) and not isinstance(epochs, bool) else -1
        targets = kept[0].num_targets if kept else 0
        table.append(
            (start, length, len(document.tokens), targets, cluster, copies, line,
             hash64(found.id), hash64(question(found)))
        )  # fmt: skip
        if kept:
            pieces.append(mark_targets(kept[0].tokens, kept[0].loss_mask))
            start += length
    write_array(paths["tokens"], np.concatenate(pieces) if pieces else np.zeros(0, np.int32))
    write_array(paths["table"], np.array(table, dtype=DOCUMENT))
    with JsonlWriter(paths["rejects"]) as writer:
        for row in rejects:
            writer.write(row)
    atomic_write_json(
        paths["info"], {"rows": report.rows, "rejected": len(rejects), "clusters": list(clusters)}
    )


# --- pass 3: rows become shards


@dataclass(frozen=True)
class ShardTask:
    """One shard to write. parts, starts, lengths: where the tokens of its documents lie; ends: documents up
    to the end of each row."""

    part: str
    number: int
    parts: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]


def shard_tasks(plan: Plan, part: str, rows_per_shard: int) -> Iterator[ShardTask]:
    """The shards of `part`, in order."""
    documents, starts = plan.rows[part]
    for number, first in enumerate(range(0, len(starts) - 1, rows_per_shard)):
        edges = starts[first : first + rows_per_shard + 1]
        mine = documents[edges[0] : edges[-1]]
        table = plan.table[mine]
        yield ShardTask(part, number, plan.parts[mine], table["start"], table["length"], edges[1:] - edges[0])


def write_shard(job: Job, pad_id: int, task: ShardTask) -> None:
    """Write the three files of a shard, `rows` last, unless it is there."""
    paths = shard_paths(Path(job.out) / task.part, task.number)
    if paths["rows"].exists():
        return
    length = job.data.seq_length
    tokens = np.full((len(task.ends), length), pad_id, np.int32)
    bounds: list[int] = []
    rows = np.zeros((len(task.ends), 3), np.int64)
    opened: dict[int, npt.NDArray[np.int32]] = {}
    first = 0
    for row, end in enumerate(task.ends.tolist()):
        start_of_bounds, place = len(bounds), 0
        bounds.append(0)
        for index in range(first, end):
            part = int(task.parts[index])
            if part not in opened:
                opened[part] = np.load(part_paths(job.out, part)["tokens"], mmap_mode="r")
            start, count = int(task.starts[index]), int(task.lengths[index])
            tokens[row, place : place + count] = opened[part][start : start + count]
            place += count
            bounds.append(place)
        rows[row] = start_of_bounds, 0, place
        if place < length:
            bounds.append(length)
        rows[row, 1] = len(bounds) - start_of_bounds
        first = end
    write_array(paths["tokens"], tokens)
    write_array(paths["bounds"], np.array(bounds, np.int32))
    write_array(paths["rows"], rows)


# --- all of it


def _run(workers: int, function: Callable[..., None], tasks: Iterable[tuple[Any, ...]], what: str) -> None:
    """Call `function` on every task, over processes; the first error, in the tasks' order, is raised. Keeps
    only a few tasks in flight."""
    if workers == 1:
        for task in tasks:
            function(*task)
        return
    waiting: list[Future[None]] = []

    def finish(keep: int) -> None:
        while len(waiting) > keep:
            try:
                waiting.pop(0).result(timeout=TASK_DEADLINE_S)
            except TimeoutError:
                raise RuntimeError(f"{what}: a piece took more than {TASK_DEADLINE_S:g} s") from None

    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(function, *task))
                finish(keep=4 * workers)
            finish(keep=0)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(out: Path, settings: dict[str, Any]) -> bool:
    """Claim the folder for `settings`; True where a finished build of them is there. UserError where
    something else is."""
    path = out / SETTINGS
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        for key in settings:
            if found.get(key) != settings[key]:
                raise UserError(
                    f"{out}: was begun with another {key}: {found.get(key)!r}, now {settings[key]!r};"
                    " take a new folder"
                )
        return (out / INDEX).exists()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty and not a folder of `phi4r data build`")
    (out / "parts").mkdir(parents=True)
    atomic_write_json(path, settings)
    return False


def main(config: SFTConfig, out: Path, options: Options) -> dict[str, Any]:
    """Build the folder `out` from `config.data`; returns the index. The same call goes on with a build that
    was interrupted."""
    data = config.data
    if not data.path:
        raise UserError("data build: data.path is empty: say which JSONL or Parquet files to read")
    tokenizer = _tokenizer(config.tokenizer)
    if tokenizer.note:
        say(tokenizer.note)
    epochs = mixture.parse(options.mixture)
    say(f"data build: reading {data.path}")
    spans, inputs = cut_files(data.path, options.span_bytes)
    kept = ("seq_length", "on_long", "on_bad_row", "system_message", "heldout", "heldout_path")
    settings = {
        "inputs": inputs,
        "tokenizer": fingerprint(tokenizer),
        "seed": config.seed,
        "mixture": epochs,
        "span_bytes": options.span_bytes,
        "shard_tokens": options.shard_tokens,
        **{name: getattr(data, name) for name in kept},
    }
    if _begin(out, settings):
        say(f"data build: {out} is finished; nothing to do")
        return dict(json.loads((out / INDEX).read_text(encoding="utf-8")))
    job = Job(str(out), data, config.tokenizer)
    numbered = ((job, number, span) for number, span in enumerate(spans))
    _run(options.workers, render_part, numbered, "rendering")
    say(f"data build: {len(spans):,} part(s) rendered")
    plan = read_tables(out, spans, data)
    heldout = load_records(data.heldout_path, check=trainable)[0] if data.heldout_path else []
    plan_rows(plan, config, epochs, {hash64(question(record)) for record in heldout})
    rows_per_shard = max(1, options.shard_tokens // data.seq_length)
    for part in ("train", "heldout"):
        (out / part).mkdir(exist_ok=True)
        tasks = ((job, tokenizer.pad, task) for task in shard_tasks(plan, part, rows_per_shard))
        _run(options.workers, write_shard, tasks, f"writing {part}")
    return _finish(out, settings, plan, tokenizer.pad, rows_per_shard, len(spans))


def _finish(
    out: Path, settings: dict[str, Any], plan: Plan, pad_id: int, rows_per_shard: int, num_parts: int
) -> dict[str, Any]:
    """Rejects, statistics, picture, index; then the parts go."""
    with JsonlWriter(out / "rejects.jsonl") as writer:
        for number in range(num_parts):
            for line in part_paths(out, number)["rejects"].read_text(encoding="utf-8").splitlines():
                writer.write(json.loads(line))
    found = statistics(plan, settings["seq_length"])
    picture(plan, settings["seq_length"], out / "lengths.png")
    shards = {}
    for part, (_, starts) in plan.rows.items():
        left = len(starts) - 1
        shards[part] = [min(rows_per_shard, left - first) for first in range(0, left, rows_per_shard)]
    index = {
        "format": FORMAT,
        "seq_length": settings["seq_length"],
        "pad_id": pad_id,
        "tokenizer": settings["tokenizer"],
        "shards": shards,
        "statistics": found,
    }
    atomic_write_json(out / INDEX, index)
    shutil.rmtree(out / "parts")
    for line in summary(found):
        say(line)
    return index
