"""Tasks by registered name or import path."""

from __future__ import annotations

import pytest

from phi4r.core.errors import ConfigError
from phi4r.core.problem import Problem
from phi4r.tasks import TASKS, get_task
from phi4r.tasks.base import CounterStream, FileTask, Task

HERE = __name__


class Largest(Task):
    default_range = (2, 4)

    def generate(self, seed: int, index: int, difficulty: int | tuple[int, int] | None = None) -> Problem:
        stream = CounterStream(self.name, seed, index)
        numbers = [stream.below(10) for _ in range(self._draw_difficulty(stream, difficulty))]
        text = "max(" + ",".join(map(str, numbers)) + ")?"
        return Problem(f"largest-{seed}-{index}", text, str(max(numbers)), task=self.name)

    def check_answer(self, problem: Problem, answer: str) -> bool:
        return answer == problem.answer


class ForgetsItsName(Largest):
    def generate(self, seed: int, index: int, difficulty: int | tuple[int, int] | None = None) -> Problem:
        return Problem("x", "max(1)?", "1", task="largest")


class RefusesItself(Largest):
    def check_answer(self, problem: Problem, answer: str) -> bool:
        return False


class Generates(Task):
    def generate(self, seed: int, index: int, difficulty: int | tuple[int, int] | None = None) -> Problem:
        return "max(1)?"  # type: ignore[return-value]

    def check_answer(self, problem: Problem, answer: str) -> bool:
        return True


class ChecksOnly(FileTask):
    def check_answer(self, problem: Problem, answer: str) -> bool:
        return len(answer) == len(problem.answer)


class HasNothing(Task):
    pass


READY = Largest()


@pytest.mark.parametrize("name", ["Largest", "READY", "ChecksOnly"])
def test_a_class_or_an_object_by_import_path_is_a_task(name: str) -> None:
    path = f"{HERE}:{name}"
    task = get_task(path)
    assert task is get_task(path)
    assert task.name == path, "problems carry the path, so that every stage finds their checker"
    problem = task.generate(3, 1) if task.is_generated else Problem("x", "?", "7", task=path)
    verdict = get_task(problem.task).grade(problem, f"<think></think>{problem.answer}")
    assert verdict is not None
    assert verdict.correct


def test_problems_of_a_task_without_traces_cannot_be_trained_on() -> None:
    with pytest.raises(Exception, match=r"has no traces to train on \(Task.trace\)"):
        get_task(f"{HERE}:Largest").examples(0, 0, 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "mod_chain",
            "problems.task: unknown task 'mod_chain', did you mean 'modchain'? Registered: ",
        ),
        (f"{HERE}:HERE", "HERE is not a task: expected a phi4r.tasks.base.Task, or a class of them, got str"),
        (f"{HERE}:HasNothing", "HasNothing is not a task: Can't instantiate abstract class HasNothing"),
        (f"{HERE}:ForgetsItsName", "its problems must have task=self.name, got 'largest'"),
        (f"{HERE}:RefusesItself", "check_answer refuses the answer"),
        (f"{HERE}:Generates", "generate must return a Problem, got str"),
        (f"{HERE}:Larges", "defines no 'Larges', did you mean 'Largest'?"),
    ],
)
def test_what_is_no_task_is_refused_in_one_line(name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        get_task(name, "problems.task")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_registered_task_is_found_by_its_name() -> None:
    assert all(get_task(name).name == name for name in TASKS)
    assert get_task("").name == "math"
