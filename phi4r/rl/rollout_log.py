"""Rollouts on disk: a JSON line per sample in RUN/rollouts/step_000001.jsonl, one file per step.

A file appears whole or not at all, and writing a step again replaces it: a resumed run leaves the same
files as an uninterrupted one. A row has

    step, prompt_index, sample_index, problem_id, prompt, text, tokens, num_tokens, finished,
    policy_version, version_spans, outcome, answer, gold, reward, reward_parts {...}, advantage,
    rollout_logprob_mean

where `version_spans` lists [policy version, number of tokens] of the weights that sampled the row's tokens,
in order (a version counts optimizer steps), `policy_version` is the oldest of them, `text` is the response as
decoded, `outcome` the verifier's (correct, wrong, no_answer, timeout, error) and `rollout_logprob_mean` the
sampler's mean log-prob per response token, in nats.

Where two independent checks of an answer disagree, RUN/audit/step_000012.jsonl has a row for it, with

    step, prompt_index, sample_index, problem_id, gold, answer, outcome, method, second, second_method, tail

`outcome` and `method` of the verdict that the reward is made of, `second` and `second_method` of the check
beside it (`verify.audit`), and `tail`, the end of the response. At most `MAX_ROWS` rows a step, chosen by the
run's seed; metrics.jsonl counts all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from phi4r.core.errors import UserError
from phi4r.core.io import JsonlWriter, read_jsonl
from phi4r.core.problem import Problem
from phi4r.sampling.types import Response, Sample
from phi4r.verify.audit import audit_row, disagrees, drawn
from phi4r.verify.strict import Verdict

MAX_ROWS = 64
TAIL_CHARS = 600
_STEP_FILE = re.compile(r"step_(\d{6,})\.jsonl")


def rollout_path(run_dir: str | Path, step: int) -> Path:
    """The file of one step."""
    return Path(run_dir) / "rollouts" / f"step_{step:06d}.jsonl"


def write_rollouts(run_dir: str | Path, step: int, rows: Iterable[dict[str, Any]]) -> Path:
    """Write the rows of one step atomically and return the file; a file of the same step is replaced."""
    path = rollout_path(run_dir, step)
    with JsonlWriter(path) as writer:
        for row in rows:
            writer.write(row)
    return path


def rollout_steps(run_dir: str | Path) -> list[int]:
    """The steps whose rollouts are there, ascending."""
    folder = Path(run_dir) / "rollouts"
    if not folder.is_dir():
        return []
    matches = (_STEP_FILE.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def read_rollouts(run_dir: str | Path, step: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows of one step, or of all steps in order. Raises UserError where there are none, naming what is
    there."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder")
    steps = rollout_steps(run_dir)
    if not steps:
        raise UserError(
            f"{run_dir}: no rollouts here (expected rollouts/step_*.jsonl, written by `phi4r rl`)"
        )
    if step is not None and step not in steps:
        raise UserError(f"{run_dir}: no rollouts of step {step} (steps {_ranges(steps)} are there)")
    return _rows(run_dir, steps if step is None else [step])


def _rows(run_dir: Path, steps: list[int]) -> Iterator[dict[str, Any]]:
    for step in steps:
        for _, row in read_jsonl(rollout_path(run_dir, step)):
            yield row


def _ranges(steps: list[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in runs)


# --- audit


def write_audit(
    folder: Path, step: int, graded: Iterable[tuple[Problem, Sample | Response, Verdict]], seed: int
) -> None:
    """Log the disagreements of a step (of an evaluation: a run); a file of the same step is replaced, or
    removed where there are none."""
    path = folder / f"step_{step:06d}.jsonl"
    rows = [
        {
            "step": step,
            "prompt_index": sample.prompt_index,
            "sample_index": sample.sample_index,
            "problem_id": problem.id,
            **audit_row(problem.answer, verdict),
            "tail": sample.text[-TAIL_CHARS:],
        }
        for problem, sample, verdict in graded
        if disagrees(verdict)
    ]
    if not rows:
        path.unlink(missing_ok=True)
        return
    with JsonlWriter(path) as writer:
        for row in drawn(rows, MAX_ROWS, seed, step):
            writer.write(row)


def read_audit(run_dir: Path) -> list[dict[str, Any]]:
    """All logged disagreements of a run, step by step. UserError where there is no such run."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder")
    return [row for path in sorted(run_dir.glob("audit/step_*.jsonl")) for _, row in read_jsonl(path)]
