"""What a task is, and the random streams that make its problems a function of (seed, index)."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from phi4r.core.errors import UserError
from phi4r.core.problem import Problem
from phi4r.verify.extract import extract_answer, extract_solution_answer
from phi4r.verify.strict import Verdict

Item = TypeVar("Item")
_MASK = (1 << 64) - 1


class CounterStream:
    """Random numbers from a key alone: splitmix64 started at a hash of the key.

    The same key gives the same numbers on every machine and Python version (unlike `random.Random`, whose
    derived methods may change), and different keys are independent streams.
    """

    def __init__(self, *key: str | int) -> None:
        digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
        self._state = int.from_bytes(digest, "little")

    def bits(self) -> int:
        """64 random bits as an integer."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def below(self, bound: int) -> int:
        """A uniform integer in [0, bound), without modulo bias."""
        assert 0 < bound <= 1 << 64
        limit = (1 << 64) - (1 << 64) % bound
        while (value := self.bits()) >= limit:
            pass
        return value % bound

    def between(self, low: int, high: int) -> int:
        """A uniform integer in [low, high], both ends included."""
        return low + self.below(high - low + 1)

    def uniform(self) -> float:
        """A uniform float in [0, 1) with 53 bits."""
        return (self.bits() >> 11) * 2.0**-53

    def choice(self, items: Sequence[Item]) -> Item:
        """One of `items`."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """`items` in a random order."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result


class Task(ABC):
    """A kind of problem: generates them, and checks answers exactly.

    A subclass states at least `generate` and `check_answer`; `trace` too where SFT is to learn from it.
    """

    name: str = ""
    """Registered name; for a task found by import path, that path."""
    default_range: tuple[int, int] = (1, 1)
    """Lowest and highest difficulty of problems that are generated where the settings say nothing."""
    lowest_difficulty: int = 1
    difficulty_unit: str = "difficulty"
    """What a difficulty of n means, in words, for messages."""
    alphabet: str = ""
    """Characters of its problems, traces and answers ("" = any)."""
    default_skip_share: float = 0.0
    """Share of training traces that skip the working."""
    is_generated: bool = True
    """False where problems come from files only."""

    @abstractmethod
    def generate(self, seed: int, index: int, difficulty: int | tuple[int, int] | None = None) -> Problem:
        """Problem number `index` of stream `seed`; its gold answer is filled in, its trace is not.

        `difficulty`: a number, an inclusive range to draw from, or None for `default_range`. UserError if
        the task has no such difficulty, or no generator.
        """

    def trace(
        self, problem: Problem, seed: int, index: int, skip_share: float | None = None
    ) -> tuple[str, str]:
        """(text inside the think block, text after it) of a right training response to `problem`.

        With probability `skip_share` (None: the task's default), decided by the stream (seed, index), the
        think block is empty. UserError if the problem is not of this task, or the task has no traces.
        """
        raise UserError(f"task {self.name}: it has no traces to train on (Task.trace)")

    @abstractmethod
    def check_answer(self, problem: Problem, answer: str) -> bool | None:
        """Whether a bare answer is right; exact; never runs long. None if that takes algebra (a
        `VerifierPool`).
        """

    def check(self, problem: Problem, answer_text: str) -> bool:
        r"""Whether the solution (the text after `</think>`) is right: a bare answer, or the last `\boxed{}`
        in it.

        An answer that only algebra can settle counts as not right here: use `phi4r.tasks.grade_responses`
        for it.
        """
        found = extract_solution_answer(answer_text)
        return found.answer is not None and bool(self.check_answer(problem, found.answer))

    def grade(self, problem: Problem, response: str) -> Verdict | None:
        """The verdict on a whole response, or None if that takes algebra."""
        found = extract_answer(response)
        if found.answer is None:
            return Verdict("no_answer", None, found.source)
        right = self.check_answer(problem, found.answer)
        return None if right is None else Verdict("correct" if right else "wrong", found.answer, self.name)

    def examples(self, seed: int, start: int, count: int) -> list[Problem]:
        """Problems `start` .. `start + count - 1` of stream `seed`, each with the trace and solution that SFT
        trains on."""
        found = []
        for index in range(start, start + count):
            problem = self.generate(seed, index)
            trace, solution = self.trace(problem, seed, index)
            found.append(replace(problem, trace=trace, solution=solution))
        return found

    def _draw_difficulty(self, stream: CounterStream, difficulty: int | tuple[int, int] | None) -> int:
        low, high = (
            (difficulty, difficulty) if isinstance(difficulty, int) else difficulty or self.default_range
        )
        if not self.lowest_difficulty <= low <= high:
            raise UserError(
                f"task {self.name}: difficulty ({self.difficulty_unit}) starts at {self.lowest_difficulty}, "
                f"and the lowest comes first; found {low} to {high}"
            )
        return stream.between(low, high)

    def _skips(self, seed: int, index: int, skip_share: float | None) -> bool:
        share = self.default_skip_share if skip_share is None else skip_share
        return CounterStream(self.name, "skip", seed, index).uniform() < share


class FileTask(Task):
    """A task whose problems come from files only."""

    default_range = (0, 0)
    lowest_difficulty = 0
    difficulty_unit = "none"
    is_generated = False

    def generate(self, seed: int, index: int, difficulty: int | tuple[int, int] | None = None) -> Problem:
        """There is no generator: always UserError."""
        raise UserError(f"task {self.name}: problems cannot be generated; give a file of problems (path)")
