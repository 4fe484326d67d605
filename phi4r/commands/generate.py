"""`phi4r generate`: one answer, printed as it is sampled."""

from __future__ import annotations

import sys

from phi4r.configs.sections import ParallelConfig
from phi4r.core.console import is_main_rank
from phi4r.data.render import render_prompt
from phi4r.data.tokenizer import Tokenizer
from phi4r.parallel.layout import distributed_session
from phi4r.sampling.embedded import EmbeddedEngine
from phi4r.sampling.types import SampleRequest, SamplingOptions
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


def main(
    checkpoint: str,
    prompt: str,
    *,
    system: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    parallel: ParallelConfig,
) -> None:
    """Sample one answer to `prompt` (a user turn) and stream it to stdout. The model card recommends
    temperature 0.8, top-p 0.95, top-k 50."""
    with distributed_session():
        opened = open_inference(checkpoint, parallel)
        ids = render_prompt(opened.tokenizer, [{"role": "user", "content": prompt}], system)
        sampler = EmbeddedEngine(opened.engine, opened.tokenizer.eos_ids, num_slots=1)
        stream = _Stream(opened.tokenizer)
        request = SampleRequest(tuple(ids), (seed,))
        options = SamplingOptions(max_new_tokens, temperature, top_p, top_k)
        sampler.generate([request], options, on_token=stream.add if is_main_rank() else None)
        if is_main_rank():
            sys.stdout.write("\n")
