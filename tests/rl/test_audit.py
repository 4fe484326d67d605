"""Disagreements between the two checks: counted in the metrics, logged whole, drawn for reading."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from phi4r.commands.rollouts import show_audit
from phi4r.configs.load import load_stage
from phi4r.configs.sections import ObjectiveConfig, RewardConfig
from phi4r.core.errors import UserError
from phi4r.core.io import read_jsonl
from phi4r.core.problem import Problem
from phi4r.evaluate.run import checker
from phi4r.rl.collect import grade, rollout_metrics, to_trajectories
from phi4r.rl.rollout_log import MAX_ROWS, write_audit
from phi4r.sampling.types import Sample
from phi4r.verify.pool import VerifierPool
from phi4r.verify.strict import Verdict

# Ours takes \, for a thousands separator; math-verify reads ten times zero: the two disagree.
PROBLEMS = [
    Problem(id="thousands", problem="?", answer="10000"),
    Problem(id="seven", problem="?", answer="7"),
]
ANSWERS = [[r"10\,000", "10000"], ["7", "8"]]


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(1) as pool:
        yield pool


def sample(prompt: int, number: int, text: str) -> Sample:
    tokens = np.arange(4, dtype=np.int32)
    return Sample(
        prompt_index=prompt, sample_index=number, prompt_tokens=tokens, tokens=tokens,
        logprobs=-np.ones(4, np.float32), finished=True, text=text,
    )  # fmt: skip


SAMPLES = [
    sample(prompt, number, rf"<think></think>\boxed{{{answer}}}")
    for prompt, answers in enumerate(ANSWERS)
    for number, answer in enumerate(answers)
]


def test_a_disagreement_is_counted_logged_and_shown_and_changes_no_reward(
    pool: VerifierPool, tmp_path: Path
) -> None:
    settings = RewardConfig().resolved(64)
    verdicts, rewards = grade(SAMPLES, PROBLEMS, settings, pool)
    _, unaudited = grade(SAMPLES, PROBLEMS, RewardConfig(audit_share=0.0).resolved(64), pool)
    assert rewards == unaudited
    trajectories, groups = to_trajectories(SAMPLES, PROBLEMS, verdicts, rewards, 2, ObjectiveConfig())
    counts = {k: v for k, v in rollout_metrics(trajectories, groups).items() if k.startswith("audit")}
    assert counts == {
        "audit_checked": 4, "audit_only_first": 1, "audit_only_second": 0, "audit_undecided": 0
    }  # fmt: skip
    write_audit(tmp_path / "audit", 3, zip(PROBLEMS[:1] * 2 + PROBLEMS[1:] * 2, SAMPLES, verdicts), 0)
    ((_, row),) = read_jsonl(tmp_path / "audit" / "step_000003.jsonl")
    assert row == {
        "step": 3, "prompt_index": 0, "sample_index": 0, "problem_id": "thousands", "gold": "10000",
        "answer": r"10\,000", "outcome": "correct", "method": "string", "second": "wrong",
        "second_method": "math_verify", "tail": SAMPLES[0].text,
    }  # fmt: skip
    out = io.StringIO()
    show_audit(tmp_path, console=Console(file=out, width=120))
    assert r"10\,000" in out.getvalue()
    assert "1 disagreements logged: 1 right by the reward's verdict only, 0 by the second" in out.getvalue()


def test_a_step_keeps_a_bounded_number_drawn_by_the_seed(tmp_path: Path) -> None:
    problem = Problem(id="p", problem="?", answer="9" * 5000)
    apart = Verdict("correct", "8" * 5000, "string", second="wrong", second_method="math_verify")
    graded = [(problem, sample(number, 0, "long " * 9999), apart) for number in range(MAX_ROWS + 40)]
    path = tmp_path / "audit" / "step_000001.jsonl"
    write_audit(tmp_path / "audit", 1, graded, 5)
    first = path.read_bytes()
    assert len(first.splitlines()) == MAX_ROWS
    assert len(first) < MAX_ROWS * 2000
    write_audit(tmp_path / "audit", 1, graded, 5)
    assert path.read_bytes() == first
    write_audit(tmp_path / "audit", 1, graded, 6)
    assert path.read_bytes() != first
    write_audit(tmp_path / "audit", 1, graded[:0], 5)
    assert list(tmp_path.rglob("*.jsonl")) == []


def test_cases_for_reading_are_drawn_from_all_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = Verdict("wrong", "8", "rational", second="correct", second_method="math_verify")
    for step in (1, 2, 30):
        write_audit(
            tmp_path / "audit", step, [(PROBLEMS[1], sample(i, 0, "[bold]x"), apart) for i in range(9)], 0
        )
    show_audit(tmp_path, limit=5, seed=3, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["logged"], len(shown["rows"])) == (27, 5)
    assert len({row["step"] for row in shown["rows"]}) > 1
    show_audit(tmp_path, limit=5, seed=3, as_json=True)
    assert json.loads(capsys.readouterr().out) == shown
    out = io.StringIO()
    show_audit(tmp_path, limit=1, console=Console(file=out, width=100))
    assert "[bold]x" in out.getvalue()
    with pytest.raises(UserError, match="no such run folder"):
        show_audit(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--limit"):
        show_audit(tmp_path, limit=-1)


def test_an_evaluation_is_audited_run_by_run(pool: VerifierPool, tmp_path: Path) -> None:
    config = load_stage("eval", "tiny", ["eval.runs=2", "eval.part=1"]).config
    check = checker(pool, config, tmp_path / "audit")
    one_each = [SAMPLES[0], SAMPLES[2]]
    assert [v.outcome for v in check(PROBLEMS, one_each)] == ["correct", "correct"]
    check(PROBLEMS, [SAMPLES[1], SAMPLES[2]])
    check(PROBLEMS, one_each)
    assert sorted(p.name for p in tmp_path.rglob("*.jsonl")) == ["step_000002.jsonl", "step_000004.jsonl"]
