"""Builds each step's training batch: sample, verify and reward, compute advantages.

A group whose rewards are all equal has no advantages. With `rollout.max_prompt_batches` above 1 (DAPO's
dynamic sampling, arXiv 2503.14476) more prompt batches are sampled until `prompts_per_step` groups have some;
the others are logged and not trained on. Batches are numbered through the run, and (run seed, batch, prompt,
sample) names the random stream of a sample, so the number of the next batch is all that a checkpoint has to
remember. When a batch is sampled, and with weights of which age, is the concern of `rl.queue`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi4r.configs.sections import ObjectiveConfig, RewardConfig
from phi4r.configs.stages import RLConfig
from phi4r.core.problem import Problem
from phi4r.core.seeds import Stream
from phi4r.data.tokenizer import Tokenizer
from phi4r.parallel.layout import broadcast_object
from phi4r.rewards.function import GradedResponse, reward_of
from phi4r.rewards.length_aware import RewardParts
from phi4r.rl.advantages import Advantages, advantages_of
from phi4r.rl.queue import PromptQueue, open_order
from phi4r.sampling.types import Completion, RolloutEngine, Sample, SampleRequest, Span, to_samples
from phi4r.tasks import grade_responses
from phi4r.verify.audit import audit_counts
from phi4r.verify.extract import think_block_is_valid
from phi4r.verify.judge import judge_counts
from phi4r.verify.pool import VerifierPool
from phi4r.verify.strict import Verdict


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A sample after verification, reward and advantage (that of its group)."""

    sample: Sample
    problem: Problem
    verdict: Verdict
    reward: RewardParts
    advantage: float

    def record(self, step: int, tokenizer: Tokenizer) -> dict[str, Any]:
        """One line of a rollout file (`rl.rollout_log`): plain JSON values."""
        sample, reward = self.sample, self.reward.as_dict()
        return {
            "step": step,
            "prompt_index": sample.prompt_index,
            "sample_index": sample.sample_index,
            "problem_id": self.problem.id,
            "prompt": tokenizer.decode(sample.prompt_tokens.tolist()),
            "text": sample.text,
            "tokens": sample.tokens.tolist(),
            "num_tokens": sample.num_tokens,
            "finished": sample.finished,
            "policy_version": sample.policy_version,
            "version_spans": [list(span) for span in sample.version_spans],
            "outcome": self.verdict.outcome,
            "answer": self.verdict.answer or "",
            "gold": self.problem.answer,
            "reward": reward.pop("total"),
            "reward_parts": reward,
            "advantage": self.advantage,
            "rollout_logprob_mean": float(np.mean(sample.logprobs)) if sample.num_tokens else 0.0,
        }


@dataclass(frozen=True)
class StepSamples:
    """`trajectories`: all that were sampled, batch after batch, prompts numbered through them; `groups`:
    their report, [P, G]; `used`: those to train on; `sampling`: from when to when (`time.perf_counter`)
    engines sampled, waited for or not, on rank 0; nothing for what an earlier start of the run had
    sampled."""

    trajectories: list[Trajectory]
    groups: Advantages
    used: list[Trajectory]
    num_batches: int
    sampling: list[Span]

    def metrics(self, step: int) -> dict[str, Any]:
        """Of everything that was sampled; the number of groups that are trained on; max and mean policy lag,
        in optimizer steps."""
        spans = [span for t in self.trajectories for span in t.sample.version_spans]
        num_tokens = sum(count for _, count in spans)
        return rollout_metrics(self.trajectories, self.groups) | {
            "prompt_batches": self.num_batches,
            "used_groups": len(self.used) // self.groups.advantages.shape[1],
            "policy_lag": max(step - version for version, _ in spans),
            "mean_policy_lag": sum((step - version) * count for version, count in spans) / num_tokens,
            "sampling_seconds": sum(end - start for start, end in self.sampling),
        }


class Collector:
    """The samples of each step. All ranks call, with the same arguments.

    next_batch: the first prompt batch that was not trained on yet; order_state: what the order of prompts
    depends on (`rl.curriculum`); the run remembers both. step: steps done.
    """

    def __init__(
        self,
        cfg: RLConfig,
        engine: RolloutEngine,
        verifier: VerifierPool,
        tokenizer: Tokenizer,
        problems: Sequence[Problem],
        prompts: Sequence[tuple[int, ...]],
        run_dir: Path,
        next_batch: int,
        order_state: dict[str, Any] | None = None,
        step: int = 0,
    ) -> None:
        self.cfg, self.engine, self.verifier, self.tokenizer = cfg, engine, verifier, tokenizer
        self.problems, self.prompts, self.next_batch = problems, prompts, next_batch
        self.reward = cfg.reward.resolved(cfg.sampling.max_new_tokens)
        self.order = open_order(cfg.rollout, cfg.seed, problems, next_batch, order_state)
        self.queue = PromptQueue(cfg, engine, self._requests, run_dir, next_batch, step)

    def _requests(self, number: int) -> list[SampleRequest]:
        return [
            SampleRequest(self.prompts[item], (self.cfg.seed, Stream.SAMPLES, number, index, sample))
            for index, item in enumerate(self.order.items(number))
            for sample in range(self.cfg.rollout.group_size)
        ]

    def collect(self, step: int) -> StepSamples:
        """The samples of the next prompt batches for `step` (counted from 0), until enough groups are
        informative or there are `rollout.max_prompt_batches`. Without a single informative group the first
        batch is used."""
        rollout = self.cfg.rollout
        per_batch, trajectories, reports = rollout.prompts_per_step, list[Trajectory](), list[Advantages]()
        sampling = list[Span]()
        while True:
            completions, spans = self.queue.take(self.next_batch, step)
            oldest = min(completion.version for completion in completions)
            assert step - oldest <= self.queue.lag, f"batch {self.next_batch} is of step {oldest}"
            found, groups = self._graded(completions, len(reports) * per_batch)
            trajectories += found
            reports.append(groups)
            sampling += spans
            self.next_batch += 1
            num_informative = sum(int(report.informative.sum()) for report in reports)
            if num_informative >= per_batch or len(reports) == rollout.max_prompt_batches:
                break
        groups = Advantages(
            np.concatenate([report.advantages for report in reports]),
            np.concatenate([report.informative for report in reports]),
        )
        chosen = set(range(per_batch))
        if rollout.max_prompt_batches > 1 and groups.informative.any():
            chosen = set(np.flatnonzero(groups.informative)[:per_batch].tolist())
        used = [t for t in trajectories if t.sample.prompt_index in chosen]
        self.queue.after_collect(self.next_batch, step)
        return StepSamples(trajectories, groups, used, len(reports), sampling)

    def _graded(
        self, completions: Sequence[Completion], first_prompt: int
    ) -> tuple[list[Trajectory], Advantages]:
        """The next batch as `group_size` verified and rewarded samples per problem, prompts numbered from
        `first_prompt`. Rank 0 verifies; every rank gets the same trajectories."""
        cfg, items = self.cfg, self.order.items(self.next_batch)
        problems = [self.problems[item] for item in items]
        prompts = [self.prompts[item] for item in items]
        samples = to_samples(completions, prompts, cfg.rollout.group_size, self.tokenizer)
        graded = None
        if self.engine.layout.is_main:
            graded = grade(samples, problems, self.reward, self.verifier)
        verdicts, rewards = broadcast_object(graded)
        right = np.array([v.correct for v in verdicts]).reshape(len(items), -1).sum(1)
        self.order.record(self.next_batch, right.tolist(), cfg.rollout.group_size)
        found, groups = to_trajectories(
            samples, problems, verdicts, rewards, cfg.rollout.group_size, cfg.objective
        )
        return [_renumbered(trajectory, first_prompt) for trajectory in found], groups


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
    if checked := [verdict for verdict in verdicts if verdict.second]:
        metrics |= audit_counts(checked)
    if asked := [verdict for verdict in verdicts if verdict.method.startswith("judge")]:
        metrics |= judge_counts(asked)
    for name, chosen in (("response_length_correct", correct), ("response_length_wrong", ~correct)):
        if chosen.any():
            metrics[name] = float(lengths[chosen].mean())
    return metrics


def grade(
    samples: Sequence[Sample], problems: Sequence[Problem], settings: RewardConfig, pool: VerifierPool
) -> tuple[list[Verdict], list[RewardParts]]:
    """Verdict and reward of each sample; `problems[sample.prompt_index]` is its problem, `settings` is
    resolved."""
    pairs = [(problems[s.prompt_index], s.text) for s in samples]
    verdicts = grade_responses(pairs, pool, settings, [s.finished for s in samples])
    graded = [
        GradedResponse(
            problem=problem,
            text=sample.text,
            tokens=sample.tokens,
            finished=sample.finished,
            think_valid=think_block_is_valid(sample.text),
            verdict=verdict,
        )
        for sample, (problem, _), verdict in zip(samples, pairs, verdicts, strict=True)
    ]
    return verdicts, [reward_of(response, settings) for response in graded]


def to_trajectories(
    samples: Sequence[Sample],
    problems: Sequence[Problem],
    verdicts: Sequence[Verdict],
    rewards: Sequence[RewardParts],
    group_size: int,
    objective: ObjectiveConfig,
) -> tuple[list[Trajectory], Advantages]:
    """Trajectories with their group's advantages, and the groups' report."""
    totals = np.array([reward.total for reward in rewards]).reshape(-1, group_size)
    lengths = np.array([sample.num_tokens for sample in samples]).reshape(-1, group_size)
    groups = advantages_of(totals, lengths, objective)
    trajectories = [
        Trajectory(
            sample=sample,
            problem=problems[sample.prompt_index],
            verdict=verdict,
            reward=reward,
            advantage=float(advantage),
        )
        for sample, verdict, reward, advantage in zip(
            samples, verdicts, rewards, groups.advantages.ravel(), strict=True
        )
    ]
    return trajectories, groups
