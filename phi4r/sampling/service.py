"""Sampling from fixed weights, for evaluation, curation and generation: one interface over every engine.

    with open_service(...) as service:
        answers = service.answer(requests, "eval")

Answers come from the ledger where it has them, else from the engine, which is opened when the first one is
missing; each is filed as it arrives. So a stage that was killed asks only for what is missing, and one that
had finished starts neither a model nor a server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from phi4r.configs.sections import ParallelConfig, SamplingConfig, TokenizerConfig, VLLMConfig
from phi4r.core.console import Progress, say
from phi4r.core.problem import Message, Problem
from phi4r.data.render import conversation, render_prompt
from phi4r.data.tokenizer import Tokenizer
from phi4r.parallel.heartbeat import beat
from phi4r.parallel.layout import Layout, broadcast_object, init_layout
from phi4r.sampling.ledger import Ledger, digest, weights_digest
from phi4r.sampling.types import Completion, Sampler, SampleRequest, SamplingOptions
from phi4r.train.session import open_tokenizer

LINES = 20
"""Lines of progress where the output is not a terminal."""

OpenSampler = Callable[[int], AbstractContextManager[Sampler]]
"""Opens an engine for prompts and responses of at most so many tokens together."""


class SamplingService:
    """See the module. tokenizer: of the model; None where the server renders prompts itself."""

    def __init__(
        self,
        ledger: Ledger,
        open_sampler: OpenSampler,
        layout: Layout,
        tokenizer: Tokenizer | None,
        stack: ExitStack,
    ) -> None:
        self.ledger, self.options, self.layout, self.tokenizer = ledger, ledger.options, layout, tokenizer
        self._open_sampler, self._stack = open_sampler, stack
        self._sampler: Sampler | None = None

    def request(
        self, prompt: Problem | Sequence[Message], system: str, key: tuple[int, ...]
    ) -> SampleRequest:
        """A request for one answer to a problem or conversation. system: see `data.render`; key: counters
        that seed it."""
        if self.tokenizer is None:
            return SampleRequest((), key, tuple((m.role, m.content) for m in conversation(prompt, system)))
        return SampleRequest(tuple(render_prompt(self.tokenizer, prompt, system)), key)

    def answer(self, requests: Sequence[SampleRequest], title: str) -> list[Completion]:
        """The answers to all requests, in order, on rank 0 ([] on the others). Collective."""
        found = self.ledger.find(requests) if self.layout.is_main else {}
        missing: list[int] = broadcast_object([i for i in range(len(requests)) if i not in found])
        if len(missing) < len(requests):
            say(f"{title}: {len(requests) - len(missing):,} of {len(requests):,} answers are in the ledger")
        if missing:
            asked = [requests[index] for index in missing]
            found |= dict(zip(missing, self._sample(asked, title), strict=True))
        return [found[index] for index in range(len(requests))] if self.layout.is_main else []

    def _sample(self, requests: Sequence[SampleRequest], title: str) -> list[Completion]:
        """Answers from the engine, each filed as it arrives by the rank that has it."""
        if self._sampler is None:
            longest = max(len(request.prompt_tokens) for request in requests) + self.options.max_new_tokens
            self._sampler = self._stack.enter_context(self._open_sampler(longest))
        share = len(range(self.layout.replica, len(requests), self.layout.num_replicas))
        began, num_done, num_tokens = time.monotonic(), 0, 0
        with Progress(title, share, every=max(1, share // LINES)) as progress:

            def on_answer(index: int, answer: Completion, server: str) -> None:
                nonlocal num_done, num_tokens
                seconds = time.monotonic() - began
                self.ledger.append(requests[index], answer, server, seconds)
                beat()
                num_done, num_tokens = num_done + 1, num_tokens + answer.num_tokens
                rate = num_tokens * self.layout.num_replicas / max(seconds, 1e-9)
                progress.update(num_done, {"mean length": num_tokens / num_done, "tokens/s": round(rate)})

            return self._sampler.generate(requests, self.options, on_answer)


@contextmanager
def open_service(
    sampling: SamplingConfig,
    vllm: VLLMConfig,
    parallel: ParallelConfig,
    tokenizer: TokenizerConfig,
    checkpoint: str,
    run_dir: Path,
) -> Iterator[SamplingService]:
    """A service for `checkpoint` on the ranks of `parallel` (engine "openai": `checkpoint` is only a name).
    What was opened is closed with the block. run_dir: takes ledger, exported weights and logs."""
    layout = init_layout(parallel)
    options = SamplingOptions(sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k)
    words: Tokenizer | None = None
    if sampling.engine == "openai":
        from phi4r.sampling.url import URLSampler

        weights = digest([sampling.url, sampling.model])
    else:
        words = open_tokenizer(tokenizer, checkpoint)
        weights = broadcast_object(weights_digest(checkpoint) if layout.is_main else None)

    @contextmanager
    def open_sampler(longest: int) -> Iterator[Sampler]:
        if sampling.engine == "openai":
            yield URLSampler(sampling)
        elif sampling.engine == "vllm":
            from phi4r.sampling.vllm.served import open_served

            assert words is not None
            with open_served(checkpoint, words.eos_ids, sampling, vllm, run_dir, longest) as served:
                yield served
        else:
            from phi4r.sampling.embedded import EmbeddedEngine
            from phi4r.train.session import open_inference

            opened = open_inference(checkpoint, parallel, tokenizer)
            yield EmbeddedEngine(opened.engine, opened.tokenizer.eos_ids, sampling.num_slots)

    part = layout.replica if layout.reports else 0
    with ExitStack() as stack, Ledger(run_dir / "ledger", weights, options, part) as ledger:
        yield SamplingService(ledger, open_sampler, layout, words, stack)
