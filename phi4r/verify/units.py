r"""Units after (or, of money, before) a number: what they measure and how large they are.

`unit_of` reads the text behind a number, words as `\text{word}`: `\text{cm}^2`, `\text{miles} \text{per}
\text{hour}`, `^\circ`, `%`. Units that are known are a dimension and a factor, so that 50 mm are 5 cm, and
5 cm are no 5 m. Others (`\text{students}`) are a name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_TABLE = """
length m 1: m meter metre
length 1/100: cm centimeter centimetre
length 1/1000: mm millimeter millimetre
length 1/10: dm decimeter decimetre
length 1000: km kilometer kilometre
length 1/1000000: micrometer micron um
length 1/1000000000: nm nanometer nanometre
length 254/10000: inch inche in
length 3048/10000: ft foot feet
length 9144/10000: yd yard
length 1609344/1000: mi mile
mass 1: g gram gramme
mass 1000: kg kilogram kilo
mass 1/1000: mg milligram
mass 1000000: tonne
mass 45359237/100000: lb pound
mass 45359237/1600000: oz ounce
mass 907184740/1000: ton
time 1: s sec second
time 60: min minute
time 3600: h hr hour
time 86400: day
time 604800: week
time 1/1000: ms millisecond
month 1: month
month 12: yr year
month 120: decade
month 1200: century centurie
volume 1: l liter litre
volume 1/1000: ml milliliter millilitre
volume 1/100: cl centiliter
volume 1/10: dl deciliter
volume 3785411784/1000000000: gal gallon
volume 946352946/1000000000: qt quart
volume 473176473/1000000000: pint
usd 1: usd dollar buck
usd 1/100: cent
eur 1: eur euro
gbp 1: gbp
jpy 1: jpy yen
inr 1: inr rupee rs
rub 1: rub ruble rouble
cny 1: cny yuan rmb
angle 1: degree deg
angle 1/60: arcmin arcminute
radian 1: rad radian
temperature-c 1: celsius
temperature-f 1: fahrenheit
temperature-k 1: kelvin
energy 1: j joule
energy 1000: kj kilojoule
power 1: w watt
power 1000: kw kilowatt
force 1: n newton
force 1000: kn
pressure 1: pa pascal
pressure 1000: kpa
frequency 1: hz hertz
frequency 1000: khz
charge 1: c coulomb
voltage 1: v volt
current 1: a ampere amp
resistance 1: ohm
amount 1: mol mole
data 1: byte
data 1024: kb kilobyte
data 1048576: mb megabyte
data 1073741824: gb gigabyte
area-ha 1: ha hectare
area-acre 1: acre
"""
# Words that add nothing: `years old`, `cm long`, `square units`, `people in total`.
_FILLERS = frozenset(
    str.split(
        "old long wide tall high deep away of in the total altogether unit each more less left ago later"
        " about"
        " approximately exactly only all units"
    )
)
_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
_COMPOUND = {
    "mph": ("mile", "hour"), "kph": ("km", "hour"), "kmh": ("km", "hour"), "kmph": ("km", "hour"),
    "mps": ("m", "s"), "fps": ("ft", "s"), "bps": ("bit", "s"), "rpm": ("revolution", "min"),
}  # fmt: skip
# Read as a unit in plain mathematics only behind \text: m, s, ... are variables as well.
_TOKEN = re.compile(r"\\text\{([^{}]*)\}\.?|\^ ?\{? ?(-?\d) ?\}?|(/)|\\cdot|\*|(-)| ")


def _known() -> dict[str, tuple[str, Fraction]]:
    table = {}
    for line in _TABLE.strip().splitlines():
        head, _, names = line.partition(":")
        dimension, *_, factor = head.split()
        for name in names.split():
            table[name] = (dimension, Fraction(factor))
    return table


_UNITS = _known()
_CURRENCIES = frozenset(("usd", "eur", "gbp", "jpy", "inr", "rub", "cny"))


@dataclass(frozen=True)
class Unit:
    """dimension: sorted (base, power) pairs, empty where only `name` is known; factor: size in base units;
    name: the words, singular, for units that no table has."""

    dimension: tuple[tuple[str, int], ...]
    factor: Fraction = Fraction(1)
    name: str = ""


PERCENT = Unit((("percent", 1),))


def singular(word: str) -> str:
    """A word in lower case without the ending of its plural."""
    low = word.lower()
    if low in _UNITS or len(low) < 4:
        return low
    if low.endswith("ies"):
        return low[:-3] + "y"
    if low.endswith(("ches", "shes", "xes", "sses")):
        return low[:-2]
    return low[:-1] if low.endswith("s") and not low.endswith("ss") else low


def unit_of(text: str) -> Unit | None:
    """The unit that `text` is, a Unit without dimension and name where it says nothing (`units`), or None
    where it is no unit at all."""
    text = text.strip()
    if text in ("%", r"\%"):
        return PERCENT
    place, sign, pending, last = 0, 1, 1, ""
    dimension: dict[str, int] = {}
    factor, names = Fraction(1), list[str]()

    def multiply(base: str, size: Fraction, power: int) -> None:
        nonlocal factor
        dimension[base] = dimension.get(base, 0) + power
        factor *= size**power

    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            return None
        place = match.end()
        word, power, slash, dash = match[1], match[2], match[3], match[4]
        if slash:
            sign = -1
        elif power:
            if last not in _UNITS:
                continue  # `units^2`, `tiles^2`
            base, size = _UNITS[last]
            signed = -1 if dimension[base] < 0 else 1
            wanted = int(power) if signed > 0 or int(power) < 0 else -int(power)
            if int(power) < 0 and signed > 0:
                multiply(base, size, int(power) - 1)
            else:
                multiply(base, size, wanted - signed)
        elif word and not dash:
            low = word.lower()
            name = singular(word)
            if low == "per":
                sign = -1
            elif low in ("percent", "pct") or (low == "cent" and sign < 0 and not dimension and not names):
                return PERCENT
            elif low in _POWERS:
                if low in ("squared", "cubed") and last in _UNITS:
                    base, size = _UNITS[last]
                    multiply(base, size, _POWERS[low] - 1)
                else:
                    pending = _POWERS[low]
            elif low in _COMPOUND:
                above, below = _COMPOUND[low]
                for each, one in ((above, 1), (below, -1)):
                    base, size = _UNITS.get(each, (each, Fraction(1)))
                    multiply(base, size, one)
                last = ""
            elif low in ("m", "M") and word == "M":
                names.append(low)
            elif (low in _UNITS or name in _UNITS) and not (names and low in _FILLERS):
                last = low if low in _UNITS else name
                if last in _FILLERS and (dimension or names):
                    last = ""
                    continue
                base, size = _UNITS[last]
                multiply(base, size, sign * pending)
                pending = 1
            elif low in _FILLERS or name in _FILLERS:
                continue
            else:
                if len(word) == 1 or low in ("and", "or", "to", "not", "by", "if", "when", "but"):
                    return None
                if dimension:
                    continue  # `dollars profit`, `cm of rope`
                names.append(("/" if sign < 0 else "") + name)
    if dimension:
        kept = {base: power for base, power in dimension.items() if power}
        if len(kept) == 1 and kept.get("length") == 3:
            kept, factor = {"volume": 1}, factor * 1000
        return Unit(tuple(sorted(kept.items())), factor)
    return Unit((), name=" ".join(names))


def is_currency(word: str) -> bool:
    """Whether a word is money: `USD`, `Rs`, `dollars`."""
    name = singular(word)
    return name in _UNITS and _UNITS[name][0] in _CURRENCIES
