"""What every training loop does around its steps: resume, log, checkpoint, stop, give up on non-finite
gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phi4r.configs.stages import RLConfig, SFTConfig
from phi4r.console import Progress, say
from phi4r.data.tokenizer import Tokenizer
from phi4r.parallel.layout import broadcast_object
from phi4r.train.checkpoint import find_latest, load_checkpoint, remove_leftovers, save_checkpoint
from phi4r.train.engine import Engine, StepResult
from phi4r.train.log import MetricsLogger
from phi4r.train.session import fill_weights
from phi4r.train.signals import StopFlag, end_by, stop_flag

# Without a terminal a run prints about this many lines, however long it is.
PLAIN_LINES = 20


class TrainingLoop:
    """The bookkeeping of one run on all ranks. Use `open_loop`; then, for each step:

    `for step in loop.steps(): ...; loop.finish_step(step, metrics)`
    """

    def __init__(
        self, config: SFTConfig | RLConfig, run_dir: Path, engine: Engine, tokenizer: Tokenizer, name: str
    ) -> None:
        self.config, self.run_dir, self.engine, self.tokenizer, self.name = (
            config,
            run_dir,
            engine,
            tokenizer,
            name,
        )
        self.start_step = self._restore()
        self.nonfinite = 0
        self._logger: MetricsLogger
        self._progress: Progress
        self._stop: StopFlag
        self._saved_step = self.start_step
        self._step_began = time.perf_counter()

    def _restore(self) -> int:
        """Fill the engine from the run's newest checkpoint, else from init; returns the steps already
        done."""
        layout = self.engine.layout
        if layout.is_main:
            remove_leftovers(self.run_dir)
        latest = broadcast_object(find_latest(self.run_dir) if layout.is_main else None)
        if latest is None:
            fill_weights(self.engine, self.config.init.checkpoint, self.config.seed)
            return 0
        state = load_checkpoint(latest, self.engine.chunks, self.engine.optimizer)
        step = int(state["step"])
        say(f"{self.name}: resuming {self.run_dir} after step {step}")
        return step

    def steps(self) -> Iterator[int]:
        """The steps that are still to do, counted from 0."""
        yield from range(self.start_step, self.config.train.num_steps)

    def begin_step(self) -> None:
        """Start the step's clock (for what is reported as step_seconds)."""
        self._step_began = time.perf_counter()

    def check_finite(self, step: int, result: StepResult) -> None:
        """Count steps in a row that were left out because loss or gradient were not finite; past the limit,
        stop."""
        self.nonfinite = 0 if result.applied else self.nonfinite + 1
        if self.nonfinite > self.config.train.max_nonfinite_steps:
            raise RuntimeError(
                f"step {step + 1}: loss {result.loss} or gradient norm {result.grad_norm} is not finite for "
                f"{self.nonfinite} steps in a row (train.max_nonfinite_steps ="
                f" {self.config.train.max_nonfinite_steps})"
            )

    def finish_step(
        self, step: int, metrics: Mapping[str, Any], shown: Mapping[str, Any], num_tokens: int
    ) -> None:
        """Log step `step` (from 0), save when due, and end the run here if it was told to stop.

        metrics: a row of metrics.jsonl; shown: the few that stand beside the progress bar; num_tokens:
        trained tokens. The row's step_seconds and tokens_per_second are wall-clock; all other values repeat
        bit for bit on CPU.
        """
        seconds = time.perf_counter() - self._step_began
        clock = {"step_seconds": seconds, "tokens_per_second": num_tokens / max(seconds, 1e-9)}
        self._logger.log(step + 1, {**metrics, **clock})
        self._progress.update(step + 1, {**shown, "tok/s": round(clock["tokens_per_second"])})
        due = self.config.checkpoint.every
        if due and (step + 1) % due == 0:
            self.save(step + 1)
        number = self._stop.agreed(self.engine.layout.device)
        if number:
            self.save(step + 1)
            say(
                f"{self.name}: stopped after step {step + 1} of {self.config.train.num_steps};"
                " the same command resumes"
            )
            end_by(number)

    def save(self, step: int) -> None:
        """Write the checkpoint of `step` done steps, once."""
        if self._saved_step == step:
            return
        layout = self.engine.layout
        save_checkpoint(
            self.run_dir,
            step,
            self.engine.chunks,
            self.engine.optimizer,
            state={"step": step, "seed": self.config.seed},
            model_cfg=self.engine.model_config,
            tokenizer=self.tokenizer,
            layout={
                "tp": layout.tp,
                "pp": layout.pp,
                "vpp": layout.vpp,
                "cp": layout.cp,
                "dp": layout.dp,
                "sp": layout.sp,
            },
            keep_last=self.config.checkpoint.keep_last or 10**9,
        )
        self._saved_step = step


@contextmanager
def open_loop(
    config: SFTConfig | RLConfig, run_dir: Path, engine: Engine, tokenizer: Tokenizer, name: str
) -> Iterator[TrainingLoop]:
    """A restored `TrainingLoop` with its progress bar, sinks and signal handlers; saves at the end if so
    configured."""
    loop = TrainingLoop(config, run_dir, engine, tokenizer, name)
    num_steps = config.train.num_steps
    every = max(config.log.every, math.ceil(num_steps / PLAIN_LINES))
    if loop.start_step >= num_steps:
        say(f"{name}: {run_dir} has done all {num_steps} steps; nothing to do (train.num_steps)")
    with (
        MetricsLogger(run_dir, config.log, loop.start_step) as loop._logger,
        Progress(name, num_steps, loop.start_step, every) as loop._progress,
        stop_flag() as loop._stop,
    ):
        yield loop
        if config.checkpoint.save_final:
            loop.save(max(num_steps, loop.start_step))
