"""The problems of a run: read from a file or generated, with their prompts rendered once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from phi4r.configs.sections import ProblemsConfig, RolloutConfig
from phi4r.core.console import say
from phi4r.core.errors import UserError
from phi4r.core.problem import Problem
from phi4r.core.registry import is_import_path
from phi4r.core.seeds import problem_seed
from phi4r.data.records import load_problems
from phi4r.data.render import render_prompt
from phi4r.data.tokenizer import Tokenizer
from phi4r.parallel.layout import Layout, broadcast_object
from phi4r.tasks import get_task


def get_problems(
    config: ProblemsConfig,
    seed: int,
    reject_path: Path | None = None,
    *,
    use: Literal["train", "eval"] = "train",
    count: int = 0,
) -> list[Problem]:
    """The problems of a `[problems]` section. `count`: generate so many instead of `num_generated`."""
    task = get_task(config.task, "problems.task")
    if config.path:
        problems, report = load_problems(config.path, config.on_bad_row, reject_path)
        say(f"problems: {report.summary()}")
        if is_import_path(config.task):
            problems = [problem if problem.task else replace(problem, task=task.name) for problem in problems]
        return problems
    low, high = task.default_range
    difficulty = (config.difficulty_min or low, config.difficulty_max or max(high, config.difficulty_min))
    stream = problem_seed(seed, use)
    return [task.generate(stream, i, difficulty) for i in range(count or config.num_generated)]


def load_run_problems(
    config: ProblemsConfig,
    rollout: RolloutConfig,
    tokenizer: Tokenizer,
    seed: int,
    run_dir: Path,
    layout: Layout,
) -> tuple[list[Problem], list[tuple[int, ...]]]:
    """Problems whose prompt fits `rollout.max_prompt_tokens`, and their prompt tokens, the same on every
    rank."""
    kept: tuple[list[Problem], list[tuple[int, ...]]] | None = None
    if layout.is_main:
        problems = get_problems(config, seed, run_dir / "rejects.jsonl")
        prompts = [tuple(render_prompt(tokenizer, p, config.system_message)) for p in problems]
        fits = [len(prompt) <= rollout.max_prompt_tokens for prompt in prompts]
        if not any(fits):
            raise UserError(
                f"{config.path or config.task}: none of {len(problems)} prompts fits"
                f" rollout.max_prompt_tokens = {rollout.max_prompt_tokens}"
                f" (the shortest has {min(map(len, prompts))} tokens)"
            )
        if not all(fits):
            say(
                f"problems: {fits.count(False):,} of {len(fits):,} prompts are longer than"
                " rollout.max_prompt_tokens, left out"
            )
        kept = (
            [p for p, fit in zip(problems, fits, strict=True) if fit],
            [p for p, fit in zip(prompts, fits, strict=True) if fit],
        )
    return broadcast_object(kept)
