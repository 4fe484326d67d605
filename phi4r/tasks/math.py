"""Any problem with a gold answer: free-form mathematics, GSM8K. Nothing is generated; answers go to the
verifier.
"""

from __future__ import annotations

from phi4r.core.errors import UserError
from phi4r.core.problem import Problem
from phi4r.tasks.base import FileTask
from phi4r.verify.extract import gold_answer
from phi4r.verify.strict import SymbolicQuestion, Verdict, compare_quickly, decide_quickly


class Math(FileTask):
    """`math`: the task of every problem that names no other."""

    name = "math"

    def trace(
        self, problem: Problem, seed: int, index: int, skip_share: float | None = None
    ) -> tuple[str, str]:
        r"""(the problem's own trace, its solution or else the boxed answer). UserError if it has no trace."""
        if problem.trace is None:
            raise UserError(f"problem {problem.id}: it has no trace to train on")
        final = problem.solution if problem.solution else rf"\boxed{{{gold_answer(problem.answer)}}}"
        return "" if self._skips(seed, index, skip_share) else problem.trace, final

    def grade(self, problem: Problem, response: str) -> Verdict | None:
        """The verdict on a whole response, or None: then only a `VerifierPool` can tell."""
        _, decided = decide_quickly(problem.answer, response)
        return decided if isinstance(decided, Verdict) else None

    def check_answer(self, problem: Problem, answer: str) -> bool | None:
        """Settled by text and exact rationals, or None: then only a `VerifierPool` can tell."""
        decided = compare_quickly(gold_answer(problem.answer), answer)
        return None if isinstance(decided, SymbolicQuestion) else decided[0] == "correct"
