"""The samples of a step: draw prompts, roll out, verify, reward, advantages; again where groups say nothing.

A group whose rewards are all equal has no advantages. With `rollout.max_draws` above 1 (DAPO's dynamic
sampling, arXiv 2503.14476) more prompts are drawn until `prompts_per_step` groups have some; the others are
logged and not trained on. Draws are numbered through the run, and (run seed, draw, prompt, sample) names the
random stream of a sample, so the number of the next draw is all that a checkpoint has to remember.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phi4r.configs.stages import RLConfig
from phi4r.data.order import items_of_step
from phi4r.data.records import Problem
from phi4r.data.tokenizer import Tokenizer
from phi4r.parallel.layout import broadcast_object
from phi4r.rl.advantages import Advantages
from phi4r.rl.grade import grade, to_samples, to_trajectories
from phi4r.rl.rollout import RolloutEngine, SampleRequest, SamplingOptions
from phi4r.rl.types import Trajectory
from phi4r.verify.pool import VerifierPool

# Separate the uses of a run's seed: drawing prompts, sampling.
PROMPT_STREAM, SAMPLE_STREAM = 21, 22


@dataclass(frozen=True)
class StepSamples:
    """`trajectories`: all that were sampled, draw after draw, prompts numbered through them; `groups`: their
    report, [P, G]; `used`: those to train on."""

    trajectories: list[Trajectory]
    groups: Advantages
    used: list[Trajectory]
    num_draws: int

    def metrics(self) -> dict[str, Any]:
        """Of everything that was sampled, and the number of groups that are trained on."""
        used_groups = len(self.used) // self.groups.advantages.shape[1]
        found = rollout_metrics(self.trajectories, self.groups)
        return found | {"draws": self.num_draws, "used_groups": used_groups}


def collect(
    cfg: RLConfig,
    sampler: RolloutEngine,
    verifier: VerifierPool,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    prompts: Sequence[tuple[int, ...]],
    first_draw: int,
) -> StepSamples:
    """The samples of the draws from `first_draw` on, until enough groups are informative or
    `rollout.max_draws` are done. Without a single informative group the first draw is what there is."""
    per_draw, trajectories, reports = cfg.rollout.prompts_per_step, list[Trajectory](), list[Advantages]()
    for number in range(cfg.rollout.max_draws):
        draw = first_draw + number
        drawn = items_of_step(len(problems), cfg.seed, PROMPT_STREAM, draw, per_draw)
        found, groups = roll_out(
            cfg, sampler, verifier, tokenizer, [problems[i] for i in drawn], [prompts[i] for i in drawn], draw
        )
        trajectories += [_renumbered(trajectory, number * per_draw) for trajectory in found]
        reports.append(groups)
        if sum(int(report.informative.sum()) for report in reports) >= per_draw:
            break
    groups = Advantages(
        np.concatenate([report.advantages for report in reports]),
        np.concatenate([report.informative for report in reports]),
    )
    chosen = set(range(per_draw))
    if cfg.rollout.max_draws > 1 and groups.informative.any():
        chosen = set(np.flatnonzero(groups.informative)[:per_draw].tolist())
    used = [t for t in trajectories if t.sample.prompt_index in chosen]
    return StepSamples(trajectories, groups, used, len(reports))


def _renumbered(trajectory: Trajectory, first_prompt: int) -> Trajectory:
    """Its prompt's number counted from `first_prompt`."""
    sample = trajectory.sample
    moved = dataclasses.replace(sample, prompt_index=first_prompt + sample.prompt_index)
    return dataclasses.replace(trajectory, sample=moved)


def roll_out(
    cfg: RLConfig,
    sampler: RolloutEngine,
    verifier: VerifierPool,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    prompts: Sequence[tuple[int, ...]],
    draw: int,
) -> tuple[list[Trajectory], Advantages]:
    """`group_size` verified and rewarded samples per problem. Rank 0 verifies; every rank gets the same
    trajectories."""
    size = cfg.rollout.group_size
    requests = [
        SampleRequest(prompt, (cfg.seed, SAMPLE_STREAM, draw, index, sample))
        for index, prompt in enumerate(prompts)
        for sample in range(size)
    ]
    options = SamplingOptions(cfg.rollout.max_new_tokens, cfg.rollout.temperature)
    samples = to_samples(sampler.generate(requests, options), prompts, size, tokenizer)
    graded = None
    if sampler.layout.is_main:
        graded = grade(samples, problems, cfg.reward.resolved(cfg.rollout.max_new_tokens), verifier)
    verdicts, rewards = broadcast_object(graded)
    return to_trajectories(samples, problems, verdicts, rewards, size, cfg.objective)


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
    for name, chosen in (("response_length_correct", correct), ("response_length_wrong", ~correct)):
        if chosen.any():
            metrics[name] = float(lengths[chosen].mean())
    return metrics
