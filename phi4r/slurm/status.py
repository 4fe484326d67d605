"""`phi4r status`: what a run is doing, how long it still takes, and why it last ended."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

from phi4r.core.console import format_seconds, print_table, say
from phi4r.core.errors import UserError
from phi4r.core.lock import describe, read_owner
from phi4r.slurm.scheduler import Job, find_job, my_jobs

RECENT = 20
"""Steps whose mean speed is shown, and from which the time left is computed."""


def last_rows(run_dir: Path, count: int = RECENT) -> list[dict[str, Any]]:
    """The newest rows of metrics.jsonl; a line that is being written is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines[-count - 1 :] if line.endswith("\n")][-count:]


def last_end(run_dir: Path) -> tuple[str, str, str] | None:
    """(when, how, why) of the newest line of RUN/slurm/history.tsv."""
    path = run_dir / "slurm" / "history.tsv"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if not lines:
        return None
    when, _, _, how, why = lines[-1].split("\t", 4)
    return when, how, why


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that a restart goes on from."""
    found = sorted((run_dir / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))
    return found[-1] if found else None


def job_of(run_dir: Path) -> Job | None:
    """The newest job of a run folder, None where there was none or SLURM has forgotten it."""
    path = run_dir / "slurm" / "job"
    if not path.exists() or shutil.which("scontrol") is None:
        return None
    return find_job(path.read_text(encoding="utf-8").strip())


def facts(run_dir: Path) -> dict[str, Any]:
    """What is known about a run, for JSON; keys are missing where nothing is known.

    state, job, reason, restarts, run_time, nodes, step, num_steps, tokens_per_second, eta_s, checkpoint,
    checkpoint_age_s, last_end, last_end_why, last_end_time, writer.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder")
    known: dict[str, Any] = {"run": str(run_dir)}
    job = job_of(run_dir)
    if job is not None:
        known |= {"state": job.state, "job": job.job_id, "restarts": job.restarts, "run_time": job.run_time}
        known |= {name: value for name, value in (("reason", job.reason), ("nodes", job.nodes)) if value}
    elif (run_dir / "slurm" / "job").exists():
        known["state"] = "not known to SLURM any more"
    config = run_dir / "config.json"
    if config.exists():
        tree = json.loads(config.read_text(encoding="utf-8"))["config"]
        if "train" in tree:
            known["num_steps"] = tree["train"]["num_steps"]
    rows = last_rows(run_dir)
    if rows:
        known["step"] = rows[-1]["step"]
        seconds = sum(row["step_seconds"] for row in rows)
        known["tokens_per_second"] = (
            sum(row["tokens_per_second"] * row["step_seconds"] for row in rows) / seconds
        )
        if "num_steps" in known:
            known["eta_s"] = (known["num_steps"] - known["step"]) * seconds / len(rows)
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is not None:
        age = datetime.datetime.now().timestamp() - checkpoint.stat().st_mtime
        known |= {"checkpoint": str(checkpoint), "checkpoint_age_s": age}
    end = last_end(run_dir)
    if end is not None:
        known |= {"last_end_time": end[0], "last_end": end[1], "last_end_why": end[2]}
    if job is not None and job.remark:
        how, _, why = job.remark.partition(": ")
        known |= {"last_end": how, "last_end_why": why, "last_end_time": "when the disk was full"}
    owner = read_owner(run_dir / "lock.json")
    if owner is not None:
        known["writer"] = describe(owner)
    return known


def lines_of(known: dict[str, Any]) -> list[tuple[str, str]]:
    """`facts` as (what, value) for people."""
    lines = [("run", known["run"])]
    if "state" in known:
        about = [known["state"], f"job {known['job']}" if "job" in known else "", known.get("reason", "")]
        lines.append(("state", ", ".join(part for part in about if part)))
    if "nodes" in known:
        lines.append(("nodes", f"{known['nodes']}, {known['run_time']}"))
    if "writer" in known:
        lines.append(("writer", known["writer"]))
    if "step" in known:
        total = f" of {known['num_steps']}" if "num_steps" in known else ""
        lines.append(("step", f"{known['step']}{total}"))
        lines.append(("tokens/s", f"{known['tokens_per_second']:,.0f}"))
    if known.get("eta_s"):
        lines.append(("time left", format_seconds(known["eta_s"])))
    if "checkpoint" in known:
        age = format_seconds(known["checkpoint_age_s"])
        lines.append(("last checkpoint", f"{Path(known['checkpoint']).name}, {age} ago"))
    if "restarts" in known:
        lines.append(("restarts", str(known["restarts"])))
    if "last_end" in known:
        lines.append(("last ended", f"{known['last_end']} ({known['last_end_time']})"))
        lines.append(("", known["last_end_why"]))
    return lines


def main(run: str, as_json: bool) -> None:
    """Print about one run, or a table of this user's phi4r jobs where `run` is ""."""
    if run:
        known = facts(Path(run).absolute())
        if as_json:
            print(json.dumps(known, indent=2))
            return
        for what, value in lines_of(known):
            say(f"  {what:<16} {value}")
        return
    rows = []
    for job in my_jobs():
        known = facts(Path(job.run_dir)) if job.run_dir and Path(job.run_dir).is_dir() else {}
        step = f"{known['step']}/{known.get('num_steps', '?')}" if "step" in known else ""
        eta = format_seconds(known["eta_s"]) if known.get("eta_s") else ""
        rows.append((job.job_id, job.name, job.state, job.reason, step, eta, job.restarts, job.run_dir))
    if as_json:
        names = ("job", "name", "state", "reason", "step", "time_left", "restarts", "run")
        print(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2))
    elif rows:
        columns = ("job", "name", "state", "reason", "step", "time left", "restarts", "run")
        print_table("", columns, rows)
    else:
        say("no phi4r jobs in the queue")
