r"""Comparing an answer with the gold answer: cheap exact tiers first, symbolic algebra last and never in
this process.

`decide_quickly` settles, with text and `fractions.Fraction` only:

1. no answer found                                  -> no_answer
2. equal after normalising the notation             -> correct   ("string")
3. both are rational numbers in plain notation      -> exact comparison ("rational"); a decimal of six or more
                                                       significant digits may be the other's rounding
                                                       ("rounded"); a percentage equals both `7` and `0.07`
                                                       ("percentage"): problems state them either way
4. one of them is a plain word                      -> wrong     ("word"): words are equal as strings or not
5. too long, too deep, too explosive to evaluate    -> error     ("too_complex"): not graded, so not "wrong"
6. several answers where one is asked for           -> wrong     ("list"): `7,8`, and `7,7` too
7. different number bases (`1010_2`, `1010_3`)      -> wrong     ("subscript")

What is left needs `compare_symbolically` (math-verify, in a worker process), "symbolic": correct or wrong,
positives re-checked, because math-verify compares floating-point numbers at about 6 digits (it takes 1/2^99
for 1/2^98). A number base that only one side names is overlooked: problems state them either way.
"unparsed": an answer that is not mathematics is wrong; a gold answer that is not is an error of the data.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from phi4r.verify.extract import Extraction, extract_answer, gold_answer, strip_outer_braces

Outcome = Literal["correct", "wrong", "no_answer", "timeout", "error"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "no_answer", "timeout", "error")

# Above these a text is compared as a string only.
MAX_SYMBOLIC_CHARS = 1000
MAX_DIGITS = 400
MAX_CARETS = 24
MAX_BRACES = 150
MAX_PARENTHESES = 100
MAX_POWER_DEPTH = 2
# Of a numeric exponent that is itself a power, as in 9^{9^9}.
MAX_LOG10_EXPONENT = 4.0

# A decimal must show this many significant digits before it may stand for the exact number it rounds.
MIN_ROUNDED_DIGITS = 6


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
    """

    gold: str
    answer: str
    method: Literal["symbolic", "plain", "numeric"] = "symbolic"


# --- normalising

_UNICODE = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "÷": r"\div ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "\u00a0": " ",
    }
)
_DROPPED = re.compile(r"\\(?:left|right|displaystyle|limits)(?![a-zA-Z])|\\[!,;:]")
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,;: ]|\{,\}|,)(?=\d{3}(?!\d))")
_GROUPED_NUMBER = re.compile(r"[+-]?\d{1,3}(?:(?:\\[,;: ]|\{,\}|,)\d{3})+(?:\.\d+)?")
_WRAPPER = re.compile(r"\\(?:text|mathrm|textbf|mathbf|operatorname)\{([^{}]*)\}")
_ROMAN_LETTER = re.compile(r"\\(?:mathrm|text|rm)\{([a-zA-Z])\}")
_SPACES = re.compile(r"\s+")


def normalise(answer: str) -> str:
    """One notation for the same text: dollar signs, spacing commands, `\\dfrac`, thousands separators, a
    final stop.
    """
    text = answer.translate(_UNICODE).strip()
    if text.startswith("**") and text.endswith("**") and len(text) > 4:
        text = text[2:-2].strip()
    text = text.replace(r"\$", "").rstrip(". ").strip("$").lstrip("= ").rstrip()
    if _GROUPED_NUMBER.fullmatch(text.rstrip(".")):
        return _THOUSANDS.sub("", text.rstrip("."))
    text = _DROPPED.sub("", text).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    text = _ROMAN_LETTER.sub(r"\1", text)
    text = _SPACES.sub(" ", text).strip().rstrip(".").strip()
    whole = _WRAPPER.fullmatch(text)
    return strip_outer_braces(whole.group(1) if whole else text)


def _same_string(gold: str, answer: str) -> bool:
    if gold.replace(" ", "") == answer.replace(" ", ""):
        return True
    return len(gold) > 1 and _is_word(gold) and gold.casefold() == answer.casefold()


def _is_word(text: str) -> bool:
    """Two or more letters and nothing but letters and blanks: `blue`, `not enough`; never a variable such
    as `x`.
    """
    return len(text) > 1 and text.replace(" ", "").isalpha() and re.search(r"[^\W\d_]{2,}", text) is not None


_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_SLASH = re.compile(r"([+-]?\d+) ?/ ?(\d+)")
_FRAC = re.compile(r"([+-]?) ?\\frac ?(?:\{ ?([+-]?\d+) ?\}|(\d)) ?(?:\{ ?([+-]?\d+) ?\}|(\d))")


def exact_rational(text: str) -> Fraction | None:
    r"""The exact value of an integer, decimal, `a/b` or `\frac{a}{b}` of at most `MAX_DIGITS` characters,
    else None.
    """
    if len(text) > MAX_DIGITS or not text.isascii():
        return None
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    if slash := _SLASH.fullmatch(text):
        return Fraction(int(slash[1]), int(slash[2])) if int(slash[2]) else None
    if frac := _FRAC.fullmatch(text):
        numerator, denominator = int(frac[2] or frac[3]), int(frac[4] or frac[5])
        return (-1 if frac[1] == "-" else 1) * Fraction(numerator, denominator) if denominator else None
    return None


_PERCENTAGE = re.compile(r"(.+?) ?\\?%")


def _same_percentage(gold: str, answer: str) -> bool | None:
    """Whether a percentage equals the other side, a rational number that is one too, or is meant as one (`7`)
    or as its value (`0.07`); None where this is no such pair."""
    sides = [_PERCENTAGE.fullmatch(text) for text in (gold, answer)]
    texts = [side[1] if side else text for side, text in zip(sides, (gold, answer), strict=True)]
    one, other = map(exact_rational, texts)
    if one is None or other is None or not any(sides):
        return None
    if all(sides):
        return one == other
    percent, plain = (one, other) if sides[0] else (other, one)
    return plain in (percent, percent / 100)


def _is_rounding_of(decimal: str, exact: Fraction) -> bool:
    """Whether `decimal`, as printed, is `exact` rounded to its last place, with enough significant digits."""
    if "." not in decimal:
        return False
    places = len(decimal.rpartition(".")[2])
    significant = len(decimal.lstrip("+-").replace(".", "").lstrip("0"))
    return significant >= MIN_ROUNDED_DIGITS and abs(Fraction(decimal) - exact) <= Fraction(1, 2 * 10**places)


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
_SUBSCRIPT = re.compile(r"_\{?(\w+)\}?$")


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
        or text.count("(") > MAX_PARENTHESES
    ):
        return True
    text = text.replace("**", "^")
    if _power_depth(text) > MAX_POWER_DEPTH or any(pattern.search(text) for pattern in _EXPLOSIVE):
        return True
    return any(
        int(exponent[:9]) * math.log10(max(int(base[:9]), 1)) > MAX_LOG10_EXPONENT
        for base, exponent in _NUMERIC_POWER.findall(text)
    )


def _lists_several(text: str) -> bool:
    """Whether a comma stands outside all brackets, as in `7,8`: math-verify takes `7,7` for the set {7},
    and so for 7.
    """
    depth = 0
    for symbol in _THOUSANDS.sub("", text):
        depth += (symbol in "([{") - (symbol in ")]}")
        if symbol == "," and depth <= 0:
            return True
    return False


def compare_quickly(gold: str, answer: str) -> tuple[Outcome, str] | SymbolicQuestion:
    """Settle bare answers without algebra, or return the question that a worker must settle."""
    gold_text, answer_text = normalise(gold), normalise(answer)
    if not answer_text:
        return "no_answer", "empty"
    if not gold_text:
        return "error", "empty_gold"
    if _same_string(gold_text, answer_text):
        return "correct", "string"
    gold_value, answer_value = exact_rational(gold_text), exact_rational(answer_text)
    if gold_value is not None and answer_value is not None:
        if gold_value == answer_value:
            return "correct", "rational"
        if ("." in gold_text) != ("." in answer_text) and (
            _is_rounding_of(gold_text, answer_value) or _is_rounding_of(answer_text, gold_value)
        ):
            return "correct", "rounded"
        return "wrong", "rational"
    same_percentage = _same_percentage(gold_text, answer_text)
    if same_percentage is not None:
        return ("correct" if same_percentage else "wrong"), "percentage"
    if _is_word(gold_text) or _is_word(answer_text):
        return "wrong", "word"
    if is_too_complex(answer_text) or is_too_complex(gold_text):
        return "error", "too_complex"
    if "," not in gold_text and r"\pm" not in gold_text and _lists_several(answer_text):
        return "wrong", "list"
    gold_base, answer_base = _SUBSCRIPT.search(gold_text), _SUBSCRIPT.search(answer_text)
    if gold_base and answer_base and gold_base[1] != answer_base[1]:
        return "wrong", "subscript"
    return SymbolicQuestion(gold_text, answer_text)


def decide_quickly(gold: str, response: str) -> tuple[Extraction, Verdict | SymbolicQuestion]:
    """Extract the answer from a whole response and settle it if text and exact rationals can.

    Returns what was extracted and either the verdict or the question for a worker. Never runs long: linear
    in the text.
    """
    found = extract_answer(response)
    if found.answer is None:
        return found, Verdict("no_answer", None, found.source)
    decided = compare_quickly(gold_answer(gold), found.answer)
    if isinstance(decided, SymbolicQuestion):
        return found, decided
    outcome, method = decided
    return found, Verdict(outcome, None if outcome == "no_answer" else found.answer, method)
