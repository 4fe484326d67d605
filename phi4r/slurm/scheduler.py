"""The few questions that phi4r asks SLURM, through its own commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi4r.core.errors import UserError

ANSWER_S = 60
QUEUED = frozenset(("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED", "STAGE_OUT"))
"""States of a job that SLURM has still to do with."""


@dataclass(frozen=True)
class Job:
    """A job, as scontrol knows it (for some minutes after its end)."""

    job_id: str
    name: str
    state: str
    reason: str
    restarts: int
    run_time: str
    """`00:12:01 of 1-00:00:00`."""
    nodes: str
    run_dir: str
    """What `phi4r launch` gave as the comment: the run folder."""
    remark: str = ""
    """`HOW: WHY` of the last end: `supervise` adds it to the comment where the disk has no room for it."""

    @property
    def is_queued(self) -> bool:
        return self.state in QUEUED


def ask(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """stdout of a SLURM command. UserError with the command's own words where it fails or is missing."""
    if shutil.which(words[0]) is None:
        raise UserError(f"{words[0]} is not on this machine: run this on a login node of the cluster")
    try:
        ended = subprocess.run(
            list(words),
            env=dict(environment or os.environ),
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]}: SLURM did not answer within {ANSWER_S} s") from None
    if ended.returncode:
        said = " ".join((ended.stderr or ended.stdout).split())
        raise UserError(said or f"{words[0]}: exit code {ended.returncode}")
    return ended.stdout


def find_job(job_id: str) -> Job | None:
    """A job, None where SLURM does not know it (any more)."""
    try:
        text = ask(["scontrol", "show", "job", "-o", job_id])
    except UserError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    jobs = [_parse(line) for line in text.splitlines()]  # of an array or of a heterogeneous job
    return next((job for job in jobs if job.job_id == job_id), jobs[-1])


def my_jobs() -> list[Job]:
    """This user's phi4r jobs in the queue."""
    lines = [line.split() for line in ask(["squeue", "-h", "--me", "-o", "%A %j %i"]).splitlines()]
    # "17+1" is the second component of job 17, which is listed by its first
    ids = dict.fromkeys(
        job
        for job, name, shown in lines
        if name.startswith("phi4r-") and shown.partition("+")[2] in ("", "0")
    )
    return [job for job in map(find_job, ids) if job is not None]


def _parse(line: str) -> Job:
    # "Key=value Key=value ...", where a value may hold spaces: it ends before the next " Key=".
    fields: dict[str, Any] = dict(re.findall(r"(\w[\w/:]*)=(.*?)(?= \w[\w/:]*=|$)", line))
    run_dir, _, remark = fields.get("Comment", "").strip().partition(" | ")
    return Job(
        job_id=fields["JobId"],
        name=fields.get("JobName", ""),
        state=fields.get("JobState", "UNKNOWN"),
        reason=fields.get("Reason", "").replace("None", ""),
        restarts=int(fields.get("Restarts", "0")),
        run_time=f"{fields.get('RunTime', '?')} of {fields.get('TimeLimit', '?')}",
        nodes=fields.get("NodeList", "").replace("(null)", ""),
        run_dir=run_dir,
        remark=remark,
    )
