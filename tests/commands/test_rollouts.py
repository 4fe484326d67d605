"""Rollout files, and reading them."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from phi4r.commands.rollouts import aggregates, load, parse_row, response_text, select, show
from phi4r.core.errors import UserError
from phi4r.rl.rollout_log import read_rollouts, rollout_path, rollout_steps, write_rollouts


def row(
    step: int, prompt_index: int, sample: int, outcome: str = "correct", tokens: int = 10, **more: Any
) -> dict[str, Any]:
    answer = {"correct": "7", "wrong": "3"}.get(outcome, "")
    return {
        "step": step,
        "prompt_index": prompt_index,
        "sample_index": sample,
        "problem_id": f"modchain-{prompt_index}",
        "prompt": "3*7+5-9%10?",
        "text": f"<think>3*7=1;1+5=6;6-9=7</think>{answer}",
        "tokens": list(range(tokens)),
        "num_tokens": tokens,
        "finished": outcome != "no_answer",
        "outcome": outcome,
        "answer": answer,
        "gold": "7",
        "reward": {"correct": 0.6, "wrong": -0.5}.get(outcome, -0.6) + sample / 1000,
        "reward_parts": {"accuracy": 1.0, "repetition": 0.0},
        "advantage": 0.25,
        "rollout_logprob_mean": -0.125,
    } | more


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    outcomes = ["correct", "wrong", "wrong", "no_answer"]
    for step in (1, 2, 5):
        rows = [row(step, p, s, outcomes[s], tokens=10 * s + p + 1) for p in range(2) for s in range(4)]
        write_rollouts(tmp_path, step, rows)
    return tmp_path


def shown(run_dir: Path, **options: Any) -> str:
    out = io.StringIO()
    show(run_dir, console=Console(file=out, width=160), **options)
    return out.getvalue()


def test_rows_come_back_as_they_were_written_in_step_order(run_dir: Path) -> None:
    assert rollout_steps(run_dir) == [1, 2, 5]
    assert [r["step"] for r in read_rollouts(run_dir)] == [1] * 8 + [2] * 8 + [5] * 8
    first = next(read_rollouts(run_dir, 2))
    assert first == row(2, 0, 0, "correct", tokens=1)


def test_a_step_written_again_replaces_it_and_a_failed_write_does_not(run_dir: Path) -> None:
    write_rollouts(run_dir, 2, [row(2, 0, 0)])
    assert len(list(read_rollouts(run_dir, 2))) == 1
    before = rollout_path(run_dir, 2).read_bytes()
    with pytest.raises(TypeError):
        write_rollouts(run_dir, 2, [row(2, 0, 0), {"step": object()}])
    assert rollout_path(run_dir, 2).read_bytes() == before
    assert rollout_steps(run_dir) == [1, 2, 5]
    assert len(list((run_dir / "rollouts").iterdir())) == 3


def test_a_missing_folder_run_or_step_is_named_with_what_there_is(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        show(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no rollouts here .*step_\*\.jsonl"):
        show(tmp_path / "empty")
    with pytest.raises(UserError, match=r"no rollouts of step 3 \(steps 1-2, 5 are there\)"):
        show(run_dir, step=3)


def test_filters_that_leave_nothing_list_what_there_is(run_dir: Path) -> None:
    with pytest.raises(UserError, match=r"no rollouts of 'x' \(there are modchain-0, modchain-1\)"):
        show(run_dir, problem="x")
    with pytest.raises(UserError, match=r"outcome 'timeout' \(wrong: 4, correct: 2, no_answer: 2\)"):
        show(run_dir, outcome="timeout")
    with pytest.raises(UserError, match="--sort: expected one of file, reward, length"):
        show(run_dir, sort="best")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--limit"):
        show(run_dir, limit=-1)


def test_rows_are_selected_and_sorted(run_dir: Path) -> None:
    rows = load(run_dir, 1)
    assert [r.num_tokens for r in select(rows, sort="length")] == [32, 31, 22, 21, 12, 11, 2, 1]
    by_reward = select(rows, problem="modchain-1", sort="reward")
    assert [r.outcome for r in by_reward] == ["correct", "wrong", "wrong", "no_answer"]
    assert [r.reward for r in by_reward] == sorted((r.reward for r in by_reward), reverse=True)
    assert {r.prompt_index for r in by_reward} == {1}
    assert len(select(rows, outcome="wrong")) == 4


def test_aggregates_are_over_all_selected_rows(run_dir: Path) -> None:
    totals = aggregates(load(run_dir, 1))
    assert totals["samples"] == 8
    assert totals["groups"] == 2
    assert totals["accuracy"] == 0.25
    assert totals["finished"] == 0.75
    assert totals["length_mean_correct"] == 1.5
    assert totals["length_mean_wrong"] == pytest.approx((11 + 21 + 12 + 22) / 4)
    assert totals["groups_without_variance"] == 0.0
    same = [row(1, 0, s, reward=0.5) for s in range(4)] + [row(1, 1, s, reward=float(s)) for s in range(4)]
    assert aggregates([parse_row(r) for r in same])["groups_without_variance"] == 0.5


def test_without_a_step_the_newest_is_shown_and_a_problem_through_all(run_dir: Path) -> None:
    assert "step 5" in shown(run_dir)
    assert "step 1" not in shown(run_dir)
    followed = shown(run_dir, problem="modchain-1", outcome="correct")
    assert all(f"step {step}" in followed for step in (1, 2, 5))


def test_the_limit_bounds_panels_but_not_aggregates(run_dir: Path) -> None:
    text = shown(run_dir, limit=3)
    assert text.count("advantage") == 3
    assert "8 samples in 2 groups of 1 step(s): wrong 4, correct 2, no_answer 2" in text
    assert "5 more not shown" in text
    assert shown(run_dir, limit=0).count("advantage") == 8


def test_a_panel_has_prompt_response_answer_reward_and_its_parts(run_dir: Path) -> None:
    text = shown(run_dir, limit=1)
    for part in (
        "3*7+5-9%10?",
        "<think>3*7=1",
        "answer 7",
        "gold 7",
        "reward +0.6000",
        "accuracy=1",
        "-0.1250",
    ):
        assert part in text


def test_markup_in_a_response_is_shown_as_it_is(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 1, [row(1, 0, 0, text="[red]x[/red] [/] 7", prompt="[bold]?", problem_id="[b]")])
    text = shown(tmp_path)
    assert "[red]x[/red] [/] 7" in text
    assert "[bold]?" in text


def test_long_texts_are_cut_unless_asked_for_in_full(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 1, [row(1, 0, 0, text="<think>" + "a" * 5000 + "</think>THE END 7")])
    assert "characters more, --full shows them" in shown(tmp_path)
    assert "--full" not in shown(tmp_path, full=True)
    assert shown(tmp_path, full=True).count("a") > 5000
    assert "THE END 7" in shown(tmp_path)


def test_the_think_block_is_dimmed_and_the_last_answer_highlighted() -> None:
    text = response_text("<think>7 or 8</think>so 7, yes 7", "7")
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert text.style == "dim"
    assert "reverse" in styles["7"]
    assert styles["so 7, yes "] == "not dim"
    assert text.plain == "<think>7 or 8</think>so 7, yes 7"
    unclosed = response_text("<think>7 or", "7")
    assert unclosed.plain == "<think>7 or"
    assert "reverse" not in str(unclosed.spans)


def test_json_output_holds_rows_and_aggregates(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(run_dir, step=1, outcome="wrong", limit=2, as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert data["aggregates"]["samples"] == 4
    assert [r["outcome"] for r in data["rollouts"]] == ["wrong", "wrong"]


def test_a_row_that_is_no_rollout_is_an_error_with_its_field(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 1, [{"step": 1}])
    with pytest.raises(UserError, match="lacks the field 'prompt_index'"):
        show(tmp_path)
    write_rollouts(tmp_path, 1, [row(1, 0, 0, num_tokens="many")])
    with pytest.raises(UserError, match="wrong type"):
        show(tmp_path)
    write_rollouts(tmp_path, 1, [])
    with pytest.raises(UserError, match="are empty"):
        show(tmp_path)
