"""Rows that cannot teach."""

from dataclasses import replace

from phi4r.core.problem import Problem
from phi4r.curate.validate import same_answer, task_check, tidy, validate

CHAIN = Problem("c", "3*7+5-9%10?", "7", "modchain", 4, "", "7")
STORY = Problem("s", "Tom has 3 apples and buys 4 more. How many?", "7", "math", None, "3+4=7", r"\boxed{7}")


def reason(problem: Problem, **limits: int) -> str:
    removed = validate([problem], task_check, **limits).removed
    return removed[0].reason if removed else ""


def test_good_rows_stay() -> None:
    assert validate([CHAIN, STORY], task_check).kept == [CHAIN, STORY]


def test_each_fault_has_its_own_reason() -> None:
    assert reason(replace(CHAIN, problem=" ?! ")) in ("empty", "not_of_task")
    assert reason(replace(STORY, problem=" ?. ")) == "empty"
    assert reason(replace(CHAIN, answer="  ")) == "no_answer"
    assert reason(replace(CHAIN, answer="8")) == "wrong_answer"
    assert reason(replace(CHAIN, solution="8")) == "wrong_solution"
    assert reason(replace(CHAIN, problem="what is 3*7?")) == "not_of_task"
    assert reason(STORY, max_problem_chars=20) == "oversize"
    assert reason(STORY, max_trace_chars=4) == "oversize"
    assert reason(STORY, max_trace_chars=5) == ""


def test_a_free_form_solution_must_agree_with_its_gold_answer() -> None:
    assert reason(replace(STORY, solution=r"\boxed{8}")) == "wrong_solution"
    assert reason(replace(STORY, solution=r"\boxed{7.0}")) == ""


def test_what_the_checker_cannot_tell_is_kept_and_counted() -> None:
    result = validate([replace(STORY, solution="Tom has seven apples then, as one can see.")], task_check)
    assert len(result.kept) == 1
    assert result.notes["unsettled_checks"] == 1


def test_an_answer_may_be_missing_where_a_plurality_vote_follows() -> None:
    assert validate([replace(STORY, answer="")], task_check, answer_required=False).removed == []


def test_white_space_that_says_nothing_is_tidied() -> None:
    assert tidy(replace(CHAIN, problem=" 3 * 7+5\t-9 % 10?\n")) == CHAIN
    assert tidy(replace(STORY, problem=f" {STORY.problem}\n")) == STORY
    assert tidy(STORY) is STORY
    assert tidy(replace(CHAIN, problem="what is 3 * 7?")).problem == "what is 3 * 7?"  # not of this task


def test_answers_are_compared_by_the_task() -> None:
    first = Problem("a", "3,5,7=56?", "(3+5)*7", "countdown")
    assert same_answer(first, replace(first, answer="7*(5+3)"))
    assert not same_answer(first, replace(first, answer="7*5+3"))
    assert same_answer(STORY, replace(STORY, answer="7.0"))
