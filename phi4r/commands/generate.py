"""`phi4r generate`: an answer streamed as it is sampled, or answers to a set of problems in a file.

Rows of RUN/answers.jsonl are conversations, ready for `phi4r sft --data.path`: `id` (problem/sample),
`messages` (the problem, the answer), `num_tokens`, `finished`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from phi4r.configs.stages import GenerateConfig
from phi4r.core.console import is_main_rank, say
from phi4r.core.io import JsonlWriter
from phi4r.core.problem import Message, Problem
from phi4r.core.seeds import Stream
from phi4r.data.render import render_prompt
from phi4r.data.tokenizer import Tokenizer
from phi4r.parallel.layout import broadcast_object, distributed_session, init_layout
from phi4r.rl.problems import get_problems
from phi4r.sampling.embedded import EmbeddedEngine
from phi4r.sampling.service import open_service
from phi4r.sampling.types import Response, SampleRequest, SamplingOptions, to_responses
from phi4r.train.session import open_inference


class _Stream:
    """Prints the text of a growing token list; a character that is still incomplete waits for its last
    byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.shown = 0

    def add(self, token: int) -> None:
        if token in self.tokenizer.eos_ids:
            return
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            sys.stdout.write(text[self.shown :])
            sys.stdout.flush()
            self.shown = len(text)


def show(cfg: GenerateConfig, checkpoint: str, prompt: str) -> None:
    """Print `generate.samples` answers to `prompt` (a user turn); a single one of the embedded engine as it
    is sampled."""
    with distributed_session():
        if cfg.sampling.engine == "embedded" and cfg.generate.samples == 1:
            _stream(cfg, checkpoint, prompt)
            return
        with tempfile.TemporaryDirectory(prefix="phi4r-generate-") as folder:
            message = Message("user", prompt)
            responses = _respond(cfg, checkpoint, [[message]], Path(folder))
        for response in responses:
            print(response.text, flush=True)


def _stream(cfg: GenerateConfig, checkpoint: str, prompt: str) -> None:
    opened, sampling = open_inference(checkpoint, cfg.parallel, cfg.tokenizer), cfg.sampling
    ids = render_prompt(opened.tokenizer, [Message("user", prompt)], cfg.problems.system_message)
    engine = EmbeddedEngine(opened.engine, opened.tokenizer.eos_ids, num_slots=1)
    stream = _Stream(opened.tokenizer)
    options = SamplingOptions(sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k)
    request = SampleRequest(tuple(ids), (cfg.seed,))
    engine.generate([request], options, on_token=stream.add if is_main_rank() else None)
    if is_main_rank():
        sys.stdout.write("\n")


def main(cfg: GenerateConfig, checkpoint: str, run_dir: Path) -> None:
    """Sample `generate.samples` answers to each problem; RUN/answers.jsonl appears whole, and a restart asks
    only for what RUN/ledger lacks."""
    with distributed_session():
        layout = init_layout(cfg.parallel)
        found = get_problems(cfg.problems, cfg.seed, run_dir / "rejects.jsonl") if layout.is_main else None
        problems: list[Problem] = broadcast_object(found)
        responses = _respond(cfg, checkpoint, problems, run_dir)
        if not layout.is_main:
            return
        path = run_dir / "answers.jsonl"
        with JsonlWriter(path) as writer:
            for response in responses:
                problem = problems[response.prompt_index]
                writer.write(
                    {
                        "id": f"{problem.id}/{response.sample_index}",
                        "messages": [
                            {"role": "user", "content": problem.problem},
                            {"role": "assistant", "content": response.text},
                        ],
                        "num_tokens": response.num_tokens,
                        "finished": response.finished,
                    }
                )
        unfinished = sum(not response.finished for response in responses)
        say(
            f"generate: {len(responses):,} answers -> {path}"
            + (f"; {unfinished:,} were cut off at sampling.max_new_tokens" if unfinished else "")
        )


def _respond(
    cfg: GenerateConfig, checkpoint: str, prompts: Sequence[Problem | Sequence[Message]], run_dir: Path
) -> list[Response]:
    """Answers to the prompts, prompt-major, on rank 0."""
    samples = cfg.generate.samples
    with open_service(cfg.sampling, cfg.vllm, cfg.parallel, cfg.tokenizer, checkpoint, run_dir) as service:
        requests = [
            service.request(prompt, cfg.problems.system_message, (cfg.seed, Stream.GENERATE, index, sample))
            for index, prompt in enumerate(prompts)
            for sample in range(samples)
        ]
        answers = service.answer(requests, "generate")
        return to_responses(answers, samples, service.tokenizer)
