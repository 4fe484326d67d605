"""`phi4r verify` and `phi4r reward` on files: one line out per line in, and bad lines named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi4r.commands.verify import run_reward, run_verify, word_ids
from phi4r.configs.sections import RewardConfig
from phi4r.core.errors import UserError

GOOD: list[dict[str, Any]] = [
    {"gold": "7", "response": "<think>3+4</think>7<|im_end|>"},
    {"gold": "1/2", "response": r"<think>\boxed{9}</think>\boxed{0.5}", "id": "half"},
    {"gold": "x+1", "response": r"\boxed{1+x}"},
    {"gold": "7", "response": r"<think>\boxed{7}"},
    {"gold": "7", "response": r"\boxed{9^{9^9}}"},
    {"gold": "steps\n#### 1,000", "response": "<think></think>999"},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_verify_grades_each_line(tmp_path: Path) -> None:
    report = run_verify(write(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl", timeout_s=20)
    assert read(tmp_path / "out.jsonl") == [
        {"outcome": "correct", "answer": "7"},
        {"id": "half", "outcome": "correct", "answer": "0.5"},
        {"outcome": "correct", "answer": "1+x"},
        {"outcome": "no_answer", "answer": ""},
        {"outcome": "error", "answer": "9^{9^9}"},
        {"outcome": "wrong", "answer": "999"},
    ]
    assert (report.rows, report.graded, report.rejected) == (6, 6, 0)
    assert report.summary() == "6 responses graded: 3 correct, 1 error, 1 no_answer, 1 wrong"


def test_one_of_several_gold_answers_is_enough(tmp_path: Path) -> None:
    rows = [{"gold": ["7", "seven eighths"], "response": r} for r in ("7", r"\boxed{\frac78}", "8")]
    run_verify(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", audit=True)
    found = read(tmp_path / "out.jsonl")
    assert [(row["outcome"], row["second"]) for row in found] == [
        ("correct", ""),
        ("correct", ""),
        ("wrong", ""),
    ]


BAD = [
    ("{", "not valid JSON"),
    ("[1]", "expected a JSON object"),
    ({"response": "7"}, "field 'gold': missing"),
    ({"gold": 7, "response": "7"}, "field 'gold': expected a string, found 7"),
    ({"gold": " ", "response": "7"}, "field 'gold': empty"),
    ({"gold": ["7", ""], "response": "7"}, "field 'gold': empty"),
    ({"gold": [], "response": "7"}, "field 'gold': expected a string"),
    ({"gold": "7", "response": None}, "field 'response': expected a string, found null"),
    ({"gold": "7", "response": "\ud800"}, "field 'response': unpaired surrogate"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_line_stops_the_run_by_name_and_leaves_no_output(
    tmp_path: Path, row: Any, message: str
) -> None:
    source = write(tmp_path / "in.jsonl", [GOOD[0], "", row])
    with pytest.raises(UserError) as caught:
        run_verify(source, tmp_path / "out.jsonl")
    assert str(caught.value).startswith(f"{source}:3:")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_bad_lines_can_be_skipped_into_a_reject_file(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [GOOD[0], *(row for row, _ in BAD), GOOD[5]])
    report = run_verify(source, tmp_path / "out.jsonl", on_bad_row="skip")
    assert [row["outcome"] for row in read(tmp_path / "out.jsonl")] == ["correct", "wrong"]
    rejects = read(tmp_path / "out.rejects.jsonl")
    assert [reject["line"] for reject in rejects] == list(range(2, 2 + len(BAD)))
    assert (report.rows, report.graded, report.rejected) == (2 + len(BAD), 2, len(BAD))
    assert report.reject_file == str(tmp_path / "out.rejects.jsonl")


def test_a_missing_file_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.jsonl: cannot be read"):
        run_verify(tmp_path / "absent.jsonl", tmp_path / "out.jsonl")


def reward_row(response: str, num_tokens: int, finished: bool = True, **more: Any) -> dict[str, Any]:
    return {"gold": "7", "response": response, "num_tokens": num_tokens, "finished": finished, **more}


def test_reward_reports_every_part(tmp_path: Path) -> None:
    rows = [
        reward_row(r"<think>a</think>\boxed{7}", 27_136),
        reward_row(r"<think>a</think>\boxed{8}", 1000),
        reward_row(r"<think>a</think>\boxed{7}", 100, finished=False),
        reward_row(r"\boxed{7}", 100),
        reward_row(r"<think>a \boxed{7}", 100, finished=False),
        reward_row(
            "<think>a</think>7", 36, tokens=[t for copy in range(6) for t in [1, 2, 3, 4, 5, 100 + copy]]
        ),
    ]
    run_reward(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    results = read(tmp_path / "out.jsonl")
    assert [row["accuracy_source"] for row in results] == [
        "correct", "incorrect", "incomplete", "think_block", "think_block", "correct",
    ]  # fmt: skip
    totals = [0.57032, -0.56323, -4 / 13, -8 / 13, -8 / 13, 8 / 13 - 5 / 78]
    assert [row["total"] for row in results] == pytest.approx(totals, abs=5e-6)
    assert [row["outcome"] for row in results] == [
        "correct",
        "wrong",
        "correct",
        "correct",
        "no_answer",
        "correct",
    ]
    assert results[5]["repetition_unit"] == "tokens"
    assert (results[5]["num_ngrams"], results[5]["num_repeated_ngrams"], results[5]["max_ngram_count"]) == (
        32,
        1,
        6,
    )
    assert results[0]["repetition_unit"] == "words"
    assert set(results[0]) >= {
        "rho",
        "repetition",
        "accuracy",
        "think_valid",
        "finished",
        "num_tokens",
        "answer",
    }


def test_reward_without_token_ids_counts_words(tmp_path: Path) -> None:
    response = "<think>" + "so we go on and " * 40 + "</think>7"
    run_reward(write(tmp_path / "in.jsonl", [reward_row(response, 300)]), tmp_path / "out.jsonl")
    (row,) = read(tmp_path / "out.jsonl")
    assert row["repetition"] < 0
    assert row["max_ngram_count"] == 40
    assert word_ids("so, we so") == [0, 1, 2, 0]


def test_reward_takes_other_lengths(tmp_path: Path) -> None:
    settings = RewardConfig(max_tokens=64, positive_tokens=32, negative_tokens=8)
    source = write(
        tmp_path / "in.jsonl", [reward_row("<think></think>7", 48), reward_row("<think></think>8", 4)]
    )
    run_reward(source, tmp_path / "out.jsonl", settings=settings)
    assert [row["accuracy"] for row in read(tmp_path / "out.jsonl")] == pytest.approx(
        [0.75, -0.75], abs=1e-15
    )
    with pytest.raises(UserError, match="positive_tokens"):
        run_reward(
            source, tmp_path / "out.jsonl", settings=RewardConfig(max_tokens=0, positive_tokens=40_000)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": -1}, "field 'num_tokens': expected 0 or more"),
        ({"num_tokens": True}, "field 'num_tokens': expected a whole number"),
        ({"num_tokens": 1.5}, "field 'num_tokens': expected a whole number"),
        ({"finished": 1}, "field 'finished': expected true or false"),
        ({"tokens": [1, "2"]}, "field 'tokens': expected whole numbers"),
        ({"tokens": [2**31]}, "field 'tokens': expected whole numbers"),
    ],
)
def test_a_bad_reward_field_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    source = write(tmp_path / "in.jsonl", [reward_row("7", 1) | change])
    with pytest.raises(UserError, match=message):
        run_reward(source, tmp_path / "out.jsonl")
