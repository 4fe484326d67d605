r"""A second way to compare two answers that shares nothing with sympy: read both, and compare their numbers.

`compare_numerically` reads the LaTeX of an answer itself and evaluates it in double precision at fixed points
(a variable has a value of its own at each): answers that differ anywhere are different, and those equal at
all points to 9 digits are taken for equal. It serves the audit of verdicts (`verify.audit`), never a reward.
What it cannot read, or cannot tell in double precision, is "error": no opinion.

    scalars     numbers, one-letter variables, + - * / ^ !, \frac, \sqrt, \binom, |x|, functions, pi, e, i
    lists       (a, b) in order with their brackets; \{a, b\} and `a, b` in any order
    equations   `x = 5`: the right sides; two names on the left must be the same

Time is linear in the text: floating-point powers and factorials overflow, they do not grow.
"""

from __future__ import annotations

import cmath
import math
import re
import zlib
from collections.abc import Callable

from phi4r.verify.strict import Outcome, SymbolicQuestion

NUM_POINTS = 3
TOLERANCE = 1e-9

_TOKEN = re.compile(r"\s*(\d+\.?\d*|\.\d+|\\[a-zA-Z]+|\\.|\S)")
_TRAILING_UNIT = re.compile(r"(?:\\[ ,;]|\s)*(?:\\(?:text|mathrm|textbf)\{[^{}]*\}|\^\{?\\circ\}?|\\ )+$")
_OPENING, _CLOSING = ("(", "[", r"\{", "{", r"\lbrace"), (")", "]", r"\}", "}", r"\rbrace")
_CONSTANTS = {r"\pi": math.pi, "e": math.e, "i": 1j}
_GREEK = (r"\alpha", r"\beta", r"\gamma", r"\theta", r"\lambda", r"\mu", r"\phi", r"\omega", r"\sigma")


def _cot(value: complex) -> complex:
    return 1 / cmath.tan(value)


_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    r"\sin": cmath.sin, r"\cos": cmath.cos, r"\tan": cmath.tan, r"\cot": _cot,
    r"\sec": lambda x: 1 / cmath.cos(x), r"\csc": lambda x: 1 / cmath.sin(x),
    r"\arcsin": cmath.asin, r"\arccos": cmath.acos, r"\arctan": cmath.atan,
    r"\sinh": cmath.sinh, r"\cosh": cmath.cosh, r"\tanh": cmath.tanh,
    r"\exp": cmath.exp, r"\ln": cmath.log,
}  # fmt: skip
_INVERSES = {r"\sin": cmath.asin, r"\cos": cmath.acos, r"\tan": cmath.atan}


class _UnreadableError(Exception):
    """This text is not what this module reads. Never leaves it."""


def _factorial(value: complex) -> complex:
    whole = round(value.real)
    if abs(value - whole) > TOLERANCE or whole < 0:
        raise _UnreadableError
    return math.gamma(whole + 1)


def _variable(name: str, point: int) -> float:
    """A value for the variable `name`: between 0.3 and 1.9 at point 0, and less than 0 at point 1."""
    size = 0.3 + 1.6 * zlib.crc32(f"{name} {point}".encode()) / 2**32
    return -size if point == 1 else size


class _Reader:
    """Evaluates the tokens of one scalar at one point, as it reads them."""

    def __init__(self, tokens: list[str], point: int) -> None:
        self.tokens, self.point, self.place = tokens, point, 0

    def value(self) -> complex:
        """The value of all tokens."""
        value = self.sum()
        if self.place != len(self.tokens):
            raise _UnreadableError
        return value

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise _UnreadableError
        self.place += 1
        return token

    def sum(self) -> complex:
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value += sign * self.product()
        return value

    def product(self) -> complex:
        if self.peek() in ("+", "-"):
            return (1 if self.take() == "+" else -1) * self.product()
        value, divided = self.power(), False
        while token := self.peek():
            if token in ("*", r"\cdot", r"\times"):
                self.take()
                value *= self.signed()
            elif token in ("/", r"\div"):
                self.take()
                value, divided = value / self.signed(), True
            elif self.starts_factor(token) and not divided:
                value *= self.power()
            elif self.starts_factor(token):
                raise _UnreadableError  # 1/2x: people mean either
            else:
                break
        return value

    def signed(self) -> complex:
        if self.peek() == "-":
            self.take()
            return -self.power()
        return self.power()

    def starts_factor(self, token: str) -> bool:
        return token[0] in "([{" or token[0].isalpha() or (
            token[0] == "\\" and token not in (*_CLOSING, r"\cdot", r"\times", r"\div")
        )  # fmt: skip

    def power(self) -> complex:
        value = self.atom()
        while self.peek() == "!":
            self.take()
            value = _factorial(value)
        if self.peek() == "^":
            self.take()
            exponent = self.group()
            if exponent.imag == 0 and value.imag == 0 and value.real < 0 and exponent.real % 1:
                raise _UnreadableError  # a real root or a complex one
            value = value**exponent
        return value

    def group(self) -> complex:
        """An argument of a command: a braced expression or one token (of a number its first digit)."""
        token = self.peek()
        if token == "{":
            return self.bracketed("}")
        if token == "-":
            raise _UnreadableError
        if token[:1].isdigit():
            self.tokens[self.place : self.place + 1] = [token[0], *([token[1:]] if token[1:] else [])]
            return complex(float(self.take()))
        return self.atom()

    def bracketed(self, closing: str) -> complex:
        self.take()
        value = self.sum()
        self.take(closing)
        return value

    def atom(self) -> complex:
        token = self.peek()
        if token[:1].isdigit() or (token[:1] == "." and len(token) > 1):
            return self.number()
        if token in ("(", "[", "{"):
            return self.bracketed({"(": ")", "[": "]", "{": "}"}[token])
        if token == "|":
            return abs(self.bracketed("|"))
        if token in _CONSTANTS:
            self.take()
            return complex(_CONSTANTS[token])
        if token in _GREEK or (len(token) == 1 and token.isascii() and token.isalpha()):
            return self.variable()
        return self.command()

    def number(self) -> complex:
        token = self.take()
        value = float(token)
        if self.peek() == "_":
            raise _UnreadableError  # a number in another base
        if self.peek()[:1].isdigit():
            raise _UnreadableError
        if token.isdigit() and self.peek() == r"\frac":
            before = self.place
            fraction = self.command()
            if all(part.isdigit() or part in "{}" for part in self.tokens[before + 1 : self.place]):
                return value + fraction  # a mixed number
            return value * fraction
        return complex(value)

    def variable(self) -> complex:
        name = self.take()
        if self.peek() == "_":
            self.take()
            if self.peek() == "{":
                start = self.place
                self.place = self.tokens.index("}", start) + 1 if "}" in self.tokens[start:] else start
                name += "_" + "".join(self.tokens[start + 1 : self.place - 1])
            else:
                name += "_" + self.take()
        return _variable(name, self.point)

    def command(self) -> complex:
        name = self.take()
        if name in (r"\frac", r"\dfrac", r"\tfrac"):
            return self.group() / self.group()
        if name in (r"\binom", r"\dbinom"):
            n, k = self.group(), self.group()
            return _factorial(n) / _factorial(k) / _factorial(n - k)
        if name == r"\sqrt":
            degree = self.bracketed("]") if self.peek() == "[" else 2.0
            radicand = self.group()
            if degree != 2 and (radicand.imag or radicand.real < 0):
                raise _UnreadableError
            return cmath.sqrt(radicand) if degree == 2 else radicand ** (1 / degree)
        if name == r"\log":
            base: complex | None = None
            if self.peek() == "_":
                self.take()
                base = self.group()
            if base is None:
                raise _UnreadableError  # natural or decimal
            return cmath.log(self.argument()) / cmath.log(base)
        if name in _FUNCTIONS:
            exponent: complex = 1
            if self.peek() == "^":
                self.take()
                exponent = self.group()
            if exponent == -1 and name in _INVERSES:
                return _INVERSES[name](self.argument())
            return _FUNCTIONS[name](self.argument()) ** exponent
        raise _UnreadableError

    def argument(self) -> complex:
        r"""What a function is applied to: a bracket, or the factors up to the next sign: \sin 2x."""
        if self.peek() in ("(", "{", "["):
            return self.atom()
        value = self.power()
        while self.starts_factor(self.peek() or ")") and self.peek() not in _FUNCTIONS:
            value *= self.power()
        return value


# --- whole answers


def _split(tokens: list[str], at: str) -> list[list[str]]:
    """The tokens between the separators `at` outside all brackets."""
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token in _OPENING) - (token in _CLOSING)
        if token == at and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _read(text: str) -> tuple[str, str, list[list[str]]]:
    """(name on the left of an equation or "", kind of list, tokens of each member). A scalar has the kind
    ""."""
    if "%" in text or r"\pm" in text:
        raise _UnreadableError  # two values at once
    tokens = [token for token in _TOKEN.findall(_TRAILING_UNIT.sub("", text)) if token not in (r"\,", r"\ ")]
    sides = _split(tokens, "=")
    name = ""
    if len(sides) == 2 and len(sides[0]) == 1 and sides[0][0].isalpha():
        name, tokens = sides[0][0], sides[1]
    elif len(sides) > 1:
        raise _UnreadableError
    kind = ""
    if len(tokens) > 1 and tokens[0] in ("(", "[", r"\{") and tokens[-1] in (")", "]", r"\}"):
        inner = _split(tokens[1:-1], ",")
        if len(inner) > 1 or tokens[0] == r"\{":
            return name, "set" if tokens[0] == r"\{" else tokens[0] + tokens[-1], inner
    members = _split(tokens, ",")
    if len(members) > 1:
        kind = "set"
    return name, kind, members


def _close(one: complex, other: complex) -> bool:
    if not (cmath.isfinite(one) and cmath.isfinite(other)):
        raise _UnreadableError
    size = max(abs(one), abs(other))
    if abs(one - other) <= TOLERANCE * size:
        return True
    if size < TOLERANCE:
        raise _UnreadableError  # nothing, or what rounding left of it
    return False


def _same(gold: str, answer: str) -> bool:
    gold_name, gold_kind, golds = _read(gold)
    name, kind, members = _read(answer)
    if gold_name and name and gold_name != name:
        return False
    if gold_kind != kind and not {gold_kind, kind} <= {"()", "(]", "[)", "[]"}:
        raise _UnreadableError
    if gold_kind != kind or len(golds) != len(members):
        return False
    for point in range(NUM_POINTS):
        try:
            if not _same_at(point, golds, members, ordered=kind != "set"):
                return False
        except (_UnreadableError, ArithmeticError, ValueError):
            if point == 0:
                raise  # elsewhere it is outside the domain of ln x or x^{1/2}
    return True


def _same_at(point: int, golds: list[list[str]], members: list[list[str]], ordered: bool) -> bool:
    left = [_Reader(list(tokens), point).value() for tokens in golds]
    right = [_Reader(list(tokens), point).value() for tokens in members]
    for value in left:
        found = next((each for each in (right[:1] if ordered else right) if _close(value, each)), None)
        if found is None:
            return False
        right.remove(found)
    return True


def compare_numerically(question: SymbolicQuestion) -> tuple[Outcome, str]:
    """("correct" or "wrong", "numeric"), or ("error", "numeric_unread") where there is no opinion."""
    try:
        return ("correct" if _same(question.gold, question.answer) else "wrong"), "numeric"
    except (_UnreadableError, ArithmeticError, ValueError):
        return "error", "numeric_unread"
