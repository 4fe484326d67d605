"""Arithmetic from left to right, modulo 10: `3*7+5-9%10?` is ((3*7)+5-9) mod 10 = 7. The default task.

Trace: one step after another, each reduced: `3*7=1;1+5=6;6-9=7`. Final answer: `7`. Difficulty: how many
numbers. A small model learns each step from a few hundred facts, but can only guess the end of a long chain
at once: thinking pays, which is what makes the task a miniature of the paper's story.
"""

from __future__ import annotations

import re

from phi4r.core.errors import UserError
from phi4r.core.problem import Problem
from phi4r.tasks.base import CounterStream, Task
from phi4r.verify.notation import normalise
from phi4r.verify.numbers import exact_rational

_PROBLEM = re.compile(r"(\d(?:[+\-*]\d)*)%(\d+)\?")
OPERATORS = "+-*"


def _apply(left: int, operator: str, right: int) -> int:
    return left + right if operator == "+" else left - right if operator == "-" else left * right


class ModChain(Task):
    """`modchain` (modulo 10), and with another modulus below 10 `modchain<modulus>`, smaller and quicker to
    learn.
    """

    default_range = (3, 6)
    lowest_difficulty = 2
    difficulty_unit = "how many numbers"
    alphabet = "0123456789+-*%?=;"
    default_skip_share = 0.5

    def __init__(self, modulus: int = 10) -> None:
        assert 2 <= modulus <= 10, "operands are single digits"
        self.modulus = modulus
        self.name = "modchain" if modulus == 10 else f"modchain{modulus}"

    def generate(self, seed: int, index: int, difficulty: int | tuple[int, int] | None = None) -> Problem:
        """See `Task.generate`."""
        stream = CounterStream(self.name, "problem", seed, index)
        count = self._draw_difficulty(stream, difficulty)
        text = str(stream.below(self.modulus))
        for _ in range(count - 1):
            text += stream.choice(OPERATORS) + str(stream.below(self.modulus))
        text += f"%{self.modulus}?"
        _, value = self._solve(text)
        return Problem(
            id=f"{self.name}-{seed}-{index}",
            problem=text,
            answer=str(value),
            task=self.name,
            difficulty=count,
        )

    def trace(
        self, problem: Problem, seed: int, index: int, skip_share: float | None = None
    ) -> tuple[str, str]:
        """See `Task.trace`."""
        steps, value = self._solve(problem.problem)
        return "" if self._skips(seed, index, skip_share) else ";".join(steps), str(value)

    def check_answer(self, problem: Problem, answer: str) -> bool:
        """Whether `answer` is the number that the chain gives; the problem is worked out anew."""
        return exact_rational(normalise(answer)) == self._solve(problem.problem)[1]

    def _solve(self, text: str) -> tuple[list[str], int]:
        """(steps, value) of a problem text."""
        match = _PROBLEM.fullmatch(text)
        if match is None:
            raise UserError(f"task {self.name}: not a problem of this task: {text[:80]!r}")
        chain, modulus = match[1], int(match[2])
        if modulus == 0:
            raise UserError(f"task {self.name}: modulo 0: {text[:80]!r}")
        value, steps = int(chain[0]) % modulus, []
        for operator, digit in zip(chain[1::2], chain[2::2], strict=True):
            result = _apply(value, operator, int(digit)) % modulus
            steps.append(f"{value}{operator}{digit}={result}")
            value = result
        return steps, value
