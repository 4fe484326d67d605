"""How often a model solves a problem: the difficulty by which curation keeps its teachable band."""

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
from phi4r.parallel.launch import run_handler
from phi4r.parallel.layout import distributed_session
from phi4r.sampling.service import open_service
from phi4r.sampling.types import to_responses
from phi4r.tasks import grade_responses
from phi4r.verify.pool import VerifierPool


def load_sampler(config: CurateConfig, run_dir: Path) -> Callable[[Sequence[Problem], int], np.ndarray]:
    """`sample(problems, k)`: pass rates float64 [problems] of `curate.checkpoint`, measured on the ranks of
    `parallel`, or on servers; answers are in RUN/ledger."""

    def sample(problems: Sequence[Problem], k: int) -> np.ndarray:
        with tempfile.TemporaryDirectory(prefix="phi4r-pass-rate-") as folder:
            path = Path(folder) / "problems.jsonl"
            with JsonlWriter(path) as writer:
                for problem in problems:
                    writer.write(problem_row(problem))
            arguments = [config, path, k, run_dir]
            return np.asarray(run_handler(f"{__name__}:measure", arguments, config.parallel))

    return sample


def measure(config: CurateConfig, path: Path, k: int, run_dir: Path) -> list[float]:
    """The rates of the problems in `path`, in order, on rank 0 ([] on the others): the share of `k` samples
    each that are right."""
    with distributed_session():
        problems, _ = load_problems(path)
        with open_service(
            config.sampling, config.vllm, config.parallel, config.tokenizer, config.curate.checkpoint, run_dir
        ) as service:
            requests = [
                # By id, not by place: a rate does not depend on which problems are measured together.
                service.request(
                    problem,
                    config.problems.system_message,
                    (config.seed, Stream.PASS_RATE, crc32(problem.id.encode()), sample),
                )
                for problem in problems
                for sample in range(k)
            ]
            answers = service.answer(requests, "pass rates")
        if not answers:
            return []
        responses = to_responses(answers, k, service.tokenizer)
        with VerifierPool() as pool:
            verdicts = grade_responses([(problems[r.prompt_index], r.text) for r in responses], pool)
        right = np.array([v.correct for v in verdicts], dtype=np.float64)
        return right.reshape(len(problems), k).mean(1).tolist()
