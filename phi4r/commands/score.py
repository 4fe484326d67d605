"""`phi4r score`: log-probs of given token sequences, under any layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from phi4r.configs.sections import ParallelConfig
from phi4r.core.console import Progress
from phi4r.core.errors import UserError
from phi4r.core.io import JsonlWriter, read_jsonl
from phi4r.data.packing import Document, pack, unpack
from phi4r.parallel.layout import distributed_session
from phi4r.train.engine import Engine
from phi4r.train.session import open_inference

# Sequences that are packed and scored at once: bounds memory, however long the file is.
BLOCK = 256
SHORTEST_ROW = 256


def main(checkpoint: str, input: Path, output: Path, parallel: ParallelConfig) -> None:
    """{"tokens": [n ids]} per line of `input` -> {"logprobs": [n - 1 natural logs]} per line of `output`.

    Entry i is log p(tokens[i + 1] | tokens[: i + 1]). The order of lines is kept.
    """
    with distributed_session():
        num_lines = sum(1 for _ in read_jsonl(input))
        opened = open_inference(checkpoint, parallel)
        engine, is_main = opened.engine, opened.layout.is_main
        done = 0
        # A block and not a close() at the end: after a bad line no temporary file stays behind.
        with (
            JsonlWriter(output) if is_main else nullcontext() as writer,
            Progress("score", num_lines, every=BLOCK) as progress,
        ):
            for block in _blocks(_sequences(input, engine.model_config.vocab_size)):
                for logprobs in score_sequences(engine, block, parallel):
                    if writer is not None:
                        writer.write({"logprobs": logprobs})
                done += len(block)
                progress.update(done)


def score_sequences(
    engine: Engine, sequences: Sequence[Sequence[int]], parallel: ParallelConfig
) -> list[list[float]]:
    """Log-probs of every token but the first of each sequence. Collective; the same on all ranks."""
    documents = [Document(np.asarray(s, dtype=np.int32), np.ones(len(s), dtype=bool)) for s in sequences]
    length = parallel.fit_row(max(SHORTEST_ROW, max(len(d.tokens) for d in documents)))
    rows = pack(documents, length)
    values = unpack(rows, list(engine.forward(rows)[0]), documents)
    return [value[1:].tolist() for value in values]


def _sequences(path: Path, vocab_size: int) -> Iterator[list[int]]:
    for number, row in read_jsonl(path):
        tokens: Any = row.get("tokens")
        where = f"{path}:{number}: tokens"
        if not isinstance(tokens, list) or not tokens:
            raise UserError(f"{where}: expected a non-empty list of token ids")
        for token in tokens:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise UserError(
                    f"{where}: {token!r} is not a token id (an integer from 0 to {vocab_size - 1})"
                )
        yield tokens


def _blocks(items: Iterator[list[int]]) -> Iterator[list[list[int]]]:
    block: list[list[int]] = []
    for item in items:
        block.append(item)
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block
