"""Reach a target with given numbers, each used exactly once: `3,5,7=56?` has the answer `(3+5)*7`.

Difficulty: how many numbers. Any expression with + - * / and parentheses that uses the numbers and has the
target's value is right, so the checker evaluates it, exactly, with an evaluator of its own. Traces show up
to three tries that miss and then one that hits, step by step: `3+5=8,8-7=1;3+5=8,8*7=56`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from phi4r.core.errors import UserError
from phi4r.core.problem import Problem
from phi4r.tasks.base import CounterStream, Task
from phi4r.verify.notation import normalise

_PROBLEM = re.compile(r"(\d{1,6}(?:,\d{1,6})+)=(\d{1,9})\?")
_TOKEN = re.compile(r"\s*(?:(\d{1,6})(?!\d)|([-+*/()]))")
_SPELLINGS = (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("[", "("), ("]", ")"))
OPERATORS = "+-*"
MAX_TARGET = 99
MAX_NUMBER = 9
MAX_TRIES = 3
MAX_ANSWER_CHARS = 100


class _NotAnExpression(ValueError):  # noqa: N818  (never leaves this module)
    pass


class _Evaluator:
    """Recursive descent over + - * / and parentheses with exact fractions.

    sum  = product (("+" | "-") product)*      product = atom (("*" | "/") atom)*
    atom = number | "(" sum ")" | "-" atom
    """

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        position = 0
        text = text.strip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise _NotAnExpression(f"unexpected {text[position]!r}")
            self.tokens.append(match[1] or match[2])
            position = match.end()
        self.place = 0
        self.numbers: list[int] = []

    def value(self) -> Fraction:
        result = self._sum()
        if self.place != len(self.tokens):
            raise _NotAnExpression("something follows the expression")
        return result

    def _peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self.place += 1
        return token

    def _sum(self) -> Fraction:
        result = self._product()
        while self._peek() in ("+", "-"):
            result = result + self._product() if self._take() == "+" else result - self._product()
        return result

    def _product(self) -> Fraction:
        result = self._atom()
        while self._peek() in ("*", "/"):
            if self._take() == "*":
                result *= self._atom()
            else:
                divisor = self._atom()
                if divisor == 0:
                    raise _NotAnExpression("division by zero")
                result /= divisor
        return result

    def _atom(self) -> Fraction:
        token = self._take()
        if token == "(":
            result = self._sum()
            if self._take() != ")":
                raise _NotAnExpression("a parenthesis is not closed")
            return result
        if token == "-":
            return -self._atom()
        if not token.isdigit():
            raise _NotAnExpression("a number is missing")
        self.numbers.append(int(token))
        return Fraction(int(token))


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """(exact value, numbers used from left to right) of an arithmetic expression of at most
    `MAX_ANSWER_CHARS`.

    Raises ValueError if `text` is not one.
    """
    if len(text) > MAX_ANSWER_CHARS:
        raise _NotAnExpression("too long")
    evaluator = _Evaluator(text)
    return evaluator.value(), evaluator.numbers


@dataclass(frozen=True)
class _Chain:
    """((a op b) op c) ...: a way through the numbers in one order."""

    numbers: tuple[int, ...]
    operators: tuple[str, ...]

    def steps(self) -> tuple[list[str], int]:
        value, steps = self.numbers[0], []
        for operator, number in zip(self.operators, self.numbers[1:], strict=True):
            result = (
                value + number if operator == "+" else value - number if operator == "-" else value * number
            )
            steps.append(f"{value}{operator}{number}={result}")
            value = result
        return steps, value

    def expression(self) -> str:
        """The chain as ordinary arithmetic, with the parentheses that it needs and no others."""
        text, last = str(self.numbers[0]), ""
        for operator, number in zip(self.operators, self.numbers[1:], strict=True):
            text = f"({text})" if operator == "*" and last in ("+", "-") else text
            text, last = f"{text}{operator}{number}", operator
        return text


def _draw_chain(stream: CounterStream, numbers: list[int]) -> _Chain:
    order = stream.shuffled(numbers)
    return _Chain(tuple(order), tuple(stream.choice(OPERATORS) for _ in order[1:]))


class Countdown(Task):
    """`countdown`."""

    name = "countdown"
    default_range = (3, 3)
    lowest_difficulty = 2
    difficulty_unit = "how many numbers"
    alphabet = "0123456789+-*/()=,;?"
    default_skip_share = 0.0

    def generate(self, seed: int, index: int, difficulty: int | tuple[int, int] | None = None) -> Problem:
        """See `Task.generate`. Targets lie between 1 and 99 and can be reached; the gold answer is one of
        the ways.
        """
        stream = CounterStream(self.name, "problem", seed, index)
        count = self._draw_difficulty(stream, difficulty)
        if count > 8:
            raise UserError(f"task {self.name}: at most 8 numbers, found {count}")
        while True:
            numbers = [stream.between(1, MAX_NUMBER) for _ in range(count)]
            chain = _draw_chain(stream, numbers)
            _, target = chain.steps()
            if 1 <= target <= MAX_TARGET:
                break
        return Problem(
            id=f"{self.name}-{seed}-{index}",
            problem=",".join(map(str, numbers)) + f"={target}?",
            answer=chain.expression(),
            task=self.name,
            difficulty=count,
        )

    def trace(
        self, problem: Problem, seed: int, index: int, skip_share: float | None = None
    ) -> tuple[str, str]:
        """See `Task.trace`: up to three tries that miss, then the gold answer's way step by step."""
        numbers, target = self._read(problem)
        hit = self._chain_of(problem.answer, numbers, target)
        if self._skips(seed, index, skip_share):
            return "", problem.answer
        stream = CounterStream(self.name, "trace", seed, index)
        tries: list[str] = []
        for _ in range(stream.between(0, MAX_TRIES)):
            steps, value = _draw_chain(stream, numbers).steps()
            if value != target:
                tries.append(",".join(steps))
        return ";".join([*tries, ",".join(hit.steps()[0])]), problem.answer

    def check_answer(self, problem: Problem, answer: str) -> bool:
        """Whether `answer` uses exactly the given numbers and has the target's value. `(3+5)*7=56` is fine
        too.
        """
        numbers, target = self._read(problem)
        text = normalise(answer)
        for spelling, symbol in _SPELLINGS:
            text = text.replace(spelling, symbol)
        text, equals, right = text.partition("=")
        if equals and right.strip() != str(target):
            return False
        try:
            value, used = evaluate(text)
        except ValueError:
            return False
        return value == target and sorted(used) == sorted(numbers)

    def _read(self, problem: Problem) -> tuple[list[int], int]:
        match = _PROBLEM.fullmatch(problem.problem)
        if match is None:
            raise UserError(f"task {self.name}: not a problem of this task: {problem.problem[:80]!r}")
        return [int(number) for number in match[1].split(",")], int(match[2])

    def _chain_of(self, expression: str, numbers: list[int], target: int) -> _Chain:
        """The chain that a generated gold answer is written from."""
        found = tuple(int(number) for number in re.findall(r"\d+", expression))
        operators = tuple(re.findall(r"[-+*]", expression))
        if len(operators) == len(found) - 1 and sorted(found) == sorted(numbers):
            chain = _Chain(found, operators)
            if chain.expression() == expression and chain.steps()[1] == target:
                return chain
        raise UserError(
            f"task {self.name}: no trace for the answer {expression[:80]!r}: not a left-to-right chain"
        )
