"""What every training loop does around its steps: resume, log, checkpoint, stop, give up on non-finite
gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from phi4r.configs.stages import RLConfig, SFTConfig
from phi4r.core.console import Progress, say
from phi4r.core.errors import UserError
from phi4r.data.packing import PackedRow
from phi4r.data.tokenizer import Tokenizer
from phi4r.parallel.heartbeat import beat
from phi4r.parallel.layout import broadcast_object
from phi4r.train import folders, health
from phi4r.train.checkpoint import DamagedError, load_checkpoint
from phi4r.train.engine import Engine, StepResult
from phi4r.train.footprint import record_memory
from phi4r.train.log import MetricsLogger, SpikeWatch
from phi4r.train.retention import Retention
from phi4r.train.save import CheckpointError, CheckpointSaver, Saved, save_checkpoint
from phi4r.train.session import fill_weights
from phi4r.train.signals import StopFlag, end_by, stop_flag
from phi4r.train.throughput import StepClock
from phi4r.train.watchdog import watch

# Without a terminal a run prints about this many lines, however long it is.
PLAIN_LINES = 20


@dataclass(frozen=True)
class RunState:
    """What a checkpoint remembers besides weights and optimizer states; plain JSON."""

    step: int
    """Optimizer steps done."""
    seed: int
    next_batch: int = 0
    """RL: the first prompt batch that was not trained on."""
    curriculum: dict[str, Any] | None = None
    """RL: the state of the order of prompts."""

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> RunState:
        """The state that `asdict` made. phi4r 0.1.0 wrote `num_draws` for `next_batch`, or neither where a
        step was always one batch. UserError for a name that this phi4r does not know."""
        found = {"next_batch": saved.get("num_draws", saved["step"]), **saved}
        found.pop("num_draws", None)
        unknown = found.keys() - {entry.name for entry in fields(cls)}
        if unknown:
            raise UserError(f"the checkpoint's state has an unknown {min(unknown)!r}: from a newer phi4r?")
        return cls(**found)


def restore(config: SFTConfig | RLConfig, run_dir: Path, engine: Engine, name: str) -> RunState:
    """Fill the engine from the run's newest checkpoint, else from `config.init`; returns its state."""
    is_main = engine.layout.is_main
    if is_main:
        folders.remove_leftovers(run_dir)
    while True:
        steps = list(folders.all_steps(run_dir).values())
        newest = broadcast_object(steps[-1] if steps and is_main else None)
        if newest is None:
            fill_weights(engine, config.init.checkpoint, config.seed)
            return RunState(0, config.seed)
        try:
            state = RunState.from_dict(load_checkpoint(newest, engine.chunks, engine.optimizer))
        except DamagedError as error:
            _fall_back(config, engine, newest, error, name)
            continue
        say(f"{name}: resuming {run_dir} after step {state.step}")
        return state


def _fall_back(
    config: SFTConfig | RLConfig, engine: Engine, newest: Path, error: DamagedError, name: str
) -> None:
    """Set a damaged checkpoint aside if the run is configured so and has an older one; else raise."""
    older = broadcast_object(folders.older_whole(newest) if engine.layout.is_main else None)
    if older is None:
        raise UserError(f"{error}; the run has no older checkpoint that is whole")
    if config.checkpoint.on_damaged == "stop":
        raise UserError(
            f"{error}; {older} is whole: add --checkpoint.on_damaged older to go on from there, which"
            f" renames {newest.name} to {folders.DAMAGED}{newest.name}"
        )
    say(f"{name}: warning: {error}; set aside, going on from {older}")
    if engine.layout.is_main:
        folders.set_aside(newest)


class TrainingLoop:
    """The bookkeeping of one run on all ranks. Use `open_loop`; then, for each step:

    `for step in loop.steps(): ...; loop.finish_step(step, metrics)`
    """

    def __init__(
        self,
        config: SFTConfig | RLConfig,
        run_dir: Path,
        engine: Engine,
        tokenizer: Tokenizer,
        name: str,
        state: RunState,
        logger: MetricsLogger,
        progress: Progress,
        stop: StopFlag,
        clock: StepClock,
    ) -> None:
        self.config, self.run_dir, self.engine, self.tokenizer = config, run_dir, engine, tokenizer
        self.name, self.state, self.start_step = name, state, state.step
        self.nonfinite = 0
        self._logger, self._progress, self._stop = logger, progress, stop
        self._saver = self._make_saver()
        self._spikes = SpikeWatch.resumed(
            config.train.spike_sigmas, run_dir / "metrics.jsonl", self.start_step
        )
        self._saved_step = self.start_step
        self._failed_saves = 0
        self._stall_s = 0.0
        self._metrics: dict[str, float] = {}
        self.clock = clock

    def _make_saver(self) -> CheckpointSaver:
        layout, settings = self.engine.layout, self.config.checkpoint
        return CheckpointSaver(
            self.run_dir,
            self.engine.chunks,
            self.engine.optimizer,
            model_cfg=self.engine.model_config,
            tokenizer=self.tokenizer,
            layout={name: getattr(layout, name) for name in ("tp", "pp", "vpp", "cp", "dp", "sp")},
            retention=Retention.of(settings),
            background=settings.background,
            timeout_s=self.config.parallel.timeout_s,
        )

    def steps(self) -> Iterator[int]:
        """The steps that are still to do, counted from 0."""
        yield from range(self.start_step, self.config.train.num_steps)

    def begin_step(self) -> None:
        """Start the step's clock, in its first phase, "data". Raises RuntimeError where the run folder is
        gone: what a step writes would make another in its place."""
        if self.engine.layout.is_main and not self.run_dir.is_dir():
            raise RuntimeError(f"the run folder {self.run_dir} is gone")
        self.clock.begin()
        beat()

    def check_finite(
        self, step: int, result: StepResult, rows: Sequence[PackedRow], temperature: float = 1.0
    ) -> None:
        """Count steps in a row that were left out because loss or gradient were not finite; past the limit,
        keep what the step was given (`rows`, the weights) for `phi4r replay` and stop."""
        self.clock.add_work(rows)
        self.nonfinite = 0 if result.applied else self.nonfinite + 1
        limit = self.config.train.max_nonfinite_steps
        if self.nonfinite <= limit:
            return
        kept = self._keep_for_replay(step + 1, rows, temperature)
        raise RuntimeError(
            f"step {step + 1}: loss {result.loss} or gradient norm {result.grad_norm} is not finite for "
            f"{self.nonfinite} steps in a row (train.max_nonfinite_steps = {limit}); {kept}"
        )

    def _keep_for_replay(self, step: int, rows: Sequence[PackedRow], temperature: float) -> str:
        """Write RUN/replay; returns what to tell the user."""
        folder = folders.replay_folder(self.run_dir)
        if self._saver.pending:
            self._attempt(self._saver.wait)
        try:
            # The weights are those before the step: a step that is not finite leaves them alone.
            save_checkpoint(
                folder, step, self.engine.chunks, None, state={"step": step},
                model_cfg=self.engine.model_config, retention=Retention(1),
            )  # fmt: skip
            if self.engine.layout.is_main:
                health.save_batch(
                    folder, rows, {"stage": self.name, "step": step, "temperature": temperature}
                )
        except (CheckpointError, OSError) as error:
            return f"the batch could not be kept: {error}"
        return f"`phi4r replay {self.run_dir}` does the step again, row by row"

    def finish_step(
        self, step: int, metrics: Mapping[str, Any], shown: Mapping[str, Any], num_tokens: int
    ) -> None:
        """Log step `step` (from 0), save when due, and end the run here if it was told to stop.

        metrics: a row of metrics.jsonl; shown: the few that stand beside the progress bar; num_tokens:
        trained tokens. The row also gets the columns of `StepClock`, which are wall-clock; all other values
        repeat bit for bit on CPU.
        """
        columns = self.clock.columns(num_tokens)
        if step == self.start_step:
            record_memory(self.config, self.engine, self.run_dir)
        if self._stall_s:
            columns["checkpoint_stall_seconds"], self._stall_s = self._stall_s, 0.0
        if "loss" in metrics and self._spikes.is_spike(metrics["loss"]):
            metrics = {**metrics, "loss_spike": 1}
            say(f"{self.name}: warning: the loss of step {step + 1}, {metrics['loss']:.4g}, is a spike")
        self._logger.log(step + 1, {**metrics, **columns})
        self._metrics = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        self._progress.update(step + 1, {**shown, "tok/s": round(columns["tokens_per_second"])})
        if self._saver.pending:
            self._attempt(self._saver.poll)
        every = self.config.train.check_replicas_every
        if every and (step + 1) % every == 0:
            health.check_replicas(self.engine.chunks, step + 1)
        due = self.config.checkpoint.every
        if due and (step + 1) % due == 0:
            self.save(step + 1)
        number = self._agreed_signal()
        if number:
            self.save(step + 1, last=True)
            say(
                f"{self.name}: stopped after step {step + 1} of {self.config.train.num_steps};"
                " the same command resumes"
            )
            end_by(number)

    def _agreed_signal(self) -> int:
        """The signal to stop that any rank received (0: none), the same on all ranks. Collective."""
        number = self._stop.signal_number
        if self.engine.layout.world_size == 1:
            return number
        flag = torch.tensor(number, device=self.engine.layout.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)

    def save(self, step: int, *, last: bool = False) -> None:
        """Write the checkpoint of `step` done steps, once; `last`: be done with it on return, or raise."""
        if self._saver.pending:  # the one before
            self._attempt(self._saver.wait, last=last and self._saved_step == step)
        if self._saved_step == step:
            return
        state = asdict(replace(self.state, step=step, seed=self.config.seed))
        self._saved_step = step
        self._attempt(lambda: self._saver.begin(step, state, self._metrics), last=last)
        if last or not self.config.checkpoint.background:
            self._attempt(self._saver.wait, last=last)

    def _attempt(self, action: Callable[[], Saved | None], last: bool = False) -> None:
        """Do a part of saving; what goes wrong ends the run, or is reported, as configured."""
        try:
            saved = action()
        except CheckpointError as error:
            if last or self.config.checkpoint.on_error == "stop":
                raise
            self._failed_saves += 1
            say(
                f"{self.name}: warning: {error}; going on without it (checkpoint.on_error = continue,"
                f" failure {self._failed_saves} of this run)"
            )
            return
        if saved is not None:
            self._stall_s += saved.stall_s

    def close(self) -> None:
        """Save at the end if so configured, and wait for what is still being written."""
        num_steps = self.config.train.num_steps
        if self.config.checkpoint.save_final:
            self.save(max(num_steps, self.start_step), last=True)
        elif self._saver.pending:
            self._attempt(self._saver.wait, last=True)
        self._saver.close()


@contextmanager
def open_loop(
    config: SFTConfig | RLConfig, run_dir: Path, engine: Engine, tokenizer: Tokenizer, name: str
) -> Iterator[TrainingLoop]:
    """A restored `TrainingLoop` with its progress bar, sinks and signal handlers; saves at the end if so
    configured."""
    clock = StepClock(engine)  # before the weights are loaded: what precedes the first step is its "start"
    state, num_steps = restore(config, run_dir, engine, name), config.train.num_steps
    every = max(config.log.every, math.ceil(num_steps / PLAIN_LINES))
    if state.step >= num_steps:
        say(f"{name}: {run_dir} has done all {num_steps} steps; nothing to do (train.num_steps)")
    with (
        MetricsLogger(run_dir, config.log, state.step) as logger,
        Progress(name, num_steps, state.step, every) as progress,
        stop_flag() as stop,
        watch(run_dir, engine.layout.rank, engine.layout.world_size, config.parallel.timeout_s),
    ):
        loop = TrainingLoop(
            config,
            run_dir,
            engine,
            tokenizer,
            name,
            state=state,
            logger=logger,
            progress=progress,
            stop=stop,
            clock=clock,
        )
        yield loop
        loop.close()
