"""`phi4r logs`: what a rank of a run printed, or its job script, and what follows."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from phi4r.core.errors import UserError
from phi4r.slurm.status import job_of

POLL_S = 0.5
ASK_EVERY_S = 10.0


def log_of(run_dir: Path, rank: int | None) -> Path:
    """The newest log of a rank (None: of the job script). UserError names what there is."""
    folder = run_dir / "logs"
    if rank is None:
        found = sorted(folder.glob("job-*.out"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(f"{folder}: no log of a job script; was the run started by `phi4r launch`?")
        return found[-1]
    name = f"rank_{rank:05d}.log"
    # srun's tasks have a folder for each attempt; ranks that one process started are beside it
    for path in (folder / "latest" / name, folder / name):
        if path.exists():
            return path
    there = sorted(path.name for path in (folder / "latest").glob("rank_*.log"))
    listed = f"ranks 0 to {len(there) - 1} have logs" if there else "no rank has one yet"
    raise UserError(f"{folder}: no log of rank {rank}; {listed}")


def main(run_dir: Path, rank: int | None, follow: bool) -> None:
    """Print a log; with `follow` go on until the job is over, through restarts."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder")
    path = log_of(run_dir, rank).resolve()
    position = _print_from(path, 0)
    asked = time.monotonic()
    while follow:
        time.sleep(POLL_S)
        position = _print_from(path, position)
        try:
            newest = log_of(run_dir, rank).resolve()
        except UserError:  # between two attempts
            newest = path
        if newest != path:
            print(f"--- {newest}", flush=True)
            path, position = newest, 0
        elif time.monotonic() - asked > ASK_EVERY_S:
            asked = time.monotonic()
            job = job_of(run_dir)
            if job is None or not job.is_queued:
                _print_from(path, position)
                return


def _print_from(path: Path, position: int) -> int:
    with open(path, "rb") as file:
        file.seek(position)
        data = file.read()
    sys.stdout.write(data.decode("utf-8", errors="replace"))
    sys.stdout.flush()
    return position + len(data)
