"""The program of a verification worker: `python -m phi4r.verify.worker`, JSON lines in and out, one
question at a time.

A program of its own rather than a forked child, so that it inherits no threads, locks or gloo sockets of a
training process, and none of its memory; and rather than a pickle channel, so that no sympy object can ever
travel: printing one may not return.

    in    {"id": int, "gold": str, "answer": str, "method": "symbolic"|"plain"|"numeric"}
    out   {"ready": true} once warm, then
          {"id": int, "outcome": "correct"|"wrong"|"error", "method": str, "seconds": float}

It ends at the end of its input. Its memory is limited before sympy is imported, and its CPU time per
question a second time here, for the case that the parent died and nobody is left to kill it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import time
from typing import IO, Any

from phi4r.verify.numeric import compare_numerically
from phi4r.verify.strict import Outcome, SymbolicQuestion

# Relative difference above which two exact numbers are different, far above the rounding of 30 digits.
RATIO_DIGITS = 30
RATIO_BOUND = 1e-20


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


def compare_symbolically(question: SymbolicQuestion) -> tuple[Outcome, str]:
    """Compare by algebra; may run for ever or use any amount of memory. Only for a worker process."""
    from math_verify import verify

    gold = _parse(question.gold)
    if gold is None:
        return "error", "gold_unparsed"
    answer = _parse(question.answer)
    if answer is None:
        return "wrong", "unparsed"
    if not verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None):
        return "wrong", "symbolic"
    if _differs_exactly(gold, answer):
        return "wrong", "exact_guard"
    return "correct", "symbolic"


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
            outcome, method = compare(SymbolicQuestion(question["gold"], question["answer"]))
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
