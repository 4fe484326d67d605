"""A rank's side of `launch`: `python -m phi4r.parallel.worker FOLDER LIFE_LINE PARENT_PID`, started by nobody
else."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from phi4r.core.errors import UserError
from phi4r.core.io import atomic_write_json, atomic_write_text
from phi4r.parallel.failure import fail, report_to


def end_with_parent(life_line: int) -> None:
    """Kill this rank's process group as soon as the parent is gone: its end of the pipe closes, however it
    died."""

    def watch() -> None:
        while os.read(life_line, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="life-line", daemon=True).start()


def check_devices(world_size: int) -> None:
    """On a machine with GPUs every rank needs one of its own: raises UserError where there are too few."""
    import torch

    if torch.cuda.is_available() and torch.cuda.device_count() < world_size:
        raise UserError(
            f"parallel: {world_size} ranks need as many GPUs, and {torch.cuda.device_count()} are visible"
            " (CUDA_VISIBLE_DEVICES= runs on the CPU)"
        )


def main(folder: Path, life_line: int) -> int:
    """Run the job described in FOLDER/job.json; a failure is written to error_RANK.json for the parent to
    show."""
    end_with_parent(life_line)
    report_to(folder)
    rank = int(os.environ["RANK"])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    try:
        from phi4r.parallel.launch import find_target

        target = find_target(job["target"])
        atomic_write_text(folder / f"started_{rank}", "")
        if job["payload"].get("handler"):
            check_devices(int(os.environ["WORLD_SIZE"]))
        result = target(job["payload"])
        if rank == 0 and result is not None:
            atomic_write_json(folder / "result.json", result)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:  # noqa: BLE001  (whatever it is, the parent reports it as the job's error)
        fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
