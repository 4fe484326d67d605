"""The raw pool: reproducible, and spoilt exactly as documented."""

import json
from collections import Counter
from pathlib import Path

import pytest

from phi4r.core.errors import UserError
from phi4r.curate.pool import DEFECT_SHARES, difficulty_range, generate_heldout, generate_raw_pool
from phi4r.data.records import load_problems
from phi4r.tasks import get_task

TASKS = ["modchain", "addition", "countdown"]


@pytest.mark.parametrize("name", TASKS)
def test_the_same_arguments_give_the_same_bytes(name: str) -> None:
    task = get_task(name)
    heldout = generate_heldout(task, 3, 20)
    pool = generate_raw_pool(task, 3, 100, heldout)
    assert pool == generate_raw_pool(task, 3, 100, generate_heldout(task, 3, 20))
    assert pool.lines != generate_raw_pool(task, 4, 100, heldout).lines


def test_defects_have_their_documented_shares_and_everything_else_is_right(tmp_path: Path) -> None:
    task = get_task("modchain")
    heldout = generate_heldout(task, 0, 50)
    pool = generate_raw_pool(task, 0, 1000, heldout)
    counts = Counter(item.defect for item in pool.planted)
    assert counts == {defect: round(1000 * share) for defect, share in DEFECT_SHARES.items()}
    pool.write(tmp_path / "raw.jsonl")
    rows, load = load_problems(tmp_path / "raw.jsonl", "skip", tmp_path / "rejects.jsonl")
    assert load.rejected == counts["malformed"]
    assert load.rows == 1000
    wrong = {item.id for item in pool.planted if item.defect == "wrong_answer"}
    spaced = {item.id for item in pool.planted if item.defect in ("duplicate", "leak")}
    for row in rows:
        assert row.trace is not None
        if row.id in spaced:
            assert any(char.isspace() for char in row.problem)
        else:
            assert task.check(row, row.answer) is (row.id not in wrong)


def test_about_half_of_the_traces_skip_the_working() -> None:
    pool = generate_raw_pool(get_task("modchain"), 1, 1000, [], shares={})
    skipped = sum(json.loads(line)["trace"] == "" for line in pool.lines)
    assert abs(skipped - 500) <= 5 * (1000 * 0.25) ** 0.5


def test_no_row_says_that_it_is_a_defect() -> None:
    pool = generate_raw_pool(get_task("modchain"), 0, 400, generate_heldout(get_task("modchain"), 0, 9))
    spoilt = {item.id for item in pool.planted}
    fields = {True: set(), False: set()}
    for line in pool.lines:
        row = json.loads(line) if line.endswith("}") else {}
        if "answer" in row:
            fields[row["id"] in spoilt] |= set(row)
    assert fields[True] == fields[False]


def test_held_out_problems_are_distinct_and_not_those_of_the_pool() -> None:
    task = get_task("modchain")
    heldout = generate_heldout(task, 0, 300, 8, 8)
    assert len({problem.problem for problem in heldout}) == len({problem.id for problem in heldout}) == 300
    pool = generate_raw_pool(task, 0, 300, [], 8, 8, shares={})
    assert not {problem.problem for problem in heldout} & {json.loads(line)["problem"] for line in pool.lines}


def test_a_held_out_set_larger_than_the_task_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"curate\.num_heldout: task modchain gives only 300 different"):
        generate_heldout(get_task("modchain"), 0, 301, 2, 2)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 0, (3, 6)), (4, 0, (4, 6)), (0, 2, (2, 2)), (9, 0, (9, 9)), (2, 8, (2, 8))],
)
def test_a_bound_of_zero_is_the_tasks_own(low: int, high: int, expected: tuple[int, int]) -> None:
    assert difficulty_range(get_task("modchain"), low, high) == expected


@pytest.mark.parametrize("shares", [{"typo": 0.1}, {"leak": 1.0}, {"duplicate": 0.6, "wrong_answer": 0.6}])
def test_impossible_shares_are_refused(shares: dict[str, float]) -> None:
    task = get_task("modchain")
    with pytest.raises(ValueError):
        generate_raw_pool(task, 0, 10, generate_heldout(task, 0, 2), shares=shares)
