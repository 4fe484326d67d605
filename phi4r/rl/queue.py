"""The queue of prompt batches: which are sampled when, and what of them survives a kill (`rollout.mode`).

    sync         a batch is sampled with the weights of the step that trains on it
    one_step     the next batch is sampled while this step trains, with weights one step older
    continuous   up to rollout.max_policy_lag batches beyond the needed one are in flight, so that the longest
                 answer of a batch never idles the engine; new weights interrupt partial rollouts, which are
                 resumed from their tokens so far; every token has its version and its log-prob under it

Batches are numbered through the run and trained on complete, in the order of their numbers, whatever the
mode. How long an answer takes therefore never decides whether or when it is trained on, and nothing is biased
towards short answers. (Training on what is finished first would be: the first n answers to end of a larger
number are the short ones.) No token's policy lag exceeds `rollout.policy_lag`.

Unless the mode is sync, RUN/queue/step_000012.jsonl holds the batches in flight as the checkpoint after 12
steps needs them: complete answers and partial rollouts, a line per request in order. Whatever checkpoint a
run restarts from, it finds its batches: no prompt is lost and none is sampled twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from phi4r.configs.sections import RolloutConfig
from phi4r.configs.stages import RLConfig
from phi4r.core.console import say
from phi4r.core.io import JsonlWriter, read_jsonl
from phi4r.core.problem import Problem
from phi4r.core.seeds import Stream, items_of_step
from phi4r.parallel.layout import broadcast_object
from phi4r.rl.curriculum import PassRateOrder
from phi4r.sampling.types import Completion, RolloutEngine, SampleRequest, SamplingOptions, Span
from phi4r.train.folders import all_steps

Requests = Callable[[int], Sequence[SampleRequest]]
"""The requests of a prompt batch."""


class PromptQueue:
    """The batches from number `next_batch` on, after `step` optimizer steps. All ranks call, with the same
    arguments."""

    def __init__(
        self,
        cfg: RLConfig,
        engine: RolloutEngine,
        requests: Requests,
        run_dir: Path,
        next_batch: int,
        step: int,
    ) -> None:
        self.cfg, self.engine, self.requests, self.run_dir = cfg, engine, requests, run_dir
        self.options = SamplingOptions(cfg.sampling.max_new_tokens, cfg.sampling.temperature)
        self.mode, self.lag = cfg.rollout.mode, cfg.rollout.policy_lag
        self.files = QueueFiles(run_dir)
        self.step, self.next_open = step, next_batch
        self.ready: dict[int, list[Completion]] = {}
        """Batches that are complete and not taken yet."""
        found = broadcast_object(self.files.take(step) if self._saves and engine.layout.is_main else None)
        self.begun: dict[int, list[Completion]] = {
            number: answers
            for number, answers in (found or {}).items()
            if number >= next_batch and self._is_fresh(answers, step + number - next_batch)
        }
        if self.begun:
            say(f"rl: reusing prompt batches {min(self.begun)} to {max(self.begun)} of {self.files.path}")

    @property
    def _saves(self) -> bool:
        return self.mode != "sync"

    def _is_fresh(self, answers: Sequence[Completion], last_step: int) -> bool:
        """Whether no token lags too far at `last_step`, the last that may train on them: not so where the
        limit was lowered."""
        oldest = min((answer.version for answer in answers if answer.spans), default=last_step)
        return last_step - oldest <= self.lag

    def before_sync(self) -> None:
        """Wait for in-flight rollouts before updating weights; in mode continuous the update interrupts
        them."""
        if self.mode == "one_step":
            self._finish_open()

    def take(self, number: int, step: int) -> tuple[list[Completion], list[Span]]:
        """The complete answers of a batch, for `step` (counted from 0), and when the engine was busy since
        the last call, on rank 0. Numbers ascend."""
        steps_left = self.cfg.train.num_steps - 1 - step
        ahead = min(self.lag, steps_left) if self.mode == "continuous" else 0
        self._open_through(number + ahead)
        answers = self.ready.pop(number, None)
        return answers or self.engine.finish(number), self.engine.take_busy()

    def after_collect(self, next_number: int, step: int) -> None:
        """`step` has its samples and is about to be trained on; the next step begins with `next_number`."""
        if not self._saves:
            return
        if self.mode == "one_step" and step + 1 < self.cfg.train.num_steps:
            self._open_through(next_number)
        self.step = step + 1
        if self.mode == "one_step" and not self.engine.is_concurrent:
            self._finish_open()  # it cannot sample while it trains
        else:
            self._save()

    def _open_through(self, last: int) -> None:
        while self.next_open <= last:
            requests = self.requests(self.next_open)
            begun = self.begun.pop(self.next_open, [])
            if len(begun) != len(requests):  # none, or sampled under other settings
                begun = [Completion()] * len(requests)
            self.engine.open(self.next_open, requests, self.options, begun)
            self.next_open += 1

    def _finish_open(self) -> None:
        """Complete what is in flight."""
        numbers = sorted(broadcast_object(list(self.engine.unfinished())))
        for number in numbers:
            self.ready[number] = self.engine.finish(number)
        if numbers:
            self._save()

    def _save(self) -> None:
        if self.engine.layout.is_main:
            self.files.put(self.step, self.begun | self.ready | self.engine.unfinished())
            self.files.forget(self.step - 1, all_steps(self.run_dir), self.cfg.checkpoint.every)


class QueueFiles:
    """RUN/queue, on rank 0."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "queue"

    def _files(self) -> dict[int, Path]:
        found = ((re.fullmatch(r"step_(\d{6,})\.jsonl", path.name), path) for path in self.path.glob("*"))
        return {int(match[1]): path for match, path in found if match}

    def put(self, step: int, batches: Mapping[int, Sequence[Completion]]) -> None:
        """Save the batches in flight after `step` steps; the file appears whole."""
        with JsonlWriter(self.path / f"step_{step:06d}.jsonl") as writer:
            for number, completions in sorted(batches.items()):
                for completion in completions:
                    writer.write({"batch": number, **completion.to_row()})

    def take(self, step: int) -> dict[int, list[Completion]]:
        """The batches saved after `step` steps, or last before; files newer than the restored checkpoint are
        deleted."""
        files = self._files()
        for number, path in files.items():
            if number > step:
                path.unlink()
        newest = max((number for number in files if number <= step), default=None)
        found: dict[int, list[Completion]] = {}
        for _, row in read_jsonl(files[newest]) if newest is not None else ():
            found.setdefault(row.pop("batch"), []).append(Completion.from_row(row))
        return found

    def forget(self, step: int, checkpoints: Collection[int], every: int) -> None:
        """Delete files before `step` that no checkpoint needs: neither those that exist nor those that are
        still being written in the background (one each `every` steps)."""
        newest = max(checkpoints, default=-1)
        for number, path in self._files().items():
            may_come = number > newest and every > 0 and number % every == 0
            if number < step and number not in checkpoints and not may_come:
                path.unlink()


# --- which problems a batch gets


class PromptOrder(Protocol):
    """Which problems a batch gets. The same calls give the same answers on every rank."""

    def items(self, batch: int) -> list[int]:
        """Problems of a batch; batches are opened in order, and may be asked for again until recorded."""

    def record(self, batch: int, right: Sequence[int], samples: int) -> None:
        """The results of a batch: right samples of each of its problems, of `samples` each."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to remember, plain JSON."""


class EpochOrder:
    """Every problem once an epoch; nothing to remember."""

    def __init__(self, num_items: int, seed: int, per_batch: int) -> None:
        self.num_items, self.seed, self.per_batch = num_items, seed, per_batch

    def items(self, batch: int) -> list[int]:
        """The permutations of the epochs, one after another, cut into batches."""
        return items_of_step(self.num_items, self.seed, Stream.PROMPTS, batch, self.per_batch)

    def record(self, batch: int, right: Sequence[int], samples: int) -> None:
        """Changes nothing."""

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def open_order(
    rollout: RolloutConfig,
    seed: int,
    problems: Sequence[Problem],
    first_batch: int,
    state: Mapping[str, Any] | None = None,
) -> PromptOrder:
    """The order of a run's prompts from batch `first_batch` on. `state`: what its checkpoint remembers, if it
    has one."""
    if rollout.curriculum == "none":
        return EpochOrder(len(problems), seed, rollout.prompts_per_step)
    rates = ((item, problem.meta.get("pass_rate")) for item, problem in enumerate(problems))
    known = {item: float(rate) for item, rate in rates if isinstance(rate, int | float)}
    return PassRateOrder(len(problems), seed, rollout, known, first_batch, state)
