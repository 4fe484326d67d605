"""Requests, completions and the interfaces of the engines that answer them. No torch.

A request is a prompt in tokens and the counters that seed its random stream. An engine answers requests in
batches (`PromptBatch`), which stay open over updates of the weights: an unfinished answer (a partial rollout)
is resumed from its tokens so far, and every token carries the version of the weights that sampled it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from phi4r.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from phi4r.parallel.layout import Layout


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn. temperature 0 takes the likeliest token; top_p and top_k filter (never in RL: a
    filtered sampler is not the policy). Log-probs are those of the unfiltered distribution at this
    temperature."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class SampleRequest:
    """A prompt and the counters, such as (run seed, stream, step, prompt, sample), that fix its random
    stream. messages: (role, content) of a prompt that the server renders (engine "openai"), which then has no
    tokens."""

    prompt_tokens: tuple[int, ...]
    key: tuple[int, ...]
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Completion:
    """tokens: sampled ids, the end token included where one came; logprobs: float32 [len(tokens)], natural
    log, each under the weights that sampled its token; finished: an end token came; spans: (version, number
    of tokens) of the weights behind the tokens, in order. A version counts optimizer steps. An unfinished
    completion of fewer than max_new_tokens is a partial rollout.

    A filtered answer of a vLLM server has no log-probs: the server's are the filtered distribution's. An
    answer of a server that gives text only has `text`, no tokens, and their number in `spans`."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    spans: list[tuple[int, int]] = field(default_factory=list)
    text: str | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Completion:
        """Back from JSON; other fields of the row are ignored."""
        spans = [(version, count) for version, count in row["spans"]]
        return cls(row["tokens"], row["logprobs"], row["finished"], spans, row.get("text"))

    def to_row(self) -> dict[str, Any]:
        """As JSON; `text` only where there is one."""
        row = dict(vars(self))
        if self.text is None:
            del row["text"]
        return row

    @property
    def num_tokens(self) -> int:
        """Sampled so far."""
        return len(self.tokens) or sum(count for _, count in self.spans)

    @property
    def version(self) -> int:
        """Of the oldest weights behind a token."""
        return min((version for version, _ in self.spans), default=0)

    def is_complete(self, options: SamplingOptions) -> bool:
        """Whether nothing can follow."""
        return self.finished or self.num_tokens >= options.max_new_tokens

    def followed_by(self, more: Completion) -> Completion:
        """This partial rollout and what was sampled after it."""
        assert not self.finished
        spans = [*self.spans]
        for version, count in more.spans:
            if spans and spans[-1][0] == version:
                count += spans.pop()[1]
            spans.append((version, count))
        return Completion(
            [*self.tokens, *more.tokens], [*self.logprobs, *more.logprobs], more.finished, spans
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sampled response with its text. Prompts are numbered within their step, samples within their
    prompt.

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
class Response:
    """One answer as a grader sees it: the text (end token not included), its length in tokens, and whether it
    ended before the limit."""

    prompt_index: int
    sample_index: int
    text: str
    num_tokens: int
    finished: bool


def to_responses(
    completions: Sequence[Completion], group_size: int, tokenizer: Tokenizer | None
) -> list[Response]:
    """Completions in prompt-major order, `group_size` of each prompt, as responses. tokenizer: None where all
    are texts."""
    found = []
    for index, completion in enumerate(completions):
        prompt_index, sample_index = divmod(index, group_size)
        text = completion.text
        if text is None:
            assert tokenizer is not None
            text = tokenizer.decode(completion.tokens[:-1] if completion.finished else completion.tokens)
        found.append(
            Response(
                prompt_index=prompt_index,
                sample_index=sample_index,
                text=text,
                num_tokens=completion.num_tokens,
                finished=completion.finished,
            )
        )
    return found


def to_samples(
    completions: Sequence[Completion], prompts: Sequence[Sequence[int]], group_size: int, tokenizer: Tokenizer
) -> list[Sample]:
    """Completions in prompt-major order as samples with decoded text (the end token is not part of the
    text)."""
    return [
        Sample(
            prompt_index=response.prompt_index,
            sample_index=response.sample_index,
            prompt_tokens=np.asarray(prompts[response.prompt_index], dtype=np.int32),
            tokens=np.asarray(completion.tokens, dtype=np.int32),
            logprobs=np.asarray(completion.logprobs, dtype=np.float32),
            finished=response.finished,
            text=response.text,
            version_spans=tuple(completion.spans),
        )
        for completion, response in zip(
            completions, to_responses(completions, group_size, tokenizer), strict=True
        )
    ]


@dataclass
class PromptBatch:
    """Requests that are sampled over one or more versions of the weights; `answers`: the completion of each
    so far, in order."""

    requests: Sequence[SampleRequest]
    options: SamplingOptions
    answers: list[Completion]

    @property
    def is_complete(self) -> bool:
        """Whether every answer is."""
        return all(answer.is_complete(self.options) for answer in self.answers)


Span = tuple[float, float]
"""From when to when something was sampled, by `time.perf_counter`."""

OnAnswer = Callable[[int, Completion, str], None]
"""Called with a request's number, its complete answer and the name of what sampled it, as soon as it is
there, on the rank that has it and perhaps in another thread."""


class RolloutEngine(Protocol):
    """An engine whose weights follow a trainer's. All ranks call, with the same arguments."""

    is_concurrent: bool
    """Whether it samples while the trainer does other things; if not, it does so in `finish`."""

    @property
    def layout(self) -> Layout:
        """This rank's place."""

    def sync(self, version: int) -> dict[str, float]:
        """Sample from now on with the trainer's weights as they are, after `version` optimizer steps; returns
        metrics."""

    def open(
        self,
        number: int,
        requests: Sequence[SampleRequest],
        options: SamplingOptions,
        begun: Sequence[Completion],
    ) -> None:
        """Sample a batch from now on, over every `sync`, until `finish`; batches of lower numbers come first.
        begun: the partial rollouts to resume, one per request."""

    def finish(self, number: int) -> list[Completion]:
        """Wait for the complete answers of an open batch; on every rank."""

    def unfinished(self) -> dict[int, list[Completion]]:
        """The answers so far of every open batch, on rank 0: complete ones, and of the others at least the
        tokens that they had at the last `sync`."""

    def take_busy(self) -> list[Span]:
        """When, since the last call, batches were sampled; on rank 0."""


class Sampler(Protocol):
    """An engine of fixed weights. All ranks call, with the same arguments."""

    def generate(
        self, requests: Sequence[SampleRequest], options: SamplingOptions, on_answer: OnAnswer
    ) -> list[Completion]:
        """The answers to all requests, in order, on every rank; each goes to `on_answer` as it arrives."""
