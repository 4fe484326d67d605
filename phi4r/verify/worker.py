"""The program of a verification worker: `python -m phi4r.verify.worker`, JSON lines in and out, one
question at a time.

A program of its own rather than a forked child, so that it inherits no threads, locks or gloo sockets of a
training process, and none of its memory; and rather than a pickle channel, so that no sympy object can ever
travel: printing one may not return.

    in    {"id": int, "gold": str, "answer": str, "method": "symbolic"|"plain"|"numeric", "others": [str]}
    out   {"ready": true} once warm, then
          {"id": int, "outcome": "correct"|"wrong"|"error", "method": str, "seconds": float}

It ends at the end of its input. Its memory is limited before sympy is imported, and its CPU time per
question a second time here, for the case that the parent died and nobody is left to kill it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import sys
import time
from fractions import Fraction
from typing import IO, Any

from phi4r.verify.equality import quick_leaf, same
from phi4r.verify.numbers import exact_rational, is_rounding_of
from phi4r.verify.numeric import compare_numerically
from phi4r.verify.strict import Outcome, SymbolicQuestion

# Relative difference above which two exact numbers are different, far above the rounding of 30 digits.
RATIO_DIGITS = 30
RATIO_BOUND = 1e-20
# Of a difference evaluated to 400 digits that is taken for 0.
ZERO_BOUND = 1e-60

_DEGREES = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?) ?\^\\circ")
_CIS = re.compile(r"\\cis ?(\([^()]*\)|\\frac\{[^{}]*\}\{[^{}]*\}|\{[^{}]*\}|\\[a-z]+|\d+)")


def _limit_resources(memory_gib: float) -> None:
    memory = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _allow_cpu(seconds: float) -> None:
    """Let this process use `seconds` more of CPU time before the kernel ends it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _parse(text: str) -> Any:
    """The sympy expression for `text` as a whole, or None. Never a number picked out of something
    unparsable.
    """
    from math_verify import LatexExtractionConfig, parse

    if "$" in text:
        return None
    found = parse(
        f"${text}$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return found[0] if found else None


def _differs_exactly(gold: Any, answer: Any) -> bool:
    """Whether two exact numbers that math-verify took for equal (at its 15 digits) differ after all."""
    import sympy  # type: ignore[import-untyped]

    for side in (gold, answer):
        # A percentage (an unevaluated product) is meant to equal both 50 and 0.5.
        if not getattr(side, "is_number", False) or side.has(sympy.Float, sympy.UnevaluatedExpr):
            return False
    difference = abs(sympy.N(gold - answer, RATIO_DIGITS, maxn=400))
    scale = abs(sympy.N(gold, RATIO_DIGITS, maxn=400)) + abs(sympy.N(answer, RATIO_DIGITS, maxn=400))
    return bool(difference > RATIO_BOUND * scale)


class _Algebra:
    """Equality of expressions by math-verify; remembers what it could not read."""

    def __init__(self) -> None:
        self.parsed: dict[str, Any] = {}
        self.unread_gold = self.unread_answer = self.refused = self.used = False

    def parse(self, text: str) -> Any:
        if text not in self.parsed:
            self.parsed[text] = _parse(_for_math_verify(text))
        return self.parsed[text]

    def equal(self, gold_text: str, answer_text: str) -> bool:
        decided = quick_leaf(gold_text, answer_text)
        if decided is not None:
            return decided
        self.used = True
        if gold_text.endswith("=0") and answer_text.endswith("=0"):
            return self.proportional(gold_text[:-2], answer_text[:-2])
        gold, answer = self.parse(gold_text), self.parse(answer_text)
        if gold is None or answer is None:
            self.unread_gold |= gold is None
            self.unread_answer |= answer is None
            return False
        return self.equal_values(gold, answer, (gold_text, answer_text))

    def equal_values(self, gold: Any, answer: Any, decimals: tuple[str, str]) -> bool:
        from math_verify import verify

        if (decided := _by_rounding(gold, answer, *decimals)) is not None:
            return decided

        if not verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None):
            return _equal_at_points(gold, answer)
        if _differs_exactly(gold, answer):
            self.refused = True
            return False
        return True

    def proportional(self, one: str, other: str) -> bool:
        """Whether two expressions differ by a constant factor that is not 0."""
        import sympy

        gold, answer = self.parse(one), self.parse(other)
        if gold is None or answer is None:
            return False
        ratio = sympy.simplify(gold / answer)
        return bool(ratio.is_number and ratio != 0 and ratio.is_finite)


def _for_math_verify(text: str) -> str:
    """A normalised expression with the marks that math-verify reads in another way spelled out."""
    text = _DEGREES.sub(r"(\1\\frac{\\pi}{180})", text)
    return _CIS.sub(r"e^{i(\1)}", text)


def _by_rounding(gold: Any, answer: Any, gold_text: str, answer_text: str) -> bool | None:
    """The verdict where one side is a decimal and the other an exact number that is none; else None."""
    import sympy

    for decimal, exact in ((gold_text, answer), (answer_text, gold)):
        value = exact_rational(decimal.strip())
        if value is None or "." not in decimal or not getattr(exact, "is_number", False):
            continue
        if exact.has(sympy.Float, sympy.UnevaluatedExpr) or not exact.is_real:
            continue
        digits = sympy.Rational(str(sympy.N(exact, 50, maxn=400)))
        near = Fraction(int(digits.p), int(digits.q))
        return is_rounding_of(decimal.strip(), near) or abs(near - value) <= abs(value) / 10**45
    return None


def _equal_at_points(gold: Any, answer: Any) -> bool:
    """Whether two expressions of the same variables are equal at fixed points,
    in exact arithmetic and then 400
    digits: what math-verify's simplification misses."""
    import sympy

    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return False
    if any(side.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan) for side in (gold, answer)):
        return bool(gold == answer)
    imaginary = {
        symbol: sympy.I for side in (gold, answer) for symbol in side.free_symbols if str(symbol) == "i"
    }
    gold, answer = gold.subs(imaginary), answer.subs(imaginary)
    if gold.free_symbols != answer.free_symbols or gold.has(sympy.Float) or answer.has(sympy.Float):
        return False
    symbols = sorted(gold.free_symbols, key=str)
    for point in range(3 if symbols else 1):
        values = {s: sympy.Rational(101 + 37 * i + 53 * point, 71 + 13 * i) for i, s in enumerate(symbols)}
        one, other = (side.subs(values) for side in (gold, answer))
        difference, scale = (sympy.N(each, RATIO_DIGITS, maxn=400) for each in (one - other, one))
        if not (difference.is_number and difference.is_finite and scale.is_finite):
            return False
        if not abs(difference) <= ZERO_BOUND * max(1, abs(scale)):
            return False
    return True


def compare_symbolically(question: SymbolicQuestion) -> tuple[Outcome, str]:
    """Compare by algebra; may run for ever or use any amount of memory. Only for a worker process."""
    algebra = _Algebra()
    if any(same(gold, question.answer, algebra.equal) for gold in (question.gold, *question.others)):
        return "correct", "symbolic"
    if algebra.unread_gold:
        return "error", "gold_unparsed"
    return "wrong", "exact_guard" if algebra.refused else "unparsed" if algebra.unread_answer else "symbolic"


def compare_plainly(question: SymbolicQuestion) -> tuple[Outcome, str]:
    """math-verify as it comes: its own reading of both sides as they are written, its own comparison, none of
    our tiers and guards. For audits of what text or exact rationals decided."""
    from math_verify import parse, verify

    gold, answer = (
        parse(text if "$" in text else f"${text}$", parsing_timeout=None)
        for text in (question.gold, question.answer)
    )
    if not gold or not answer:
        return "error", "math_verify_unread"
    return ("correct" if verify(gold, answer, timeout_seconds=None) else "wrong"), "math_verify"


METHODS = {"symbolic": compare_symbolically, "plain": compare_plainly, "numeric": compare_numerically}


def _warm_up() -> None:
    """The first parse and the first symbolic comparison take a second; pay before the first deadline runs."""
    import logging

    logging.disable(logging.CRITICAL)
    for gold, answer in (
        (r"\frac{\sqrt{3}}{2}", r"\sin(\frac{\pi}{3})"),
        ("x+1", "1+x"),
        (r"\{1,2\}", "2,1"),
    ):
        compare_symbolically(SymbolicQuestion(gold, answer))


def _answer_questions(questions: IO[str], answers: IO[str], cpu_seconds: float) -> None:
    for line in questions:
        question = json.loads(line)
        started = time.perf_counter()
        _allow_cpu(cpu_seconds)
        try:
            compare = METHODS[question["method"]]
            outcome, method = compare(
                SymbolicQuestion(question["gold"], question["answer"], others=tuple(question["others"]))
            )
        except MemoryError:
            outcome, method = "error", "memory"
        except RecursionError:
            outcome, method = "error", "recursion"
        except Exception as error:  # noqa: BLE001  (whatever sympy raises on a hostile answer is this answer's outcome)
            outcome, method = "error", type(error).__name__
        seconds = time.perf_counter() - started
        reply = {"id": question["id"], "outcome": outcome, "method": method, "seconds": seconds}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def main() -> None:
    """Serve questions from standard input until it ends."""
    parser = argparse.ArgumentParser(prog="phi4r.verify.worker")
    parser.add_argument("--memory-gib", type=float, required=True)
    parser.add_argument("--cpu-seconds", type=float, required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_resources(options.memory_gib)
    # What libraries print must not get between the replies.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        _warm_up()
        answers.write(json.dumps({"ready": True}) + "\n")
        answers.flush()
        _answer_questions(sys.stdin, answers, options.cpu_seconds)


if __name__ == "__main__":
    main()
