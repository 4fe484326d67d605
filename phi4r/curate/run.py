"""`phi4r curate`: raw problems -> RUN/curated.jsonl, RUN/removed.jsonl and RUN/curation_report.json.

    ingest -> validate -> dedup -> decontaminate -> difficulty -> mixture

Each stage leaves RUN/stages/NN_name.jsonl (kept), NN_name.removed.jsonl and, last, NN_name.json with its
summary and a fingerprint of its settings and of everything before it. A rerun takes over the stages whose
fingerprint still holds and says so; measured pass rates are kept per problem, so an interrupted measurement
goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from phi4r.configs.load import write_resolved
from phi4r.configs.stages import CurateConfig
from phi4r.core.console import Progress, console, say
from phi4r.core.errors import UserError
from phi4r.core.io import JsonlWriter, atomic_write_json, read_jsonl
from phi4r.core.problem import Problem
from phi4r.curate.decontaminate import decontaminate
from phi4r.curate.dedup import deduplicate
from phi4r.curate.difficulty import SamplePassRate, apply_mixture, parse_mixture, teachable_band
from phi4r.curate.pool import difficulty_range, generate_heldout, generate_raw_pool, write_problems
from phi4r.curate.report import build_report, print_funnel, removed_row, stage_summary
from phi4r.curate.stage import StageResult
from phi4r.curate.validate import same_answer, task_check, tidy, validate
from phi4r.data.records import find_files, load_problems
from phi4r.tasks import get_task
from phi4r.train.folders import find_latest

_FORMAT = 1  # of the stage files, and of what the stages do: a change makes finished stages run again


@dataclass(frozen=True)
class _State:
    """Where the pipeline stands: the problems left, the fingerprint of how they came about, summaries so
    far."""

    problems: list[Problem]
    fingerprint: str
    summaries: list[dict[str, Any]]


def main(
    config: CurateConfig, run_dir: str | Path, sample_pass_rate: SamplePassRate | None = None
) -> dict[str, Any]:
    """Run every stage, write the results and the report into `run_dir`, print the funnel and return the
    report.

    `sample_pass_rate(problems, k)` measures difficulty; without it, `config.curate.checkpoint` names the
    model. Where there is neither, that stage is left out and the report says so. Raises UserError on bad
    input, and where nothing would be left.
    """
    run_dir = Path(run_dir)
    write_resolved(config, run_dir)
    settings = config.curate
    epochs = parse_mixture(settings.mixture)
    skipped: list[str] = []
    source, heldout = _inputs(config, run_dir)

    state = _ingest(config, run_dir, source)
    limits = {"max_problem_chars": settings.max_problem_chars, "max_trace_chars": settings.max_trace_chars}
    state = _step(
        state,
        run_dir,
        "validate",
        limits,
        lambda left: validate(left, task_check, settings.max_problem_chars, settings.max_trace_chars),
    )
    threshold = settings.dedup_threshold
    state = _step(
        state,
        run_dir,
        "dedup",
        {"threshold": threshold},
        lambda left: deduplicate(left, threshold, same_answer),
    )
    if heldout:
        how = {"ngram": settings.ngram, "mask_numbers": settings.mask_numbers}
        against = {**how, "heldout": _digest([asdict(problem) for problem in heldout])}
        state = _step(
            state,
            run_dir,
            "decontaminate",
            against,
            lambda left: decontaminate(left, heldout, settings.ngram, settings.mask_numbers),
        )
    else:
        skipped.append("decontaminate did not run: no held-out problems (curate.heldout_path)")
    if sample_pass_rate is None and settings.checkpoint:
        sample_pass_rate = importlib.import_module("phi4r.curate.pass_rate").load_sampler(config, run_dir)
    if sample_pass_rate is not None:
        state = _measure(state, run_dir, config, sample_pass_rate)
    else:
        skipped.append("difficulty was not measured: no model to sample from (curate.checkpoint)")
    if epochs:
        state = _step(
            state, run_dir, "mixture", {"epochs": epochs, "seed": config.seed},
            lambda left: apply_mixture(left, epochs, config.seed),
        )  # fmt: skip
    return _finish(state, run_dir, source, skipped)


def _inputs(config: CurateConfig, run_dir: Path) -> tuple[Path, list[Problem]]:
    """(file or folder of raw rows, held-out problems); what is generated is written into the run folder."""
    problems, settings = config.problems, config.curate
    task = get_task(problems.task, "problems.task")
    low, high = problems.difficulty_min, problems.difficulty_max
    if settings.heldout_path:
        heldout, _ = load_problems(settings.heldout_path)
    elif not task.is_generated or settings.num_heldout == 0:
        heldout = []
    else:
        heldout = generate_heldout(task, config.seed, settings.num_heldout, low, high)
        write_problems(run_dir / "heldout.jsonl", heldout)
    if problems.path:
        return Path(problems.path), heldout
    raw = run_dir / "raw.jsonl"
    shares: dict[str, float] | None = None if settings.planted_defects else {}
    pool = generate_raw_pool(task, config.seed, problems.num_generated, heldout, low, high, shares=shares)
    pool.write(raw)
    low, high = difficulty_range(task, low, high)
    say(
        f"curate: {len(pool.lines):,} raw rows of {task.name} {low}-{high}, "
        f"{len(pool.planted):,} spoilt on purpose"
    )
    return raw, heldout


def _ingest(config: CurateConfig, run_dir: Path, source: Path) -> _State:
    """Read the raw rows; a malformed one is removed with its line, or ends the run (problems.on_bad_row)."""
    # The generated pool is malformed on purpose, so its bad rows are always skipped.
    on_bad_row = config.problems.on_bad_row if config.problems.path else "skip"
    files, _ = find_files(source)
    key = {
        "files": [_file_digest(file) for file in files],
        "on_bad_row": on_bad_row,
        "task": config.problems.task,
    }
    fingerprint = _digest(["ingest", _FORMAT, key])
    done = _finished(run_dir, 0, "ingest", fingerprint)
    if done is None:
        rejects = run_dir / "rejects.jsonl"
        rejects.unlink(missing_ok=True)
        rows, load = load_problems(source, on_bad_row, rejects)
        named = [problem if problem.task else replace(problem, task=config.problems.task) for problem in rows]
        tidied = [tidy(problem) for problem in named]
        changed = sum(old.problem != new.problem for old, new in zip(named, tidied, strict=True))
        removed = [_rejected_row(row) for _, row in read_jsonl(rejects)] if load.rejected else []
        notes = {"files": load.files, "kinds": load.reasons, "white_space_tidied": changed}
        done = _save(run_dir, 0, "ingest", fingerprint, tidied, removed, notes)
    return _State(done[0], fingerprint, [done[1]])


def _rejected_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the reject file in the form of removed.jsonl."""
    return {
        "stage": "ingest",
        "reason": "malformed",
        "id": f"{Path(row['file']).name}:{row['line']}",
        "problem": row["raw"],
        "clash_id": "",
        "clash": "",
        "detail": {"field": row["field"], "reason": row["reason"]},
        "row": None,
    }


def _refuse_nothing_left(summary: dict[str, Any]) -> None:
    """A stage that removes everything is a wrong setting or the wrong file; say so with an example."""
    if summary["kept"]:
        return
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in summary["reasons"].items())
    example = summary["examples"][0]
    detail = ", ".join(f"{key} {value}" for key, value in example["detail"].items())
    hint = "; is problems.task the right one?" if "not_of_task" in summary["reasons"] else ""
    raise UserError(
        f"curate: {summary['name']} removed all {summary['before']:,} problems ({reasons}), "
        f"the first being {example['id']} ({detail}){hint}"
    )


def _step(
    state: _State,
    run_dir: Path,
    name: str,
    settings: dict[str, Any],
    compute: Callable[[list[Problem]], StageResult],
) -> _State:
    """One stage: taken over if it was finished with the same fingerprint, else computed and saved."""
    number = len(state.summaries)
    fingerprint = _digest([state.fingerprint, name, settings])
    done = _finished(run_dir, number, name, fingerprint)
    if done is None:
        say(f"curate: {name}: {len(state.problems):,} problems")
        result = compute(state.problems)
        rows = [removed_row(name, item) for item in result.removed]
        done = _save(run_dir, number, name, fingerprint, result.kept, rows, result.notes)
    _refuse_nothing_left(done[1])
    return _State(done[0], fingerprint, [*state.summaries, done[1]])


def _measure(state: _State, run_dir: Path, config: CurateConfig, sample: SamplePassRate) -> _State:
    """The difficulty stage, with pass rates saved as they are measured."""
    settings = config.curate
    k = settings.pass_rate_k
    model = {
        "k": k,
        "seed": config.seed,
        "sampling": asdict(config.sampling),
        "checkpoint": _folder_stamp(settings.checkpoint),
    }
    band = {"low": settings.band_low, "high": settings.band_high}
    path = run_dir / "stages" / "pass_rates.jsonl"

    def compute(problems: list[Problem]) -> StageResult:
        return teachable_band(
            problems, _pass_rates(problems, path, _digest(model), sample, k, settings.pass_rate_chunk), **band
        )

    return _step(state, run_dir, "difficulty", {**model, **band}, compute)


def _pass_rates(
    problems: Sequence[Problem], path: Path, model: str, sample: SamplePassRate, k: int, chunk_size: int
) -> np.ndarray:
    """Pass rates float64[P], from the file where this model was already asked, measured and added where
    not."""
    known: dict[str, float] = {}
    if path.exists():
        for _, row in read_jsonl(path):
            if row["model"] == model:
                known[row["key"]] = math.nan if row["pass_rate"] is None else row["pass_rate"]
    keys = [_digest([problem.id, problem.problem, problem.answer, problem.task]) for problem in problems]
    todo = [index for index, key in enumerate(keys) if key not in known]
    if len(todo) < len(problems):
        say(f"curate: difficulty: {len(problems) - len(todo):,} pass rates taken over from {path.name}")
    with (
        JsonlWriter(path, append=True) as writer,
        Progress("pass rates", len(todo), every=1) as progress,
    ):
        for start in range(0, len(todo), chunk_size):
            chunk = todo[start : start + chunk_size]
            rates = np.asarray(sample([problems[index] for index in chunk], k), np.float64)
            if rates.shape != (len(chunk),):
                raise ValueError(f"sample_pass_rate gave shape {rates.shape} for {len(chunk)} problems")
            for index, rate in zip(chunk, rates.tolist(), strict=True):
                known[keys[index]] = rate
                shown = None if math.isnan(rate) else rate
                writer.write(
                    {"model": model, "key": keys[index], "id": problems[index].id, "pass_rate": shown}
                )
            progress.update(start + len(chunk), {"mean": float(np.nanmean(list(known.values())))})
    return np.array([known[key] for key in keys])


def _finish(state: _State, run_dir: Path, source: Path, skipped: list[str]) -> dict[str, Any]:
    """The three results of the run, and the funnel on the console."""
    write_problems(run_dir / "curated.jsonl", state.problems)
    with JsonlWriter(run_dir / "removed.jsonl") as writer:
        for number, summary in enumerate(state.summaries):
            for _, row in read_jsonl(_stage_path(run_dir, number, summary["name"], ".removed.jsonl")):
                writer.write(row)
    planted = source.with_suffix(".planted.json")
    extra: dict[str, Any] = {"source": str(source), "skipped": skipped}
    if source.parent == run_dir and planted.exists():
        extra["planted"] = _found_of_planted(json.loads(planted.read_text(encoding="utf-8")), run_dir)
    report = build_report(state.summaries, extra)
    atomic_write_json(run_dir / "curation_report.json", report)
    print_funnel(report, console())
    say(f"curate: {len(state.problems):,} problems -> {run_dir / 'curated.jsonl'}")
    return report


def _found_of_planted(planted: list[dict[str, Any]], run_dir: Path) -> dict[str, dict[str, int]]:
    """For each kind of planted defect: how many there were, and how many of these rows were removed."""
    gone: set[str] = set()
    for _, row in read_jsonl(run_dir / "removed.jsonl"):
        gone.add(row["id"])
    counts: dict[str, dict[str, int]] = {}
    for item in planted:
        count = counts.setdefault(item["defect"], {"planted": 0, "removed": 0})
        count["planted"] += 1
        count["removed"] += item["id"] in gone or f"raw.jsonl:{item['line']}" in gone
    return counts


# --- stage files


def _stage_path(run_dir: Path, number: int, name: str, suffix: str) -> Path:
    return run_dir / "stages" / f"{number:02d}_{name}{suffix}"


def _save(
    run_dir: Path,
    number: int,
    name: str,
    fingerprint: str,
    kept: list[Problem],
    removed: list[dict[str, Any]],
    notes: dict[str, Any],
) -> tuple[list[Problem], dict[str, Any]]:
    """Write a finished stage, its summary last: a stage without one is not finished."""
    summary = stage_summary(name, len(kept) + len(removed), len(kept), removed, notes)
    done = _stage_path(run_dir, number, name, ".json")
    done.unlink(missing_ok=True)
    write_problems(_stage_path(run_dir, number, name, ".jsonl"), kept)
    with JsonlWriter(_stage_path(run_dir, number, name, ".removed.jsonl")) as writer:
        for row in removed:
            writer.write(row)
    atomic_write_json(done, {"fingerprint": fingerprint, "summary": summary})
    return kept, summary


def _finished(
    run_dir: Path, number: int, name: str, fingerprint: str
) -> tuple[list[Problem], dict[str, Any]] | None:
    """The kept problems and summary of a stage that was finished with this fingerprint, or None."""
    path = _stage_path(run_dir, number, name, ".json")
    if not path.exists():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved["fingerprint"] != fingerprint:
        return None
    summary: dict[str, Any] = saved["summary"]
    kept: list[Problem] = []
    if summary["kept"]:
        kept, _ = load_problems(_stage_path(run_dir, number, name, ".jsonl"))
    say(f"curate: {name}: already done, {summary['kept']:,} of {summary['before']:,} kept")
    return kept, summary


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder_stamp(path: str) -> list[list[Any]]:
    """Name, size and time of every file of a checkpoint (of a run folder: of its newest one, for a log that
    grows is no other model): changes when the checkpoint does, and is quick to take."""
    if not path:
        return []
    root = find_latest(path) or Path(path)
    if not root.exists():
        raise UserError(f"curate.checkpoint: {path}: no such file or folder")
    files = [root] if root.is_file() else sorted(entry for entry in root.rglob("*") if entry.is_file())
    stats = [(file, file.stat()) for file in files]
    return [[str(file.relative_to(root)), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
