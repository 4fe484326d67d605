r"""Numbers written out, read exactly: `7`, `-2\frac{1}{3}`, `0.1\overline{6}`, `3\times 10^5`, `1.5 million`.

Everything here is text to `fractions.Fraction`, linear in the text and bounded: an exponent of ten has at
most three digits. Roots, powers and factorials are algebra and not read here.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_DIGITS = 400
# A decimal must show this many significant digits before it may stand for the exact number it rounds.
MIN_ROUNDED_DIGITS = 6
# Digits that a double has: what a program prints (0.16666666666666666) may be off behind them.
DOUBLE_DIGITS = 15
MAX_EXPONENT = 400

_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_SLASH = re.compile(r"([+-]?\d+(?:\.\d+)?) ?/ ?([+-]?\d+(?:\.\d+)?)")
_BRACED = r"\{ ?([+-]? ?\d*\.?\d+) ?\}"
_FRAC = re.compile(rf"([+-]?) ?\\frac ?(?:{_BRACED}|(\d)) ?(?:{_BRACED}|(\d))")
_MIXED = re.compile(r"([+-]?) ?(\d+)(?: ?\\frac\{ ?(\d+) ?\}\{ ?(\d+) ?\}|(?: | ?\+ ?)(\d+) ?/ ?(\d+))")
_SCIENTIFIC = re.compile(
    r"([+-]? ?(?:\d+\.?\d*|\.\d+))? ?(?:\\times|\\cdot|\*|x"
    r"|(?<=\d)[eE])? ?(?:(?<![\d.])10 ?\^ ?\{? ?([+-]?\d{1,3}) ?\}?"
    r"|(?<=[eE])([+-]?\d{1,3}))"
)
_REPEATING = re.compile(
    r"([+-]?)(\d*)\.(\d*)(?:\\(?:overline|bar|overbar) ?\{?(\d+)\}?|\((\d+)\)|((?:\d\u0305)+))(?:\.\.\.)?"
)
_DOTTED = re.compile(r"([+-]?)(\d*)\.(\d*?)\\dot ?\{?(\d)\}?(?:(\d*)\\dot ?\{?(\d)\}?)?")
_TRAILING = re.compile(r"([+-]?)(\d*)\.(\d{2,})(?: ?\.\.\.)")
_WORD = re.compile(r"\\text\{([^{}]*)\}")
_WORDS_ONLY = re.compile(r"(?:\\text\{[^{}]*\}|[ -])+")

_UNITS = dict(
    zip(
        str.split(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
            " fifteen sixteen"
            " seventeen eighteen nineteen"
        ),
        range(20),
        strict=True,
    )
)
_TENS = dict(
    zip(str.split("twenty thirty forty fifty sixty seventy eighty ninety"), range(20, 100, 10), strict=True)
)
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALED = re.compile(r"(.+?) ?\\text\{(hundred|thousand|million|billion|trillion|dozen)s?\}", re.IGNORECASE)
_PARTS = {
    "half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10,
}  # fmt: skip


def exact_rational(text: str) -> Fraction | None:
    r"""The exact value of an integer, decimal, `a/b` or `\frac{a}{b}` of at most `MAX_DIGITS` characters,
    else None.
    """
    if len(text) > MAX_DIGITS or not text.isascii():
        return None
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    if slash := _SLASH.fullmatch(text):
        below = Fraction(slash[2])
        return Fraction(slash[1]) / below if below else None
    if frac := _FRAC.fullmatch(text):
        above, under = (
            Fraction((one or other).replace(" ", "")) for one, other in (frac.group(2, 3), frac.group(4, 5))
        )
        return (-1 if frac[1] == "-" else 1) * above / under if under else None
    return None


def number(text: str) -> Fraction | None:
    """The exact value of a number in any of the notations of this module, or None."""
    text = text.strip()
    if not text or len(text) > MAX_DIGITS:
        return None
    while text[0] == "(" and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
        if not text:
            return None
    if (plain := exact_rational(text)) is not None:
        return plain
    if text[0] in "+-" and len(text) > 1 and text[1] in " \\(":
        value = number(text[1:])
        return None if value is None else (-value if text[0] == "-" else value)
    if mixed := _MIXED.fullmatch(text):
        return _mixed(mixed)
    if found := _SCIENTIFIC.fullmatch(text):
        exponent = int(found[2] or found[3])
        lead = Fraction(found[1].replace(" ", "")) if found[1] else Fraction(1)
        return lead * Fraction(10) ** exponent if abs(exponent) <= MAX_EXPONENT else None
    if "." in text and (repeating := _repeating(text)) is not None:
        return repeating
    return _in_words(text) if "\\text" in text else None


def _mixed(match: re.Match[str]) -> Fraction | None:
    sign, whole, above, below = match[1], match[2], match[3] or match[5], match[4] or match[6]
    if int(below) == 0 or int(above) >= int(below):
        return None
    value = int(whole) + Fraction(int(above), int(below))
    return -value if sign == "-" else value


def _periodic(sign: str, whole: str, fixed: str, period: str) -> Fraction:
    nines = 10 ** len(period) - 1
    value = Fraction(int(whole or "0")) + Fraction(int(fixed or "0"), 10 ** len(fixed))
    value += Fraction(int(period), nines * 10 ** len(fixed))
    return -value if sign == "-" else value


def _repeating(text: str) -> Fraction | None:
    if found := _REPEATING.fullmatch(text):
        return _periodic(found[1], found[2], found[3], found[4] or found[5] or found[6].replace("\u0305", ""))
    if found := _DOTTED.fullmatch(text):
        period = found[4] if found[6] is None else found[4] + (found[5] or "") + found[6]
        return _periodic(found[1], found[2], found[3], period)
    if found := _TRAILING.fullmatch(text):
        digits = found[3]
        for size in range(1, len(digits) // 2 + 1):
            for start in range(0, min(3, len(digits) - 2 * size) + 1):
                tail, period = digits[start:], digits[start : start + size]
                if len(tail) >= max(3, 2 * size) and (period * len(tail))[: len(tail)] == tail:
                    return _periodic(found[1], found[2], digits[:start], period)
                if start and len(tail) >= 2 and size == 1 and len(set(tail)) == 1 and len(digits) >= 3:
                    return _periodic(found[1], found[2], digits[:start], period)
    return None


def words_value(words: list[str]) -> Fraction | None:
    """The value of number words: `twenty one`, `two hundred and five`, `one half`, `a dozen`, or None."""
    words = [part for word in words for part in word.lower().split("-") if part and part != "and"]
    if words[:1] in (["a"], ["an"]) and len(words) > 1:
        words[0] = "one"
    if not words or len(words) > 12:
        return None
    part = words[-1].removesuffix("s") if words[-1] not in ("halves",) else "half"
    if part in _PARTS and (words[:-1] or part == "half"):
        above = words_value(words[:-1]) if words[:-1] else Fraction(1)
        return None if above is None else above / _PARTS[part]
    if words[-1] == "dozen":
        count = words_value(words[:-1]) if words[:-1] else Fraction(1)
        return None if count is None else 12 * count
    total = current = 0
    last = ""
    for word in words:
        if word in _UNITS:
            if last == "unit" or (last == "ten" and _UNITS[word] > 9):
                return None
            current, last = current + _UNITS[word], "unit"
        elif word in _TENS:
            if last in ("unit", "ten"):
                return None
            current, last = current + _TENS[word], "ten"
        elif word == "hundred":
            current, last = max(current, 1) * 100, "hundred"
        elif word in _SCALES:
            total, current, last = total + max(current, 1) * _SCALES[word], 0, "scale"
        else:
            return None
    return Fraction(total + current)


def _in_words(text: str) -> Fraction | None:
    if _WORDS_ONLY.fullmatch(text):
        words = _WORD.findall(text)
        if words and words[0].lower() in ("minus", "negative"):
            value = words_value(words[1:])
            return None if value is None else -value
        return words_value(words)
    if scaled := _SCALED.fullmatch(text):
        value = number(scaled[1])
        factor = 12 if scaled[2].lower() == "dozen" else _SCALES[scaled[2].lower()]
        return None if value is None else value * factor
    return None


def is_rounding_of(decimal: str, exact: Fraction) -> bool:
    """Whether `decimal`, as printed, is `exact` rounded to its last place, with enough significant digits."""
    if "." not in decimal or not _DECIMAL.fullmatch(decimal):
        return False
    places = len(decimal.rpartition(".")[2])
    significant = len(decimal.lstrip("+-").replace(".", "").lstrip("0"))
    error = abs(Fraction(decimal) - exact)
    if significant >= DOUBLE_DIGITS and error <= abs(exact) / 10**DOUBLE_DIGITS:
        return True
    return significant >= MIN_ROUNDED_DIGITS and error <= Fraction(1, 2 * 10**places)
