r"""A number or expression with its unit: `15 \text{cm}^2`, `\$5`, `90^\circ`, `1 hour 30 minutes`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from fractions import Fraction

from phi4r.verify.nodes import Node, Opaque, Scalar
from phi4r.verify.numbers import number, words_value
from phi4r.verify.units import PERCENT, Unit, is_currency, unit_of

_TAIL = re.compile(
    r"(?:\\text\{[^{}]*\}\.?|[ /]|\\cdot(?![a-zA-Z])|%|\^ ?\{? ?-?\d ?\}?(?=[^\d]|$)"
    r"|\^\\circ ?[CF]?(?![a-zA-Z]))++$"
)
_MONEY = re.compile(r"([+-]?) ?\\text\{([A-Za-z]+)\}\.? ?(.*)", re.DOTALL)
_SEXAGESIMAL = re.compile(r"(\d+) ?\^\\circ ?(\d+(?:\.\d+)?) ?'(?: ?(\d+(?:\.\d+)?) ?(?:''|\"))?")
_ORDINAL = re.compile(r"\^ ?\{? ?\\text\{(?:st|nd|rd|th)\} ?\}?")
_UNIT_FRACTION = re.compile(
    r"\\frac\{((?=\s*\\text)(?:\\text\{[^{}]*\}|[ ^\d])+)\}\{((?=\s*\\text)(?:\\text\{[^{}]*\}|[ ^\d])+)\}"
)
_QUANTITY = re.compile(r"\d[\d./]*(?: ?\\text\{[^{}]*\})+")
_TRIGONOMETRY = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|cis)(?![a-z])")


def scalar(text: str) -> Node:
    """An expression with its unit, or Opaque."""
    core, unit = _ORDINAL.sub(r" \\text{th}", text).strip(), None
    if r"\frac" in core and "\\text" in core:
        core = _UNIT_FRACTION.sub(r"\1/\2", core)
    parts = _QUANTITY.findall(core)
    if len(parts) > 1 and not _QUANTITY.sub("", core).strip(" ,"):
        return total([scalar(part) for part in parts]) or Opaque(text)
    if _TRIGONOMETRY.search(core) and r"\circ" in core:
        return Scalar(core)
    if found := _SEXAGESIMAL.fullmatch(core):
        degrees = Fraction(found[1]) + Fraction(found[2]) / 60 + Fraction(found[3] or 0) / 3600
        return Scalar(str(degrees), unit_of(r"\text{degree}"))
    if (money := _MONEY.match(core)) and is_currency(money[2]) and money[3]:
        core, unit = (money[1] + money[3]).strip(), unit_of(rf"\text{{{money[2]}}}")
    if tail := _TAIL.search(core):
        end, start = tail[0], tail.start()
        while (start < len(core) and core[start] in " /") or core[start : start + 5] == r"\cdot":
            start += 5 if core[start] == "\\" else 1
        # A number, not a power of one: 5^2 has no unit.
        cut = _unit_start(core, tail.start())
        if cut is not None and core[:cut].strip():
            found_unit = _read_unit(core[cut:])
            value = core[:cut].strip()
            if found_unit is not None and (
                number(value) is not None or "\\text" not in value or not end.strip()
            ):
                if unit is None:
                    unit = found_unit if found_unit != Unit(()) else None
                core = value
            elif found_unit is not None and number(value + core[cut:]) is None:
                inner = scalar(value)
                if isinstance(inner, Scalar) and inner.unit is None:
                    core, unit = inner.text, found_unit
    if "\\text" in core and number(core) is None:
        bare = re.sub(r"\\text\{([a-zA-Z])\}", r"\1", core)
        if "\\text" in bare:
            return Opaque(text)
        core = bare
    return Scalar(core, unit)


def total(parts: Sequence[Node]) -> Scalar | None:
    """One quantity given in several units: `1 hour 30 minutes`; None where they are no such parts."""
    units = [part.unit for part in parts if isinstance(part, Scalar) and part.unit and part.unit.dimension]
    values = [number(part.text) for part in parts if isinstance(part, Scalar)]
    if len(units) != len(parts) or len({unit.dimension for unit in units}) > 1 or None in values:
        return None
    if any(one.factor <= other.factor for one, other in itertools.pairwise(units)):
        return None
    size = sum((value or 0) * unit.factor for value, unit in zip(values, units, strict=True))
    return Scalar(str(Fraction(size) / units[0].factor), units[0])


def _unit_start(core: str, start: int) -> int | None:
    r"""Where the unit begins in the tail that starts at `start`: at its first \text, degree or percent sign;
    a number word that scales (`million`) belongs to the number."""
    for match in re.finditer(r"\\text\{([^{}]*)\}|\^\\circ|%", core[start:]):
        place = start + match.start()
        word = (match[1] or "").lower().rstrip("s") if match[1] else ""
        if word in ("million", "billion", "thousand", "hundred", "trillion", "dozen"):
            continue
        if word and words_value([word]) is not None:
            continue
        if word in ("th", "st", "nd", "rd") and place and core[place - 1] in "{^":
            continue
        return place
    return None


def _read_unit(text: str) -> Unit | None:
    text = text.replace(r"^\circ", r"\text{degree}")
    if temperature := re.fullmatch(
        r"\s*\\text\{degrees?\} ?(?:\\text\{)?(C|F|celsius|fahrenheit)\}?\s*", text, re.IGNORECASE
    ):
        name = "celsius" if temperature[1][0].lower() == "c" else "fahrenheit"
        return unit_of(rf"\text{{{name}}}")
    return unit_of(text)


def is_percent(node: Scalar) -> bool:
    """Whether a scalar is a percentage."""
    return node.unit == PERCENT
