"""From completions to trajectories: decode, verify, reward, advantages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phi4r.configs.sections import ObjectiveConfig, RewardConfig
from phi4r.core.problem import Problem
from phi4r.data.tokenizer import Tokenizer
from phi4r.rewards.length_aware import RewardParts, compute_reward
from phi4r.rl.advantages import Advantages, filtered_advantages, group_advantages, kept_by_filter
from phi4r.rl.types import Sample, Trajectory
from phi4r.sampling.embedded import Completion
from phi4r.tasks import grade_responses
from phi4r.verify.extract import think_block_is_valid
from phi4r.verify.pool import VerifierPool
from phi4r.verify.strict import Verdict


def to_samples(
    completions: Sequence[Completion], prompts: Sequence[Sequence[int]], group_size: int, tokenizer: Tokenizer
) -> list[Sample]:
    """Completions in prompt-major order as samples with decoded text (the end token is not part of the
    text)."""
    samples = []
    for index, completion in enumerate(completions):
        prompt_index, sample_index = divmod(index, group_size)
        text_tokens = completion.tokens[:-1] if completion.finished else completion.tokens
        samples.append(
            Sample(
                prompt_index=prompt_index,
                sample_index=sample_index,
                prompt_tokens=np.asarray(prompts[prompt_index], dtype=np.int32),
                tokens=np.asarray(completion.tokens, dtype=np.int32),
                logprobs=np.asarray(completion.logprobs, dtype=np.float32),
                finished=completion.finished,
                text=tokenizer.decode(text_tokens),
                version_spans=tuple(completion.spans),
            )
        )
    return samples


def grade(
    samples: Sequence[Sample], problems: Sequence[Problem], settings: RewardConfig, pool: VerifierPool
) -> tuple[list[Verdict], list[RewardParts]]:
    """Verdict and reward of each sample; `problems[sample.prompt_index]` is its problem, `settings` is
    resolved."""
    pairs = [(problems[s.prompt_index], s.text) for s in samples]
    verdicts = grade_responses(pairs, pool, settings, [s.finished for s in samples])
    rewards = [
        compute_reward(
            correct=verdict.correct,
            think_valid=think_block_is_valid(sample.text),
            finished=sample.finished,
            tokens=sample.tokens,
            settings=settings,
        )
        for sample, verdict in zip(samples, verdicts, strict=True)
    ]
    return verdicts, rewards


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
    if objective.group_keep:
        lengths = np.array([sample.num_tokens for sample in samples]).reshape(-1, group_size)
        kept = kept_by_filter(totals, lengths, objective.group_keep, objective.group_filter)
        groups = filtered_advantages(totals, kept, objective.advantage_norm)
    else:
        groups = group_advantages(totals, objective.advantage_norm)
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
