"""Where a run's metrics go: metrics.jsonl always, Weights & Biases and TensorBoard when asked for (rank 0
only); and what its losses say about the next one."""

from __future__ import annotations

import json
import math
import os
import statistics
import uuid
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from phi4r.configs.sections import LogConfig
from phi4r.core.console import is_main_rank
from phi4r.core.errors import UserError
from phi4r.core.io import JsonlWriter, atomic_write_text, drop_partial_line
from phi4r.core.optional import require

WALL_CLOCK = (
    "step_seconds", "tokens_per_second", "tokens_per_second_per_gpu", "mfu", "data_seconds",
    "rollout_seconds", "sampling_seconds", "sync_seconds", "train_seconds", "eval_seconds", "slowest_rank",
    "slowest_excess", "peak_memory_gib", "checkpoint_stall_seconds", "timeline",
)  # fmt: skip
"""The columns of metrics.jsonl that differ from run to run; all others repeat bit for bit on CPU."""


def truncate_metrics(path: Path, last_step: int) -> int:
    """Drop the lines of metrics.jsonl whose step is beyond `last_step`; the file is replaced whole, or left
    alone.

    A run that was killed has logged steps that its last checkpoint does not know; a resumed run does them
    again. Returns the number of lines dropped. A line that is not a metrics row raises UserError with file
    and line.
    """
    if not path.exists():
        return 0
    drop_partial_line(path)
    kept: list[str] = []
    dropped = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not a line of metrics, so the run cannot be resumed") from None
        if step <= last_step:
            kept.append(line + "\n")
        else:
            dropped += 1
    if dropped:
        atomic_write_text(path, "".join(kept))
    return dropped


def json_value(value: Any) -> Any:
    """A metric as JSON holds it: numbers stay exact, inf and nan become the strings "inf", "-inf", "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class MetricsLogger:
    """Append one row per step to every sink.

    run_dir: gets metrics.jsonl, wandb/ and tensorboard/. resume_step: the step of the checkpoint that was
    loaded (0: a fresh run); later lines of an earlier attempt are dropped first, so the file holds every step
    once. On ranks other than 0 it does nothing.
    """

    def __init__(self, run_dir: str | Path, config: LogConfig, resume_step: int = 0) -> None:
        self._rows: JsonlWriter | None = None
        self._wandb: Any = None
        self._tensorboard: Any = None
        if not is_main_rank():
            return
        run_dir = Path(run_dir)
        path = run_dir / "metrics.jsonl"
        truncate_metrics(path, resume_step)
        if config.wandb != "off":
            self._wandb = _start_wandb(run_dir, config)
        if config.tensorboard:
            require("tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what an earlier attempt logged beyond the checkpoint.
            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)
        self._rows = JsonlWriter(path, append=True)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write {"step": step, **metrics}; values are ints, floats or strings, or a list, which
        metrics.jsonl alone gets. The line is on its way to disk
        on return. In a SLURM job the row also says how often SLURM had started the job anew.
        """
        if self._rows is None:
            return
        if "SLURM_JOB_ID" in os.environ:
            metrics = {**metrics, "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}
        self._rows.write({"step": step, **{name: json_value(value) for name, value in metrics.items()}})
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        if self._wandb is not None:
            self._wandb.log({"step": step, **numbers})
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish every sink. Calling it again does nothing."""
        if self._rows is not None:
            self._rows.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _start_wandb(run_dir: Path, config: LogConfig) -> Any:
    """Start or continue this run folder's Weights & Biases run: its id is kept beside the metrics."""
    wandb = require("wandb")
    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        atomic_write_text(id_file, uuid.uuid4().hex[:12] + "\n")
    run = wandb.init(
        project=config.wandb_project,
        name=run_dir.resolve().name,
        id=id_file.read_text(encoding="utf-8").strip(),
        dir=str(run_dir),
        mode=config.wandb,
        resume="allow" if config.wandb == "online" else None,
        settings=wandb.Settings(silent=True),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


# --- loss spikes

HISTORY = 128
"""Losses that a new one is compared with."""
MIN_HISTORY = 16


class SpikeWatch:
    """Flags a loss far above the ones before it: more than `sigmas` robust standard deviations (1.4826 times
    the median distance from the median) above their median. 0 sigmas: never."""

    def __init__(self, sigmas: float) -> None:
        self.sigmas = sigmas
        self._losses: deque[float] = deque(maxlen=HISTORY)

    @classmethod
    def resumed(cls, sigmas: float, metrics: Path, last_step: int) -> SpikeWatch:
        """With the losses that an earlier start of the run logged up to `last_step`, so that the same steps
        are flagged."""
        watch = cls(sigmas)
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        for line in lines[-HISTORY:] if last_step else ():
            row = json.loads(line)
            if row["step"] <= last_step and not row.get("loss_spike") and isinstance(row.get("loss"), float):
                watch._losses.append(row["loss"])
        return watch

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` is one; ordinary losses are remembered, spikes and non-finite ones are not."""
        if not math.isfinite(loss):
            return False
        losses = self._losses
        if self.sigmas and len(losses) >= MIN_HISTORY:
            middle = statistics.median(losses)
            spread = 1.4826 * statistics.median(abs(value - middle) for value in losses)
            # Losses that repeat to rounding have no spread: their own precision is the least that counts.
            if loss > middle + self.sigmas * max(spread, 1e-3 * abs(middle)):
                return True
        losses.append(loss)
        return False
