"""Programs: a problem's answer is a JSON list of {"input", "output"} cases, and a response is right if the
last Python block of its solution prints every case's output (`phi4r.verify.sandbox`). Nothing is generated.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from phi4r.core.errors import UserError
from phi4r.core.problem import Problem
from phi4r.tasks.base import FileTask
from phi4r.verify.extract import solution_text
from phi4r.verify.sandbox import WALL_FACTOR, check_cases
from phi4r.verify.strict import Verdict

BATCH_SHARE = 0.5
"""Of a program's CPU seconds, which each program adds to the time of a batch: programs that sleep must not
hold up a step for their wall-clock deadlines one after the other."""
_BLOCK = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)```", re.DOTALL)


class Code(FileTask):
    """`code`: problems whose answers are programs that read standard input and print."""

    name = "code"

    def trace(
        self, problem: Problem, seed: int, index: int, skip_share: float | None = None
    ) -> tuple[str, str]:
        """(the problem's own trace, its solution). UserError if it has none of these."""
        if problem.trace is None or not problem.solution:
            raise UserError(f"problem {problem.id}: it has no trace and solution to train on")
        return "" if self._skips(seed, index, skip_share) else problem.trace, problem.solution

    def check_answer(self, problem: Problem, answer: str) -> bool | None:
        """None: a program has to run (`grade_all`)."""
        return None

    def grade(self, problem: Problem, response: str) -> Verdict | None:
        """The verdict on a response without a program, or None: then the program has to run (`grade_all`)."""
        source = program_of(response)
        return Verdict("no_answer", None, "no_block") if source is None else None

    def grade_all(
        self, graded: Sequence[tuple[Problem, str]], workers: int, timeout_s: float
    ) -> list[Verdict]:
        """Verdicts on responses that have programs; `workers` of them run at once, a case for `timeout_s` CPU
        seconds, all cases of a program for `WALL_FACTOR` times that on the wall, and all programs together
        for that and BATCH_SHARE of `timeout_s` for each program a worker has. Those that are open then are
        "timeout". UserError for a problem whose answer is no list of cases."""
        share = BATCH_SHARE * timeout_s * len(graded) / workers
        until = time.monotonic() + WALL_FACTOR * timeout_s + share

        def verdict(pair: tuple[Problem, str]) -> Verdict:
            source = program_of(pair[1])
            assert source is not None
            cases = _cases(pair[0])
            left = min(WALL_FACTOR * timeout_s, until - time.monotonic())
            if left <= 0:
                return Verdict("timeout", source, "batch deadline")
            right, why = check_cases(source, cases, timeout_s, wall_s=left)
            return Verdict("timeout" if right is None else "correct" if right else "wrong", source, why)

        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(verdict, graded))


def program_of(response: str) -> str | None:
    """The last fenced Python block after the think block."""
    blocks = _BLOCK.findall(solution_text(response) or "")
    return blocks[-1] if blocks else None


def _cases(problem: Problem) -> list[tuple[str, str]]:
    try:
        cases = [(case["input"], case["output"]) for case in json.loads(problem.answer)]
        if not cases or not all(isinstance(text, str) for case in cases for text in case):
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"problem {problem.id}: the answer of task code must be a JSON list of"
            ' {"input": text, "output": text}'
        ) from None
    return cases
