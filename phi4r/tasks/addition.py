"""Sums of two to four numbers of several digits: `347+589?` is 936. Difficulty: digits of each number.

Trace: column by column from the right, the column's digits, then the carry if there is one:
`7+9=16;4+8+1=13;3+5+1=9`. The last digits of the column sums, read backwards, with the last carry in front,
are the answer.
"""

from __future__ import annotations

import re

from phi4r.core.errors import UserError
from phi4r.core.problem import Problem
from phi4r.tasks.base import CounterStream, Task
from phi4r.verify.notation import normalise
from phi4r.verify.numbers import exact_rational

_PROBLEM = re.compile(r"(\d{1,100}(?:\+\d{1,100})+)\?")
MAX_NUMBERS = 4


class Addition(Task):
    """`addition`."""

    name = "addition"
    default_range = (2, 4)
    lowest_difficulty = 1
    difficulty_unit = "digits of each number"
    alphabet = "0123456789+?=;"
    default_skip_share = 0.5

    def generate(self, seed: int, index: int, difficulty: int | tuple[int, int] | None = None) -> Problem:
        """See `Task.generate`."""
        stream = CounterStream(self.name, "problem", seed, index)
        digits = self._draw_difficulty(stream, difficulty)
        if digits > 100:
            raise UserError(f"task {self.name}: at most 100 digits, found {digits}")
        numbers = [
            int(str(stream.between(1, 9)) + "".join(str(stream.below(10)) for _ in range(digits - 1)))
            for _ in range(stream.between(2, MAX_NUMBERS))
        ]
        return Problem(
            id=f"{self.name}-{seed}-{index}",
            problem="+".join(map(str, numbers)) + "?",
            answer=str(sum(numbers)),
            task=self.name,
            difficulty=digits,
        )

    def trace(
        self, problem: Problem, seed: int, index: int, skip_share: float | None = None
    ) -> tuple[str, str]:
        """See `Task.trace`."""
        numbers = self._numbers(problem)
        answer = str(sum(numbers))
        if self._skips(seed, index, skip_share):
            return "", answer
        texts = [str(number)[::-1] for number in numbers]
        steps, carry = [], 0
        for column in range(max(map(len, texts))):
            terms = [text[column] for text in texts if column < len(text)]
            terms += [str(carry)] if carry else []
            total = sum(map(int, terms))
            steps.append("+".join(terms) + f"={total}")
            carry = total // 10
        return ";".join(steps), answer

    def check_answer(self, problem: Problem, answer: str) -> bool:
        """Whether `answer` is the sum; the problem is worked out anew."""
        return exact_rational(normalise(answer)) == sum(self._numbers(problem))

    def _numbers(self, problem: Problem) -> list[int]:
        match = _PROBLEM.fullmatch(problem.problem)
        if match is None:
            raise UserError(f"task {self.name}: not a problem of this task: {problem.problem[:80]!r}")
        return [int(number) for number in match[1].split("+")]
