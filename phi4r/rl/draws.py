"""Where the completions of a draw come from: sampled when they are needed, one draw ahead, or continuously.

Draws are numbered through the run, and they are trained on whole and in the order of their numbers, whatever
the way in which they are sampled. How long an answer takes therefore never decides whether or when it is
trained on, and nothing is biased towards short answers. (Training on what is finished first would be: the
first n answers to end of a larger number are the short ones.)

`StepDraws` (rollout.staleness 0 or 1) samples a draw with the weights of one step. `ContinuousDraws`
(rollout.continuous) keeps up to K = rollout.staleness draws beyond the needed one open, so that what samples
is never idle because of the longest answer of a draw; an update of the weights interrupts the unfinished
answers, which go on from their tokens so far, and every token has its version and its log-prob under it. A
draw is opened at most K steps before it is trained on: no token is staler than K.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from phi4r.configs.stages import RLConfig
from phi4r.core.console import say
from phi4r.parallel.layout import broadcast_object
from phi4r.rl.ahead import AheadFolder
from phi4r.sampling.embedded import (
    BusySpan,
    Completion,
    Pending,
    RolloutEngine,
    SampleRequest,
    SamplingOptions,
)
from phi4r.train.folders import all_steps

Requests = Callable[[int], Sequence[SampleRequest]]
"""The requests of a draw."""


class DrawSampler(Protocol):
    """All ranks call, with the same arguments."""

    def before_sync(self) -> None:
        """The engine is about to get new weights."""

    def take(self, number: int, step: int) -> tuple[list[Completion], list[BusySpan]]:
        """The completions of a draw for `step` (counted from 0), and when they were sampled or, where engines
        sample over several steps, when those did since the last call. Numbers ascend."""

    def after_collect(self, next_number: int, step: int) -> None:
        """`step` has its samples and is about to be trained on; the next step begins with `next_number`."""


class _Draw:
    """A draw that is being sampled, or is in RUN/ahead from an earlier start of the run."""

    def __init__(self) -> None:
        self.began = self.ended = time.perf_counter()
        self.pending: Pending | None = None
        self.found: list[Completion] | None = None

    def wait(self) -> list[Completion]:
        """Its completions, on every rank."""
        if self.found is None:
            assert self.pending is not None
            self.found = self.pending()
        return self.found


class StepDraws:
    """Each draw is sampled by the weights of one step: the step's own or, with rollout.staleness = 1, those
    of the step before, while that one trains.

    With staleness a draw's completions go to RUN/ahead as soon as they are there: a run that is killed goes
    on with them, neither losing nor repeating a prompt. next_number: the first draw not yet trained on.
    """

    def __init__(
        self, cfg: RLConfig, sampler: RolloutEngine, requests: Requests, run_dir: Path, next_number: int
    ) -> None:
        self.cfg, self.sampler, self.requests = cfg, sampler, requests
        self.folder = AheadFolder(run_dir)
        self.ahead: _Draw | None = None
        if cfg.rollout.staleness:
            found = broadcast_object(self.folder.take(next_number) if sampler.layout.is_main else None)
            if found is not None:
                say(f"rl: draw {next_number} was sampled ahead of the last checkpoint and is used")
                self.ahead = _Draw()
                self.ahead.found = found

    def before_sync(self) -> None:
        """See `DrawSampler`."""
        if self.ahead is not None:
            self.ahead.wait()

    def take(self, number: int, step: int) -> tuple[list[Completion], list[BusySpan]]:
        """See `DrawSampler`."""
        draw, self.ahead = self.ahead or self._begin(number), None
        return draw.wait(), [(draw.began, draw.ended)]

    def after_collect(self, next_number: int, step: int) -> None:
        """Start sampling the next draw with the weights of the last sync."""
        if not self.cfg.rollout.staleness or step + 1 >= self.cfg.train.num_steps:
            return
        self.ahead = self._begin(next_number, keep=True)
        if self.sampler.layout.is_main:
            # A run goes back to its newest checkpoint, or to the one before if that one is damaged.
            steps = 2 * self.cfg.checkpoint.every + 2
            self.folder.forget_before(next_number - steps * self.cfg.rollout.max_draws)

    def _begin(self, number: int, keep: bool = False) -> _Draw:
        draw = _Draw()

        def done(completions: list[Completion]) -> None:
            draw.ended = time.perf_counter()
            if keep:
                self.folder.put(number, completions)

        draw.pending = self.sampler.start(self.requests(number), sampling_options(self.cfg), done)
        return draw


class ContinuousDraws:
    """Up to rollout.staleness draws beyond the needed one are sampled at once, over updates of the weights.

    Before a step trains, what there is of the open draws goes to RUN/ahead under the number of the checkpoint
    that the step may end with: whatever checkpoint a run goes back to finds its beginnings of answers. step:
    steps done; next_number: the first draw not yet trained on.
    """

    def __init__(
        self,
        cfg: RLConfig,
        sampler: RolloutEngine,
        requests: Requests,
        run_dir: Path,
        next_number: int,
        step: int,
    ) -> None:
        self.cfg, self.sampler, self.requests, self.run_dir = cfg, sampler, requests, run_dir
        self.folder = AheadFolder(run_dir)
        self.next_open = next_number
        found = broadcast_object(self.folder.take_open(step) if sampler.layout.is_main else None)
        self.begun: dict[int, list[Completion]] = {
            number: answers
            for number, answers in found.items()
            if number >= next_number and self._is_fresh(answers, step + number - next_number)
        }
        if self.begun:
            say(f"rl: what there is of draws {min(self.begun)} to {max(self.begun)} in RUN/ahead is used")

    def _is_fresh(self, answers: Sequence[Completion], last_step: int) -> bool:
        """Whether no token is too old at `last_step`, the last that may train on them: not so where the
        limit was lowered."""
        oldest = min((answer.version for answer in answers if answer.spans), default=last_step)
        return last_step - oldest <= self.cfg.rollout.staleness

    def before_sync(self) -> None:
        """See `DrawSampler`; the sync itself interrupts what is sampled."""

    def take(self, number: int, step: int) -> tuple[list[Completion], list[BusySpan]]:
        """See `DrawSampler`."""
        rollout, options = self.cfg.rollout, sampling_options(self.cfg)
        steps_left = self.cfg.train.num_steps - 1 - step
        while self.next_open <= number + min(rollout.staleness, steps_left):
            requests = self.requests(self.next_open)
            begun = self.begun.pop(self.next_open, [Completion()] * len(requests))
            if len(begun) != len(requests):  # it was sampled under other settings
                begun = [Completion()] * len(requests)
            self.sampler.open(self.next_open, requests, options, begun)
            self.next_open += 1
        return self.sampler.finish(number), self.sampler.take_busy()

    def after_collect(self, next_number: int, step: int) -> None:
        """See `DrawSampler`."""
        if self.sampler.layout.is_main:
            self.folder.put_open(step + 1, self.begun | self.sampler.unfinished())
            self.folder.forget_open(step, all_steps(self.run_dir), self.cfg.checkpoint.every)


def sampling_options(cfg: RLConfig) -> SamplingOptions:
    """How the tokens of a run are drawn."""
    return SamplingOptions(cfg.rollout.max_new_tokens, cfg.rollout.temperature)
