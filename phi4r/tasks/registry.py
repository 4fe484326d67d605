"""Tasks by registered name or import path: the only list of tasks."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from phi4r.core.problem import Problem
from phi4r.core.registry import resolve
from phi4r.tasks.addition import Addition
from phi4r.tasks.base import Task
from phi4r.tasks.code import Code
from phi4r.tasks.countdown import Countdown
from phi4r.tasks.math import Math
from phi4r.tasks.modchain import ModChain

TASKS: dict[str, Task] = {
    task.name: task for task in (ModChain(), ModChain(modulus=5), Addition(), Countdown(), Math(), Code())
}


@functools.cache
def get_task(name: str, key: str = "task") -> Task:
    """The task of that registered name or import path, `package.module:name` of a `Task` or of a class of
    tasks. "" is "math", as in a problem without a task of its own.

    A task found by import path is called by that path: problems that it generates carry it, so that every
    stage finds their checker. key: the setting that holds `name`, for messages. ConfigError where there is no
    such task.
    """
    return resolve("task", name or Math.name, TASKS, key=key, fit=functools.partial(_fit, name))


def _fit(name: str, found: Any) -> Task:
    """The task that an import path leads to, tried on one problem."""
    if inspect.isclass(found) and issubclass(found, Task):
        found = found()
    if not isinstance(found, Task):
        raise TypeError(f"expected a phi4r.tasks.base.Task, or a class of them, got {type(found).__name__}")
    found.name = name
    if found.is_generated:
        problem = found.generate(0, 0)
        if not isinstance(problem, Problem):
            raise TypeError(f"generate must return a Problem, got {type(problem).__name__}")
        if problem.task != name:
            raise ValueError(f"its problems must have task=self.name, got {problem.task!r}")
        if found.check_answer(problem, problem.answer) is False:
            raise ValueError(
                f"check_answer refuses the answer {problem.answer!r} of its own problem {problem.problem!r}"
            )
    return found


def alphabet() -> str:
    """Every character that registered tasks use in problems, traces and answers, sorted: what a tokenizer for
    them must know.
    """
    return "".join(sorted(set("".join(task.alphabet for task in TASKS.values()))))
