"""How a rank's failure becomes the job's error. Standard library only.

The launcher's worker says where reports go (`report_to`); `fail` leaves one there and ends the process, from
any thread. Ranks that torchrun or srun started have nobody to report to: they say it on stderr.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from phi4r.core.errors import UserError
from phi4r.core.io import atomic_write_json

_folder: Path | None = None


def report_to(folder: Path) -> None:
    """This process is a rank of the local job whose parent reads FOLDER/error_<rank>.json."""
    global _folder
    _folder = folder


def fail(error: Exception) -> NoReturn:
    """End this rank at once because of `error`, without any clean-up that could wait for other ranks."""
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    trace = "".join(traceback.format_exception(error))
    if _folder is not None:
        report = {
            "time": time.time(),
            "user_error": isinstance(error, UserError),
            "message": str(error),
            "trace": trace,
        }
        atomic_write_json(_folder / f"error_{rank}.json", report)
    if _folder is None or rank > 0:  # the parent prints the error once, where rank 0 has its console
        print(f"phi4r (rank {rank}): {trace}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
