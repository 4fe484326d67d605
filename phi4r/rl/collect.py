"""The samples of a step: draw prompts, roll out, verify, reward, advantages; again where groups say nothing.

A group whose rewards are all equal has no advantages. With `rollout.max_draws` above 1 (DAPO's dynamic
sampling, arXiv 2503.14476) more prompts are drawn until `prompts_per_step` groups have some; the others are
logged and not trained on. Draws are numbered through the run, and (run seed, draw, prompt, sample) names the
random stream of a sample, so the number of the next draw is all that a checkpoint has to remember.

How a draw is sampled, and with weights of which age, is `rl.draws`' concern.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi4r.configs.stages import RLConfig
from phi4r.core.problem import Problem
from phi4r.core.seeds import Stream
from phi4r.data.tokenizer import Tokenizer
from phi4r.parallel.layout import broadcast_object
from phi4r.rl.advantages import Advantages
from phi4r.rl.curriculum import open_draws
from phi4r.rl.draws import ContinuousDraws, DrawSampler, StepDraws
from phi4r.rl.grade import grade, to_samples, to_trajectories
from phi4r.rl.types import Trajectory
from phi4r.sampling.embedded import BusySpan, Completion, RolloutEngine, SampleRequest
from phi4r.verify.audit import audit_counts
from phi4r.verify.judge import judge_counts
from phi4r.verify.pool import VerifierPool


@dataclass(frozen=True)
class StepSamples:
    """`trajectories`: all that were sampled, draw after draw, prompts numbered through them; `groups`: their
    report, [P, G]; `used`: those to train on; `sampling`: from when to when (`time.perf_counter`) engines
    sampled, waited for or not, on rank 0; nothing for what an earlier start of the run had sampled."""

    trajectories: list[Trajectory]
    groups: Advantages
    used: list[Trajectory]
    num_draws: int
    sampling: list[BusySpan]

    def metrics(self, step: int) -> dict[str, Any]:
        """Of everything that was sampled, the number of groups that are trained on, and how many optimizer
        steps older than `step` the weights are that sampled a token: at most, and on average."""
        spans = [span for t in self.trajectories for span in t.sample.version_spans]
        num_tokens = sum(count for _, count in spans)
        return rollout_metrics(self.trajectories, self.groups) | {
            "draws": self.num_draws,
            "used_groups": len(self.used) // self.groups.advantages.shape[1],
            "staleness": max(step - version for version, _ in spans),
            "mean_staleness": sum((step - version) * count for version, count in spans) / num_tokens,
            "sampling_seconds": sum(end - start for start, end in self.sampling),
        }


class Collector:
    """Gives the loop the samples of each step. All ranks call, with the same arguments.

    next_draw: the first draw that was not trained on yet; draws_state: what their order depends on
    (`rl.curriculum`); the run remembers both. step: steps done.
    """

    def __init__(
        self,
        cfg: RLConfig,
        sampler: RolloutEngine,
        verifier: VerifierPool,
        tokenizer: Tokenizer,
        problems: Sequence[Problem],
        prompts: Sequence[tuple[int, ...]],
        run_dir: Path,
        next_draw: int,
        draws_state: dict[str, Any] | None = None,
        step: int = 0,
    ) -> None:
        self.cfg, self.sampler, self.verifier, self.tokenizer = cfg, sampler, verifier, tokenizer
        self.problems, self.prompts, self.next_draw = problems, prompts, next_draw
        self.draws = open_draws(cfg.rollout, cfg.seed, problems, next_draw, draws_state)
        self.sampled: DrawSampler
        if cfg.rollout.continuous:
            self.sampled = ContinuousDraws(cfg, sampler, self._requests, run_dir, next_draw, step)
        else:
            self.sampled = StepDraws(cfg, sampler, self._requests, run_dir, next_draw)

    def before_sync(self) -> None:
        """Wait for what must not see other weights."""
        self.sampled.before_sync()

    def _requests(self, number: int) -> list[SampleRequest]:
        return [
            SampleRequest(self.prompts[item], (self.cfg.seed, Stream.SAMPLES, number, index, sample))
            for index, item in enumerate(self.draws.items(number))
            for sample in range(self.cfg.rollout.group_size)
        ]

    def collect(self, step: int) -> StepSamples:
        """The samples of the next draws for `step` (counted from 0), until enough groups are informative or
        `rollout.max_draws` are done. Without a single informative group the first draw is what there is."""
        rollout = self.cfg.rollout
        per_draw, trajectories, reports = rollout.prompts_per_step, list[Trajectory](), list[Advantages]()
        sampling = list[BusySpan]()
        while True:
            completions, spans = self.sampled.take(self.next_draw, step)
            oldest = min(completion.version for completion in completions)
            assert step - oldest <= rollout.staleness, f"draw {self.next_draw} is of step {oldest}"
            found, groups = self._graded(completions)
            trajectories += [_renumbered(t, len(reports) * per_draw) for t in found]
            reports.append(groups)
            sampling += spans
            self.next_draw += 1
            num_informative = sum(int(report.informative.sum()) for report in reports)
            if num_informative >= per_draw or len(reports) == rollout.max_draws:
                break
        groups = Advantages(
            np.concatenate([report.advantages for report in reports]),
            np.concatenate([report.informative for report in reports]),
        )
        chosen = set(range(per_draw))
        if rollout.max_draws > 1 and groups.informative.any():
            chosen = set(np.flatnonzero(groups.informative)[:per_draw].tolist())
        used = [t for t in trajectories if t.sample.prompt_index in chosen]
        self.sampled.after_collect(self.next_draw, step)
        return StepSamples(trajectories, groups, used, len(reports), sampling)

    def _graded(self, completions: Sequence[Completion]) -> tuple[list[Trajectory], Advantages]:
        """The next draw as `group_size` verified and rewarded samples per problem. Rank 0 verifies; every
        rank gets the same trajectories."""
        cfg, items = self.cfg, self.draws.items(self.next_draw)
        problems = [self.problems[item] for item in items]
        prompts = [self.prompts[item] for item in items]
        samples = to_samples(completions, prompts, cfg.rollout.group_size, self.tokenizer)
        graded = None
        if self.sampler.layout.is_main:
            settings = cfg.reward.resolved(cfg.rollout.max_new_tokens)
            graded = grade(samples, problems, settings, self.verifier)
        verdicts, rewards = broadcast_object(graded)
        right = np.array([v.correct for v in verdicts]).reshape(len(items), -1).sum(1)
        self.draws.record(self.next_draw, right.tolist(), cfg.rollout.group_size)
        return to_trajectories(
            samples, problems, verdicts, rewards, cfg.rollout.group_size, cfg.objective
        )  # fmt: skip


def _renumbered(trajectory: Trajectory, first_prompt: int) -> Trajectory:
    """Its prompt's number counted from `first_prompt`."""
    sample = trajectory.sample
    moved = dataclasses.replace(sample, prompt_index=first_prompt + sample.prompt_index)
    return dataclasses.replace(trajectory, sample=moved)


def rollout_metrics(trajectories: Sequence[Trajectory], groups: Advantages) -> dict[str, Any]:
    """What the samples of a step say about the policy: rewards, outcomes and lengths."""
    lengths = np.array([t.sample.num_tokens for t in trajectories])
    correct = np.array([t.verdict.correct for t in trajectories])
    outcomes = [t.verdict.outcome for t in trajectories]
    metrics: dict[str, Any] = {
        "reward": float(np.mean([t.reward.total for t in trajectories])),
        "reward_accuracy": float(np.mean([t.reward.accuracy for t in trajectories])),
        "reward_repetition": float(np.mean([t.reward.repetition for t in trajectories])),
        "accuracy": float(correct.mean()),
        "response_length": float(lengths.mean()),
        "unfinished": float(np.mean([not t.sample.finished for t in trajectories])),
        "think_valid": float(np.mean([t.reward.think_valid for t in trajectories])),
        "zero_variance_share": 1.0 - groups.informative_share,
        "verifier_timeouts": outcomes.count("timeout"),
        "verifier_errors": outcomes.count("error"),
    }
    verdicts = [t.verdict for t in trajectories]
    metrics |= audit_counts(verdicts) | judge_counts(verdicts)
    for name, chosen in (("response_length_correct", correct), ("response_length_wrong", ~correct)):
        if chosen.any():
            metrics[name] = float(lengths[chosen].mean())
    return metrics
