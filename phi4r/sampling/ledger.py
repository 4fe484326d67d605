"""The ledger of a stage: every answer is appended as it arrives, and a restart asks only for what is missing.

    RUN/ledger/answers_000.jsonl    a line per answer, one file per process that samples

A line holds

    key, weights, prompt, settings {...}, seed [...]        what was asked: a digest of all four, and the four
                                                            (weights and prompt as digests)
    tokens, logprobs, finished, spans [, text]              the answer (`Completion`)
    reason, server, num_prompt_tokens, num_tokens, seconds  why it ended ("stop", "length"), who gave it, its
    cost

so that an answer serves exactly the question that it was given to: other weights, another prompt, other
settings or another seed are another key. A last line that a kill cut short is dropped. Several kinds of
questions may share one folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from phi4r.core.io import JsonlWriter, parse_json_object
from phi4r.sampling.types import Completion, SampleRequest, SamplingOptions
from phi4r.train.folders import MANIFEST, resolve_checkpoint

THREADS = 8
SUFFIXES = (".safetensors", ".json")


def digest(value: Any) -> str:
    """16 bytes of BLAKE2 over a JSON value, in hexadecimal."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def weights_digest(checkpoint: str | Path) -> str:
    """Of a phi4r checkpoint its manifest (which holds every file's checksum), of a Hugging Face folder the
    content of its weights and configs."""
    kind, folder = resolve_checkpoint(checkpoint)
    if kind == "phi4r":
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return digest({"model": raw["model"], "files": raw["files"], "crc32": raw["crc32"]})

    def content(path: Path) -> list[str]:
        with open(path, "rb") as file:
            return [path.name, hashlib.file_digest(file, "sha256").hexdigest()]

    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    with ThreadPoolExecutor(THREADS) as pool:  # hashing large blocks releases the interpreter's lock
        return digest(list(pool.map(content, files)))


class Ledger:
    """The answers that the weights `weights` (a digest) gave under `options`, in `folder`. part: the number
    of this process's file; files are opened with the first append."""

    def __init__(self, folder: Path, weights: str, options: SamplingOptions, part: int = 0) -> None:
        self.folder, self.weights, self.options = folder, weights, options
        self.path = folder / f"answers_{part:03d}.jsonl"
        self._writer: JsonlWriter | None = None

    def key(self, request: SampleRequest) -> str:
        """What an answer to `request` is filed under."""
        return digest([self.weights, _prompt(request), asdict(self.options), list(request.key)])

    def find(self, requests: Sequence[SampleRequest]) -> dict[int, Completion]:
        """The answers that are there, by the request's index; all files are read."""
        wanted: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            wanted.setdefault(self.key(request), []).append(index)
        found: dict[int, Completion] = {}
        for path in sorted(self.folder.glob("answers_*.jsonl")):
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if not line.endswith("\n"):
                        break  # cut short by a kill
                    row = parse_json_object(line, f"{path}:{number}")
                    for index in wanted.get(row["key"], ()):
                        found[index] = Completion.from_row(row)
        return found

    def append(self, request: SampleRequest, answer: Completion, server: str, seconds: float) -> None:
        """File an answer. seconds: since sampling began."""
        if self._writer is None:
            self._writer = JsonlWriter(self.path, append=True)
        self._writer.write(
            {
                "key": self.key(request),
                "weights": self.weights,
                "prompt": digest(_prompt(request)),
                "settings": asdict(self.options),
                "seed": list(request.key),
                **answer.to_row(),
                "reason": "stop" if answer.finished else "length",
                "server": server,
                "num_prompt_tokens": len(request.prompt_tokens),
                "num_tokens": answer.num_tokens,
                "seconds": round(seconds, 4),
            }
        )

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()


def _prompt(request: SampleRequest) -> Any:
    return [list(message) for message in request.messages] or list(request.prompt_tokens)
