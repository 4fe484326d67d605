"""Rows that cannot teach: without text, without an answer, far too long, or with an answer that is wrong.

The answer is put to the task's own exact checker, which works it out from the problem's text where the task
has generated problems. A free-form problem has only its gold answer, so there the check is that the solution
agrees with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from phi4r.core.errors import UserError
from phi4r.core.problem import Problem
from phi4r.curate.stage import Removed, StageResult, split
from phi4r.curate.text import analyse
from phi4r.tasks import get_task
from phi4r.verify.extract import extract_solution_answer

Check = Callable[[Problem, str], bool | None]
"""(problem, text of an answer or solution) -> right, wrong, or None where only algebra can tell. Raises
UserError where the problem is not one of its task."""


def validate(
    problems: Sequence[Problem],
    check: Check,
    max_problem_chars: int = 8192,
    max_trace_chars: int = 131072,
    answer_required: bool = True,
) -> StageResult:
    """Remove unusable items, each for the first reason that applies.

    `empty`: no text in the problem; `oversize`: problem or trace longer than its limit, in characters;
    `no_answer`: the answer is blank (allowed where `answer_required` is False: a plurality vote can stand
    in); `not_of_task`: the task cannot read the problem; `wrong_answer`: the checker refuses the answer;
    `wrong_solution`: it refuses the solution that follows the trace, so training on it would teach a
    mistake. What the checker cannot tell is kept; notes count it.
    """
    removed: dict[int, Removed] = {}
    unsettled = 0

    def counting(problem: Problem, text: str) -> bool | None:
        nonlocal unsettled
        verdict = check(problem, text)
        unsettled += verdict is None
        return verdict

    for index, problem in enumerate(problems):
        found = _fault(problem, counting, max_problem_chars, max_trace_chars, answer_required)
        if found is not None:
            removed[index] = Removed(problem=problem, reason=found[0], detail=found[1])
    notes = {
        "max_problem_chars": max_problem_chars,
        "max_trace_chars": max_trace_chars,
        "unsettled_checks": unsettled,
    }
    return split("validate", problems, removed, notes)


def _fault(
    problem: Problem, check: Check, max_problem_chars: int, max_trace_chars: int, answer_required: bool
) -> tuple[str, dict[str, Any]] | None:
    if not analyse(problem.problem).tokens:
        return "empty", {}
    for name, text, limit in (
        ("problem", problem.problem, max_problem_chars),
        ("trace", problem.trace or "", max_trace_chars),
    ):
        if len(text) > limit:
            return "oversize", {"field": name, "characters": len(text), "limit": limit}
    if not problem.answer.strip():
        return ("no_answer", {}) if answer_required else None
    try:
        if check(problem, problem.answer) is False:
            return "wrong_answer", {"answer": problem.answer}
        if problem.solution is not None and check(problem, problem.solution) is False:
            return "wrong_solution", {"solution": problem.solution, "answer": problem.answer}
    except UserError as error:
        return "not_of_task", {"error": str(error)}
    return None


def task_check(problem: Problem, text: str) -> bool | None:
    """The `Check` of the problem's own task. A free-form solution without a recognisable answer cannot
    be told."""
    task = get_task(problem.task)
    found = extract_solution_answer(text)
    if found.answer is None:
        return False if task.is_generated else None
    return task.check_answer(problem, found.answer)


def same_answer(a: Problem, b: Problem) -> bool:
    """Whether two problems of equal text have the same answer, by the checker of `a`'s task."""
    verdict = task_check(a, b.answer)
    return analyse(a.answer).tokens == analyse(b.answer).tokens if verdict is None else verdict


def tidy(problem: Problem) -> Problem:
    """The problem without white space that says nothing: outer space, and all of it in a text written in the
    alphabet of a task that has no space."""
    text = problem.problem.strip()
    alphabet = get_task(problem.task).alphabet
    joined = "".join(text.split())
    if " " not in alphabet and set(joined) <= set(alphabet):
        text = joined
    return problem if text == problem.problem else replace(problem, problem=text)
