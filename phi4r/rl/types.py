"""What the GRPO loop passes around: samples from a rollout engine, and what became of them. numpy, no torch.

A `Sample` is what an engine returns; a `Trajectory` is the same sample after verification, reward and
advantages, and has everything a rollout file keeps. Prompts are numbered within their step, samples within
their prompt, so (run seed, step, prompt_index, sample_index) names the random stream of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from phi4r.core.problem import Problem
from phi4r.data.tokenizer import Tokenizer
from phi4r.rewards.length_aware import RewardParts
from phi4r.verify.strict import Verdict


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sampled response.

    `prompt_tokens` int32 [p] with the generation prompt; `tokens` int32 [n], the response with its EOS if
    it has one; `logprobs` float32 [n], the sampler's log-probability of each response token under the
    sampling distribution (before any top-p or top-k filter, at the rollout's temperature); `finished`: an
    EOS was sampled before the limit; `text`: the decoded response, think tags included, EOS not;
    `version_spans`: (policy version, number of tokens) of the weights behind its tokens, in order, a version
    counting optimizer steps.
    """

    prompt_index: int
    sample_index: int
    prompt_tokens: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    finished: bool
    text: str
    version_spans: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.logprobs), "every response token has a log-probability"

    @property
    def num_tokens(self) -> int:
        """Length of the response in tokens, the EOS included: L in the reward."""
        return len(self.tokens)

    @property
    def policy_version(self) -> int:
        """Of the oldest weights behind a token."""
        return min((version for version, _ in self.version_spans), default=0)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A sample that was verified and rewarded; `advantage` is that of its group."""

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
