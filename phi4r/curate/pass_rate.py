"""How often a model solves a problem: the difficulty that curation keeps its teachable band by (reference
section 2)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np

from phi4r.configs.stages import CurateConfig
from phi4r.core.io import JsonlWriter
from phi4r.core.problem import Problem
from phi4r.core.seeds import Stream
from phi4r.data.records import load_problems, problem_row
from phi4r.data.render import render_prompt
from phi4r.parallel.launch import run_handler
from phi4r.parallel.layout import distributed_session
from phi4r.sampling.embedded import EmbeddedEngine
from phi4r.sampling.types import SampleRequest, SamplingOptions, to_samples
from phi4r.tasks import grade_responses
from phi4r.train.session import open_inference
from phi4r.verify.pool import VerifierPool


def load_sampler(config: CurateConfig) -> Callable[[Sequence[Problem], int], np.ndarray]:
    """`sample(problems, k)`: pass rates float64 [problems] of `curate.checkpoint`, measured on the ranks of
    `parallel`."""

    def sample(problems: Sequence[Problem], k: int) -> np.ndarray:
        with tempfile.TemporaryDirectory(prefix="phi4r-pass-rate-") as folder:
            path = Path(folder) / "problems.jsonl"
            with JsonlWriter(path) as writer:
                for problem in problems:
                    writer.write(problem_row(problem))
            return np.asarray(run_handler(f"{__name__}:measure", [config, path, k], config.parallel))

    return sample


def measure(config: CurateConfig, path: Path, k: int) -> list[float]:
    """The rates of the problems in `path`, in order, on every rank: the share of `k` samples each that are
    right."""
    with distributed_session():
        opened = open_inference(config.curate.checkpoint, config.parallel, config.tokenizer)
        problems, _ = load_problems(path)
        tokenizer = opened.tokenizer
        prompts = [tuple(render_prompt(tokenizer, p, config.problems.system_message)) for p in problems]
        requests = [
            # By id, not by place: a rate does not depend on which problems are measured together.
            SampleRequest(prompt, (config.seed, Stream.PASS_RATE, crc32(problem.id.encode()), sample))
            for problem, prompt in zip(problems, prompts, strict=True)
            for sample in range(k)
        ]
        sampler = EmbeddedEngine(opened.engine, tokenizer.eos_ids, config.sampling.num_slots)
        options = SamplingOptions(config.sampling.max_new_tokens, config.sampling.temperature)
        samples = to_samples(sampler.generate(requests, options), prompts, k, tokenizer)
        with VerifierPool() as pool:
            verdicts = grade_responses([(problems[s.prompt_index], s.text) for s in samples], pool)
        right = np.array([v.correct for v in verdicts], dtype=np.float64)
        return right.reshape(len(problems), k).mean(1).tolist()
