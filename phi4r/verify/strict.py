r"""Comparing an answer with the gold answer: cheap exact tiers first, symbolic algebra last and never in
this process.

`decide_quickly` settles what text and `fractions.Fraction` can:

1. no answer found                                  -> no_answer
2. equal in one notation (`verify.notation`)        -> correct   ("string")
3. both are rational numbers in plain notation      -> exact comparison ("rational"); a decimal of six or more
                                                       significant digits may be the other's rounding
                                                       ("rounded")
4. too long, too deep, too explosive to evaluate    -> error     ("too_complex"): not graded, so not "wrong"
5. equal or different by their structure            -> correct or wrong ("grammar", `verify.equality`)

What is left needs algebra on expressions within that structure: math-verify, in a worker ("symbolic"),
its positives re-checked, because it compares floating-point numbers at about 6 digits (it takes 1/2^99 for
1/2^98). "unparsed": an answer that is not mathematics is wrong; a gold answer that is not is an error of the
data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from phi4r.verify.equality import counts_members, same
from phi4r.verify.extract import Extraction, extract_answer, gold_answer, list_of_boxes
from phi4r.verify.notation import normalise
from phi4r.verify.numbers import MAX_DIGITS, exact_rational, is_rounding_of

Outcome = Literal["correct", "wrong", "no_answer", "timeout", "error"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "no_answer", "timeout", "error")

# Above these a text is compared as a string only.
MAX_SYMBOLIC_CHARS = 1000
MAX_CARETS = 24
MAX_BRACES = 150
MAX_PARENTHESES = 100
MAX_POWER_DEPTH = 2
# Of a numeric exponent that is itself a power, as in 9^{9^9}.
MAX_LOG10_EXPONENT = 4.0


@dataclass(frozen=True)
class Verdict:
    """The outcome of one comparison.

    `outcome`: "correct", "wrong", "no_answer", "timeout" (killed at the deadline) or "error" (could not be
    graded). `answer`: the extracted text, None if there is none. `method`: the tier that decided, or the
    reason. `seconds`: time the comparison took in its worker; 0.0 when it was settled in this process.
    `second`, `second_method`: what another method found in an audit (`verify.audit`), "" without one; never
    part of a reward.
    """

    outcome: Outcome
    answer: str | None
    method: str
    seconds: float = 0.0
    second: Outcome | Literal[""] = ""
    second_method: str = ""

    @property
    def correct(self) -> bool:
        """Whether the answer was graded as right."""
        return self.outcome == "correct"


@dataclass(frozen=True)
class SymbolicQuestion:
    """A comparison that text alone cannot settle: both sides normalised, safe to hand to a worker.

    `method`: "symbolic" decides; an audit asks "plain" (both sides as they are written) or "numeric".
    `others`: further gold answers, one of which is enough.
    """

    gold: str
    answer: str
    method: Literal["symbolic", "plain", "numeric"] = "symbolic"
    others: tuple[str, ...] = ()


# --- deciding

_EXPLOSIVE = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\d{{{MAX_DIGITS},}}",  # a number nobody writes
        r"\d{5,}\s*[)}\]]*\s*!",  # 99999!
        r"!\s*[)}\]]*\s*!",  # (9!)!
        r"\([^()]*\^[^()]*\)\s*!",  # (10^8)!
        r"\^\s*[{(]?\s*-?\s*\(?\s*\d{5,}",  # 2^{99999}
        r"\^\s*[{(][^{}]*!",  # 9^{9!}
        r"\\[dt]?binom\s*\{[^{}]*(\^|\d{5,})",
        r"\\(sum|prod)[^\\]*\^\s*\{?\s*\d{5,}",
    )
)
_NUMERIC_POWER = re.compile(r"[\^]\s*[{(]*\s*(\d+)\s*\^\s*[{(]*\s*(\d+)")


def _power_depth(text: str) -> int:
    """How deep exponents are stacked: 1 for `x^2+y^2`, 2 for `e^{x^2}` and `9^9^9`."""
    deepest = 0
    groups: list[bool] = []  # one for each open brace or parenthesis: whether it opens an exponent
    chain = 0  # stacked exponents without braces: the `^9^9` of `9^9^9`
    after_caret = False
    for symbol in text:
        if symbol == "^":
            chain += 1
            deepest = max(deepest, sum(groups) + chain)
            after_caret = True
        elif symbol in "{(":
            groups.append(after_caret)
            after_caret, chain = False, 0
        elif symbol in "})":
            chain = 1 if groups and groups.pop() else 0
            after_caret = False
        elif not symbol.isspace():
            if not after_caret and not symbol.isdigit():
                chain = 0
            after_caret = False
    return deepest


def is_too_complex(text: str) -> bool:
    """A quick look that refuses what could take for ever or fill the memory: length, depth, towers,
    factorials.
    """
    if (
        len(text) > MAX_SYMBOLIC_CHARS
        or text.count("^") > MAX_CARETS
        or text.count("{") > MAX_BRACES
        or max(text.count("("), text.count("["), text.count(r"\langle")) > MAX_PARENTHESES
    ):
        return True
    text = text.replace("**", "^")
    if _power_depth(text) > MAX_POWER_DEPTH or any(pattern.search(text) for pattern in _EXPLOSIVE):
        return True
    return any(
        int(exponent[:9]) * math.log10(max(int(base[:9]), 1)) > MAX_LOG10_EXPONENT
        for base, exponent in _NUMERIC_POWER.findall(text)
    )


def compare_quickly(gold: str, answer: str) -> tuple[Outcome, str] | SymbolicQuestion:
    """Settle bare answers without algebra, or return the question that a worker must settle."""
    decided = _as_numbers(gold.strip(), answer.strip())
    if decided is not None:
        return decided
    gold_text, answer_text = normalise(gold), normalise(answer)
    if not answer_text:
        return "no_answer", "empty"
    if not gold_text:
        return "error", "empty_gold"
    if gold_text == answer_text or (
        len(gold_text) > 1
        and gold_text.casefold() == answer_text.casefold()
        and "_" not in gold_text
        and _is_text(gold_text)
    ):
        return "correct", "string"
    if (decided := _as_numbers(gold_text, answer_text)) is not None:
        return decided
    if is_too_complex(answer_text) or is_too_complex(gold_text):
        return "error", "too_complex"
    verdict = same(gold_text, answer_text)
    if verdict is None:
        return SymbolicQuestion(gold_text, answer_text)
    return ("correct" if verdict else "wrong"), "grammar"


def _is_text(text: str) -> bool:
    return text.startswith("\\text{")


def _as_numbers(gold: str, answer: str) -> tuple[Outcome, str] | None:
    """The verdict where both are rational numbers in plain notation."""
    one = exact_rational(gold)
    other = exact_rational(answer) if one is not None else None
    if one is None or other is None:
        return None
    if one == other:
        return "correct", "string" if gold == answer else "rational"
    if ("." in gold) != ("." in answer) and (is_rounding_of(gold, other) or is_rounding_of(answer, one)):
        return "correct", "rounded"
    return "wrong", "rational"


def decide_quickly(gold: str | Sequence[str], response: str) -> tuple[Extraction, Verdict | SymbolicQuestion]:
    """Extract the answer from a whole response and settle it if text and exact rationals can.

    `gold`: the gold answer, or several, one of which is enough. Returns what was extracted and either the
    verdict or the question for a worker. Never runs long: linear in the text.
    """
    found = extract_answer(response)
    if found.answer is None:
        return found, Verdict("no_answer", None, found.source)
    golds = [gold_answer(each) for each in ([gold] if isinstance(gold, str) else gold)]
    decided = _first_decision([(each, found.answer) for each in golds])
    if found.boxes and isinstance(decided, tuple) and decided[0] == "wrong":
        joined = list_of_boxes(found.boxes)
        lists = [each for each in golds if counts_members(each) == len(found.boxes)]
        if lists:
            decided = _first_decision([(each, joined) for each in lists])
    if isinstance(decided, SymbolicQuestion):
        return found, decided
    outcome, method = decided
    return found, Verdict(outcome, None if outcome == "no_answer" else found.answer, method)


def _first_decision(pairs: Sequence[tuple[str, str]]) -> tuple[Outcome, str] | SymbolicQuestion:
    """The decision on (gold, answer) pairs, one of which is enough."""
    decided = [compare_quickly(one, other) for one, other in pairs]
    if not decided:
        return "error", "empty_gold"
    settled = [each for each in decided if isinstance(each, tuple)]
    if right := next((each for each in settled if each[0] == "correct"), None):
        return right
    questions = [each for each in decided if isinstance(each, SymbolicQuestion)]
    if questions:
        first, *others = questions
        return SymbolicQuestion(first.gold, first.answer, others=tuple(each.gold for each in others))
    return next((each for each in settled if each[0] == "error"), settled[0])


# --- the same equality between any two answers


def same_answer(one: str, other: str) -> bool | None:
    """Whether two answers, as they are written, are the same: what the reward says of `other` where `one` is
    the gold answer. None where only algebra can tell; never runs long."""
    decided = compare_quickly(one, other)
    return decided[0] == "correct" if isinstance(decided, tuple) else None


def classes(answers: Sequence[str], equal: Callable[[str, str], bool | None] = same_answer) -> list[int]:
    """For each answer the place of the first one that is the same: what a majority vote counts."""
    first: list[int] = []
    known: dict[str, int] = {}
    for place, answer in enumerate(answers):
        if answer not in known:
            found = (each for each in dict.fromkeys(first) if equal(answers[each], answer))
            known[answer] = next(found, place)
        first.append(known[answer])
    return first
