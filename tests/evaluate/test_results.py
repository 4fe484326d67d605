"""Result files: what is written is read back, bad lines are named, summaries equal hand counts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from phi4r.core.errors import UserError
from phi4r.core.io import atomic_write_json
from phi4r.evaluate import results as module
from phi4r.evaluate.results import (
    Record,
    Results,
    SummarySettings,
    compare,
    evaluate_samples,
    read_results,
    summarise,
    summary_table,
    write_results,
)


def record(problem_id: str = "p0", run: int = 0, correct: bool = True, **changes: object) -> Record:
    values: dict[str, object] = {
        "problem_id": problem_id,
        "run": run,
        "seed": 100 + run,
        "correct": correct,
        "outcome": "correct" if correct else "wrong",
        "answer": "7" if correct else "3",
        "num_tokens": 12,
        "finished": True,
    }
    return Record(**{**values, **changes})  # type: ignore[arg-type]


def rectangle(correct_QR: np.ndarray, tokens_QR: np.ndarray | None = None) -> Results:
    tokens = np.full(correct_QR.shape, 12) if tokens_QR is None else tokens_QR
    return Results(
        record(f"p{question}", run, bool(right), num_tokens=int(tokens[question, run]))
        for (question, run), right in np.ndenumerate(correct_QR)
    )


def test_what_is_written_is_read_back(tmp_path: Path):
    original = Results(
        [
            record("b", 0, text="<think>3*4=2</think>2", problem="3*4%10?", gold="2", difficulty=3.0),
            record("a", 0, False, answer=None, outcome="no_answer", finished=False),
            record("a", 1, False, outcome="timeout"),
            record("b", 1),
        ]
    )
    path = tmp_path / "results.jsonl"
    write_results(path, original)
    again = read_results(path)
    assert again.records() == original.records()
    assert again.problem_ids == ["b", "a"]
    assert (again.runs, again.seeds) == ([0, 1], [100, 101])
    assert again.correct.tolist() == [[True, True], [False, False]]
    assert again.finished.tolist() == [[True, True], [False, True]]
    assert again.answers == [["7", "7"], [None, "3"]]
    assert len(path.read_text().splitlines()) == 4


def test_every_field_of_a_record_has_its_types_checked():
    assert {field.name for field in fields(Record)} == set(module._FIELD_TYPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": 1}, "'correct' must be bool, got 1"),
        ({"run": True}, "'run' must be int, got True"),
        ({"run": -1}, "run must be 0 or more"),
        ({"num_tokens": "12"}, "'num_tokens' must be int, got '12'"),
        (
            {"outcome": "right"},
            "outcome must be one of correct, wrong, no_answer, timeout, error, got 'right'",
        ),
        ({"outcome": "wrong"}, "correct is true but outcome is 'wrong'"),
        ({"answer": 7}, "'answer' must be str or null, got 7"),
        ({"problem_id": None}, "'problem_id' must be str, got None"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_field(tmp_path: Path, change: dict, message: str):
    path = tmp_path / "results.jsonl"
    write_results(path, Results([record(), record("p1")]))
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **change})
    path.write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        read_results(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


def test_a_missing_field_is_named_and_unknown_ones_are_ignored(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    row = {"problem_id": "p", "run": 0, "seed": 1, "correct": False, "outcome": "wrong", "finished": True}
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"results\.jsonl:1: 'num_tokens' is missing"):
        read_results(path)
    path.write_text(json.dumps({**row, "num_tokens": 4, "engine": "other"}))
    assert read_results(path).records()[0].answer is None


def test_results_are_a_full_rectangle_of_independent_runs(tmp_path: Path):
    with pytest.raises(ValueError, match="'p0' appears twice in run 0"):
        Results([record(), record()])
    with pytest.raises(ValueError, match="'p1' has no result in run 1"):
        Results([record("p0", 0), record("p0", 1), record("p1", 0)])
    with pytest.raises(ValueError, match="runs 0, 1 share the seed 5"):
        Results([record(run=0, seed=5), record(run=1, seed=5)])
    with pytest.raises(ValueError, match="run 0 has two seeds, 100 and 5"):
        Results([record("p0"), record("p1", seed=5)])
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl: there are no results"):
        read_results(empty)


# --- from samples


@dataclass(frozen=True)
class Sum:
    id: str
    problem: str
    answer: str
    difficulty: float = 2.0


@dataclass(frozen=True)
class Sample:
    text: str
    num_tokens: int
    finished: bool = True


@dataclass(frozen=True)
class Verdict:
    outcome: str
    answer: str | None


def check_sum(problem: Sum, sample: Sample) -> Verdict:
    _, found, answer = sample.text.rpartition("</think>")
    if not found:
        return Verdict("no_answer", None)
    return Verdict("correct" if answer == problem.answer else "wrong", answer)


def check_sums(problems: Sequence[Sum], samples: Sequence[Sample]) -> list[Verdict]:
    return [check_sum(problem, sample) for problem, sample in zip(problems, samples)]


def test_samples_become_records_with_their_run_seed_and_verdict():
    problems = [Sum("x", "1+1?", "2"), Sum("y", "2+2?", "4")]
    runs = [
        [Sample("<think></think>2", 4), Sample("5", 1)],
        [Sample("<think></think>3", 4), Sample("<think>2+2", 9, finished=False)],
    ]
    results = evaluate_samples(problems, runs, check_sums, seeds=[11, 12])
    assert results.correct.tolist() == [[True, False], [False, False]]
    assert results.answers == [["2", "3"], [None, None]]
    assert results.seeds == [11, 12]
    row = results.record("y", 1)
    assert (row.outcome, row.finished, row.gold, row.difficulty) == ("no_answer", False, "4", 2.0)
    assert row.text == "<think>2+2"
    assert evaluate_samples(problems, runs, check_sums, keep_text=False).record("x", 0).text is None
    with pytest.raises(ValueError, match="run 1 has 1 samples for 2 problems"):
        evaluate_samples(problems, [runs[0], runs[1][:1]], check_sums)
    with pytest.raises(ValueError, match="run 0 has 1 verdicts for 2 problems"):
        evaluate_samples(problems, runs, lambda rows, samples: check_sums(rows, samples)[:1])
    with pytest.raises(ValueError, match="1 seeds for 2 runs"):
        evaluate_samples(problems, runs, check_sums, seeds=[1])


# --- summaries


def test_the_summary_equals_hand_counts_and_is_plain_json(tmp_path: Path):
    correct = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=bool)
    tokens = np.arange(16).reshape(4, 4) + 5
    summary = summarise(rectangle(correct, tokens), SummarySettings(bootstrap=500))
    assert summary["avg_at_k"] == summary["avg_at_4"] == 9 / 16
    assert summary["k"] == 4
    low, high = summary["ci95"]
    assert 0 <= low < 9 / 16 < high <= 1
    assert summary["ci95_same_problems"][1] - summary["ci95_same_problems"][0] < high - low
    assert summary["pass_at_k"]["1"]["value"] == pytest.approx(9 / 16)
    assert summary["pass_at_k"]["2"]["value"] == pytest.approx((1 + 5 / 6 + 0 + 1) / 4)
    assert summary["pass_at_k"]["4"]["value"] == 0.75
    assert summary["worst_at_k"]["4"]["value"] == 0.25
    assert summary["maj_at_k"]["4"]["value"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert summary["accuracy_by_run"] == [0.75, 0.5, 0.5, 0.5]
    assert summary["std_over_runs"] == pytest.approx(0.125)
    assert summary["mean_length"] == 12.5
    assert summary["outcomes"] == {"correct": 9, "wrong": 7}
    assert sum(part["count"] * part["accuracy"] for part in summary["by_length"]) == pytest.approx(9)
    atomic_write_json(tmp_path / "summary.json", summary)  # refuses NaN and anything that is not JSON
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_one_run_can_be_summarised_with_what_one_run_can_say(tmp_path: Path):
    summary = summarise(rectangle(np.array([[1], [0], [1]], dtype=bool)))
    assert summary["avg_at_1"] == pytest.approx(2 / 3)
    assert summary["std_over_runs"] is None
    assert summary["ci95_same_problems"] is None
    atomic_write_json(tmp_path / "summary.json", summary)


def test_accuracy_is_broken_down_by_difficulty():
    results = Results(
        [
            record("a", difficulty=4.0, num_tokens=20),
            record("b", correct=False, difficulty=4.0, num_tokens=30),
            record("c", difficulty=3.0, num_tokens=10),
        ]
    )
    assert summarise(results)["by_difficulty"] == [
        {"difficulty": 3.0, "num_problems": 1, "accuracy": 1.0, "mean_length": 10.0},
        {"difficulty": 4.0, "num_problems": 2, "accuracy": 0.5, "mean_length": 25.0},
    ]


def test_a_comparison_pairs_by_problem_id_whatever_the_order():
    generator = np.random.default_rng(0)
    before = rectangle(generator.random((40, 4)) < 0.5)
    after = rectangle(generator.random((40, 8)) < 0.9, np.full((40, 8), 20))
    shuffled = Results(sorted(after.records(), key=lambda row: row.problem_id, reverse=True))
    gain = compare(before, after, SummarySettings(bootstrap=500))
    assert gain == compare(before, shuffled, SummarySettings(bootstrap=500))
    assert gain["mean"] == pytest.approx(after.correct.mean() - before.correct.mean())
    assert gain["ci95"][0] > 0.2
    assert gain["permutation_p_value"] < 0.001
    assert gain["length"]["mean"] == 8.0
    assert gain["pass_at_k"]["k"] == 4
    assert gain["num_better"] + gain["num_worse"] <= 40


def test_a_comparison_of_different_problems_is_a_user_error():
    before, after = rectangle(np.ones((3, 2), dtype=bool)), rectangle(np.ones((2, 2), dtype=bool))
    with pytest.raises(UserError, match="1 of 3 are in one only, such as 'p2'"):
        compare(before, after)


def test_the_console_table_shows_the_stages_and_the_gain():
    generator = np.random.default_rng(1)
    before, after = (rectangle(generator.random((40, 8)) < rate) for rate in (0.5, 0.9))
    settings = SummarySettings(bootstrap=200)
    stages = {"SFT": summarise(before, settings), "GRPO": summarise(after, settings)}
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    gain = compare(before, after, settings)
    console.print(summary_table(stages, gain))
    text = console.export_text()
    for part in (
        "SFT",
        "GRPO",
        "avg@8",
        "pass@8",
        f"{100 * stages['GRPO']['avg_at_8']:.1f}%",
        "points (95% CI +",
    ):
        assert part in text
    assert "< 0.001" in text
