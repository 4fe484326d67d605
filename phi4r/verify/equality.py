r"""Whether two answers say the same: the one equality of reward, majority votes and curation.

`same` compares two answers by their structure (`verify.reading`) and asks `leaf` about expressions. `leaf`
may say None: that takes algebra, and so may the whole comparison. In this process `leaf` is text and exact
rationals (`quick_leaf`); in a worker (`verify.worker`) it is math-verify. In doubt they differ:

    units           only one side has a unit: the numbers count; both have: they must agree (50 mm = 5 cm)
    percentages     `50\%` is `50`, `0.5` and `\frac12`: problems state them either way
    decimals        six significant digits or more may round the exact number
    lists           any order; in brackets this order; `\pm` gives two; a set is none of its members
    equations       the last side, where the sides that are numbers agree; two names must be the same
    options         the letter; its text counts where the gold answer is a text
    number bases    a base that only one side names is overlooked
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from phi4r.verify.nodes import (
    Assignments,
    Based,
    Choice,
    Clock,
    Equation,
    Excluded,
    Group,
    Many,
    Matrix,
    Node,
    Opaque,
    Ratio,
    Relation,
    Scalar,
    Special,
    Union,
    Words,
)
from phi4r.verify.notation import normalise
from phi4r.verify.numbers import is_rounding_of, number
from phi4r.verify.reading import is_name, read, readings, tidy_name
from phi4r.verify.scalars import is_percent
from phi4r.verify.units import Unit

Leaf = Callable[[str, str], bool | None]
"""Whether two expressions are equal; None: cannot say."""

_BLANK = re.compile(r"\s+(?!(?<=\d )\d)|(?<!\d)\s+(?=\d)")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_VARIABLES = re.compile(r"\\[a-zA-Z]+|[a-zA-Z]")
_CONSTANT_COMMANDS = frozenset(
    rf"\{name}"
    for name in str.split(
        "frac sqrt pi cdot times div infty sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc"
        " sinh cosh tanh coth log ln exp max min gcd lcm binom circ pm mp text cis left right lfloor rfloor"
        " lceil rceil mod bmod pmod sum prod int to det overline bar dot quad begin end"
    )
)
_PI_OR_RADIANS = re.compile(r"\\pi(?![a-z])")
_DEGREE = Unit((("angle", 1),))


def plain(text: str) -> str:
    """A normalised expression for comparing as a string: without blanks that say nothing and text fonts."""
    text = _TEXT.sub(r"\1", text)
    return _BLANK.sub("", text)


def quick_leaf(gold: str, answer: str) -> bool | None:
    """Equality of expressions by text and exact rational arithmetic; None where that does not tell."""
    if plain(gold) == plain(answer):
        return True
    one, other = number(gold), number(answer)
    if one is not None and other is not None:
        return one == other or (
            ("." in gold) != ("." in answer) and (is_rounding_of(gold, other) or is_rounding_of(answer, one))
        )
    if "\\text" in gold or "\\text" in answer:
        return False
    if variables(gold) != variables(answer) or gold.count("'") != answer.count("'"):
        return False
    return None


def variables(text: str) -> frozenset[str]:
    """Letters and symbols in an expression that are no constants and no functions."""
    return frozenset(_VARIABLES.findall(text)) - _CONSTANT_COMMANDS - {"e", "i"}


def same(gold: str, answer: str, leaf: Leaf = quick_leaf) -> bool | None:
    """Whether two normalised answers are the same under one reading of each; None: takes algebra."""
    if plain(gold) == plain(answer):
        return True
    found: bool | None = False
    golds, answers = readings(gold), readings(answer)
    for one in golds:
        for other in answers:
            verdict = _node(one, other, leaf)
            if verdict:
                return True
            if verdict is None:
                found = None
    return found


def counts_members(gold: str) -> int:
    """How many answers a gold answer asks for: the members of a list, else 1."""
    node = read(normalise(gold))
    return (
        len(node.members)
        if isinstance(node, Many)
        else len(node.pairs)
        if isinstance(node, Assignments)
        else 1
    )


# --- three-valued logic: None is "cannot say yet"


def _all(verdicts: list[bool | None]) -> bool | None:
    return False if False in verdicts else None if None in verdicts else True


def _any(verdicts: list[bool | None]) -> bool | None:
    return True if True in verdicts else None if None in verdicts else False


def _in_order(golds: Sequence[Node], answers: Sequence[Node], leaf: Leaf) -> bool | None:
    if len(golds) != len(answers):
        return False
    return _all([_node(one, other, leaf) for one, other in zip(golds, answers, strict=True)])


def _in_any_order(golds: Sequence[Node], answers: Sequence[Node], leaf: Leaf) -> bool | None:
    if len(golds) != len(answers):
        return False
    left, is_open = list(answers), False
    for one in golds:
        verdicts = [_node(one, other, leaf) for other in left]
        if True in verdicts:
            del left[verdicts.index(True)]
        elif None in verdicts:
            is_open = True
        else:
            return False
    return None if is_open else True


# --- nodes


def _node(gold: Node, answer: Node, leaf: Leaf) -> bool | None:
    if gold == answer:
        return True
    if isinstance(gold, Choice) or isinstance(answer, Choice):
        return _choices(gold, answer, leaf)
    if isinstance(gold, Equation) or isinstance(answer, Equation):
        return _equations(gold, answer, leaf)
    if isinstance(gold, Assignments) or isinstance(answer, Assignments):
        return _assignments(gold, answer, leaf)
    if isinstance(gold, Many) or isinstance(answer, Many):
        return _lists(gold, answer, leaf)
    if isinstance(gold, Scalar) and isinstance(answer, Scalar):
        return _scalars(gold, answer, leaf)
    if isinstance(gold, Special) or isinstance(answer, Special):
        return _specials(gold, answer, leaf)
    if isinstance(gold, Ratio | Clock) or isinstance(answer, Ratio | Clock):
        return _ratios(gold, answer, leaf)
    if isinstance(gold, Based) or isinstance(answer, Based):
        return _bases(gold, answer)
    if isinstance(gold, Words | Opaque) or isinstance(answer, Words | Opaque):
        return _spelling(gold) == _spelling(answer)
    return _sets(gold, answer, leaf)


def _spelling(node: Node) -> str:
    if isinstance(node, Words):
        return re.sub(r"[\W_]", "", "".join(node.words))
    if isinstance(node, Scalar | Opaque):
        return re.sub(r"\s", "", _TEXT.sub(lambda word: word[1].lower(), node.text))
    return repr(node)


def _choices(gold: Node, answer: Node, leaf: Leaf) -> bool | None:
    if isinstance(gold, Choice) and isinstance(answer, Choice):
        if gold.letter != answer.letter:
            return False
        return gold.rest is None or answer.rest is None or _node(gold.rest, answer.rest, leaf)
    if isinstance(answer, Choice):
        if answer.rest is not None and not isinstance(gold, Many):
            return _node(gold, answer.rest, leaf)
        return isinstance(gold, Scalar) and plain(gold.text) == answer.letter
    assert isinstance(gold, Choice)
    if isinstance(answer, Scalar) and answer.unit is None:
        text = plain(answer.text).strip("()")
        if len(text) == 1 and text.isalpha():
            return text.upper() == gold.letter
    if gold.rest is not None:
        return _node(gold.rest, answer, leaf)
    lower = (
        re.fullmatch(r"\(?([a-j])(?:\)|\.|:) ?.*", answer.text)
        if isinstance(answer, Scalar | Opaque)
        else None
    )
    return bool(lower) and lower is not None and lower[1].upper() == gold.letter


def _letters(node: Node) -> str | None:
    """The letters of a choice of several options, sorted."""
    if isinstance(node, Many | Group) and all(isinstance(m, Choice) and m.rest is None for m in node.members):
        return "".join(sorted(m.letter for m in node.members if isinstance(m, Choice)))
    if isinstance(node, Scalar | Words):
        text = plain(node.text) if isinstance(node, Scalar) else "".join(node.words).upper()
        if re.fullmatch(r"[A-J]{2,10}", text) and len(set(text)) == len(text):
            return "".join(sorted(text))
    return None


def _value(node: Equation, leaf: Leaf) -> tuple[Node, bool | None]:
    """(the side that is the answer, whether the sides that are numbers agree)."""
    sides = list(node.sides)
    chosen = sides[-1]
    if len(sides) > 1 and is_name(chosen) and not is_name(sides[0]):
        chosen = sides[0]
    constant = [side for side in sides if not is_name(side) and not variables(side) and "\\text" not in side]
    agree = _all([leaf(constant[0], other) for other in constant[1:]]) if constant else True
    return read(chosen), agree


def _named_value(node: Equation) -> tuple[str, str] | None:
    """(name, value) of an equation that gives a name a value."""
    if len(node.sides) < 2:
        return None
    left, right = node.sides[0], node.sides[-1]
    if is_name(left):
        return tidy_name(left), right
    return (tidy_name(right), left) if is_name(right) and len(node.sides) == 2 else None


def _equations(gold: Node, answer: Node, leaf: Leaf) -> bool | None:
    if isinstance(gold, Equation) and isinstance(answer, Equation):
        one, other = _named_value(gold), _named_value(answer)
        if one and other and one[0] == other[0]:
            return _all([_node(read(one[1]), read(other[1]), leaf), _value(answer, leaf)[1]])
        if len(gold.sides) == len(answer.sides) == 2:
            if one and other and not variables(one[1]) and not variables(other[1]):
                return False  # x = 5 is not y = 5
            return _same_equation(gold.sides, answer.sides, leaf)
        return False
    if isinstance(gold, Equation):
        named = _named_value(gold)
        if gold.approximate and len(gold.sides) == 1:
            return _any([_node(read(side), answer, leaf) for side in (*gold.sides, *gold.approximate)])
        if named is None:
            return False
        if isinstance(answer, Choice | Many | Assignments) and not isinstance(read(named[1]), Many):
            return False
        if "," in gold.sides[0] and isinstance(answer, Assignments):
            return _assignments(_unpack(gold), answer, leaf)
        return _node(read(named[1]), answer, leaf)
    assert isinstance(answer, Equation)
    if answer.approximate:
        return _approximations(gold, answer, leaf)
    if isinstance(gold, Assignments):
        return _assignments(gold, _unpack(answer), leaf)
    value, agree = _value(answer, leaf)
    if len(answer.sides) == 1 or agree is False:
        return False if agree is False else _node(gold, value, leaf)
    return _all([_node(gold, value, leaf), agree])


def _approximations(gold: Node, answer: Equation, leaf: Leaf) -> bool | None:
    """`\\sqrt2 \\approx 1.414`: the exact side, where the other is near it by its own digits."""
    verdict = _node(gold, _value(answer, leaf)[0], leaf)
    near = number(answer.approximate[-1])
    exact = number(answer.sides[-1])
    if near is not None and exact is not None:
        places = len(answer.approximate[-1].partition(".")[2].rstrip(" )}"))
        if abs(near - exact) > Fraction(1, 10**places):
            return False
    if verdict is False:
        return _node(gold, read(answer.approximate[-1]), leaf)
    return verdict


def _unpack(node: Equation) -> Node:
    """`(x, y) = (1, 2)` as assignments."""
    names = [name.strip() for name in node.sides[0].strip("() ").split(",")]
    right = read(node.sides[-1])
    if isinstance(right, Group) and len(right.members) == len(names) > 1:
        return Assignments(tuple(zip(map(tidy_name, names), right.members, strict=True)))
    return right


def _same_equation(gold: Sequence[str], answer: Sequence[str], leaf: Leaf) -> bool | None:
    """Both describe the same points: equal sides, or left - right differs by a constant factor."""
    pairs = [[leaf(gold[0], answer[i]), leaf(gold[1], answer[1 - i])] for i in (0, 1)]
    verdict = _any([_all(pair) for pair in pairs])
    if verdict is not False:
        return verdict
    one, other = (f"({left})-({right})" for left, right in (gold, answer))
    if variables(one) != variables(other) or "\\text" in one + other:
        return False
    return leaf(f"{one}=0", f"{other}=0")


def _assignments(gold: Node, answer: Node, leaf: Leaf) -> bool | None:
    if isinstance(gold, Assignments) and isinstance(answer, Assignments):
        golds, answers = dict(gold.pairs), dict(answer.pairs)
        if golds.keys() != answers.keys():
            return False
        return _all([_node(golds[name], answers[name], leaf) for name in golds])
    named, other, swap = (gold, answer, False) if isinstance(gold, Assignments) else (answer, gold, True)
    assert isinstance(named, Assignments)
    if not isinstance(other, Group | Many) or (isinstance(other, Group) and other.brackets not in ("()", "")):
        return False
    if isinstance(other, Many) and (other.kind == "set" or other.is_expanded):
        return False
    values = (
        [value for _, value in sorted(named.pairs)]
        if _are_coordinates(named)
        else [v for _, v in named.pairs]
    )
    golds_, answers_ = (other.members, values) if swap else (values, other.members)
    return _in_order(golds_, answers_, leaf)


def _are_coordinates(node: Assignments) -> bool:
    return all(len(name) == 1 for name, _ in node.pairs)


def _lists(gold: Node, answer: Node, leaf: Leaf) -> bool | None:
    if (letters := _letters(gold)) is not None and isinstance(gold, Many):
        return letters == _letters(answer)
    if isinstance(gold, Scalar) and (letters := _letters(gold)) is not None:
        return letters == _letters(answer)
    if isinstance(gold, Many) and isinstance(answer, Many):
        verdict = _in_any_order(gold.members, answer.members, leaf)
        if verdict is False and (gold.is_expanded or answer.is_expanded or gold.kind == answer.kind == "set"):
            return _same_set(gold.members, answer.members, leaf)
        return verdict
    many, other = (gold, answer) if isinstance(gold, Many) else (answer, gold)
    assert isinstance(many, Many)
    if many.is_expanded or (many.kind == "set" and len(many.members) == 1):
        return (
            _same_set(many.members, [other], leaf) if many is gold else _same_set([other], many.members, leaf)
        )
    if isinstance(other, Group) and other.brackets in ("()", "") and many.kind == "list" and not other.name:
        one, two = (many.members, other.members) if many is gold else (other.members, many.members)
        return _in_order(one, two, leaf)
    if isinstance(other, Special) and not many.members:
        return other.name == "none"
    return False


def _same_set(golds: Sequence[Node], answers: Sequence[Node], leaf: Leaf) -> bool | None:
    """Whether each has its equal on the other side, however often."""
    forward = [_any([_node(one, other, leaf) for other in answers]) for one in golds]
    backward = [_any([_node(one, other, leaf) for one in golds]) for other in answers]
    return _all(forward + backward)


def _percent_pair(gold: Scalar, answer: Scalar) -> bool | None:
    one, other = number(gold.text), number(answer.text)
    if one is None or other is None:
        return None
    if is_percent(gold) and is_percent(answer):
        return one == other
    percent, bare = (one, other) if is_percent(gold) else (other, one)
    return bare in (percent, percent / 100)


def _scalars(gold: Scalar, answer: Scalar, leaf: Leaf) -> bool | None:
    one, other = gold.unit, answer.unit
    if is_percent(gold) or is_percent(answer):
        unit = other if is_percent(gold) else one
        if unit is None or (is_percent(gold) and is_percent(answer)):
            verdict = _percent_pair(gold, answer)
            return leaf(gold.text, answer.text) if verdict is None else verdict
        return False
    if one is None or other is None:
        if (one == _DEGREE) != (other == _DEGREE):
            degrees, radians = (gold, answer) if one == _DEGREE else (answer, gold)
            if _PI_OR_RADIANS.search(radians.text) and not _PI_OR_RADIANS.search(degrees.text):
                pair = rf"\frac{{({degrees.text})\pi}}{{180}}", radians.text
                return leaf(*pair) if one == _DEGREE else leaf(pair[1], pair[0])
        return leaf(gold.text, answer.text)
    angles = {one.dimension, other.dimension}
    if angles == {(("angle", 1),), (("radian", 1),)}:
        degrees, radians = (gold, answer) if one.dimension == (("angle", 1),) else (answer, gold)
        return leaf(rf"\frac{{({degrees.text})\pi}}{{180}}", radians.text)
    if one.dimension != other.dimension or one.name != other.name:
        return False
    if one.factor == other.factor:
        return leaf(gold.text, answer.text)
    values = number(gold.text), number(answer.text)
    if values[0] is None or values[1] is None:
        return leaf(
            f"({gold.text})\\cdot({_text(one.factor)})", f"({answer.text})\\cdot({_text(other.factor)})"
        )
    return values[0] * one.factor == values[1] * other.factor


def _text(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _specials(gold: Node, answer: Node, leaf: Leaf) -> bool | None:
    if isinstance(gold, Special) and isinstance(answer, Special):
        return gold.name == answer.name
    special, other = (gold, answer) if isinstance(gold, Special) else (answer, gold)
    assert isinstance(special, Special)
    if special.name == "reals" and isinstance(other, Group) and len(other.members) == 2:
        low, high = (plain(m.text) if isinstance(m, Scalar) else "" for m in _scalars_of(other))
        return low == r"-\infty" and high in (r"\infty", r"+\infty") and other.brackets == "()"
    if special.name == "infinite" and isinstance(other, Scalar):
        return plain(other.text) in (r"\infty", r"+\infty")
    return False


def _scalars_of(group: Group) -> list[Scalar | None]:
    return [
        m if isinstance(m, Scalar) else Scalar(r"\infty") if m == Special("infinite") else None
        for m in group.members
    ]


def _ratios(gold: Node, answer: Node, leaf: Leaf) -> bool | None:
    if isinstance(gold, Clock) and isinstance(answer, Clock):
        return _clocks(gold, answer)
    if isinstance(gold, Clock) and gold.half and isinstance(answer, Scalar) and answer.unit is None:
        return gold.minutes == 0 and number(answer.text) == gold.hours
    if isinstance(answer, Clock) and answer.half and isinstance(gold, Scalar) and gold.unit is None:
        return answer.minutes == 0 and number(gold.text) == answer.hours
    one, other = _as_ratio(gold), _as_ratio(answer)
    if one is None or other is None or len(one) != len(other):
        return False
    if isinstance(gold, Clock) and not _is_lowest(gold):
        return False  # the time of 3:30, and not 1:10
    values = [number(part) for part in one], [number(part) for part in other]
    if None in values[0] or None in values[1]:
        return _all([leaf(f"({one[i]})({other[0]})", f"({other[i]})({one[0]})") for i in range(1, len(one))])
    golds, answers = ([value or Fraction(0) for value in side] for side in values)
    return all(golds[0] * b == answers[0] * a for a, b in zip(golds, answers, strict=True)) and any(answers)


def _as_ratio(node: Node) -> tuple[str, ...] | None:
    if isinstance(node, Ratio):
        return node.parts
    if isinstance(node, Clock) and not node.half:
        return str(node.hours), str(node.minutes)
    if isinstance(node, Scalar) and node.unit is None and (value := number(node.text)) is not None:
        return (
            (str(value.numerator), str(value.denominator))
            if "." not in node.text and value.denominator > 1
            else None
        )
    return None


def _is_lowest(clock: Clock) -> bool:
    value = Fraction(clock.hours, clock.minutes) if clock.minutes else None
    return value is not None and value.numerator == clock.hours


def _clocks(gold: Clock, answer: Clock) -> bool:
    def on_day(clock: Clock) -> int:
        hours = clock.hours % 12 + 12 * (clock.half == "pm") if clock.half else clock.hours
        return 60 * hours + clock.minutes

    if gold.half and answer.half:
        return on_day(gold) == on_day(answer)
    if gold.half or answer.half:
        same_face = (gold.hours % 12, gold.minutes) == (answer.hours % 12, answer.minutes)
        bare = answer if gold.half else gold
        return on_day(gold) == on_day(answer) if bare.hours > 12 or bare.hours == 0 else same_face
    return gold == answer


def _bases(gold: Node, answer: Node) -> bool:
    if isinstance(gold, Based) and isinstance(answer, Based):
        return gold.base == answer.base and gold.digits.lstrip("0") == answer.digits.lstrip("0")
    based, other = (gold, answer) if isinstance(gold, Based) else (answer, gold)
    assert isinstance(based, Based)
    return isinstance(other, Scalar | Words | Choice) and _spelling(other).upper() == based.digits


def _sets(gold: Node, answer: Node, leaf: Leaf) -> bool | None:
    """Groups, intervals, unions, excluded points, matrices, relations."""
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
            return False
        return _in_order([c for row in gold.rows for c in row], [c for row in answer.rows for c in row], leaf)
    if isinstance(gold, Group) and isinstance(answer, Group):
        if gold.name and answer.name and gold.name != answer.name:
            return False
        if gold.brackets and answer.brackets and gold.brackets != answer.brackets and len(gold.members) == 2:
            return False
        if (gold.name and not answer.brackets) or (answer.name and not gold.brackets):
            return False
        return _in_order(gold.members, answer.members, leaf)
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _relations(gold, answer, leaf)
    one, other = _pieces(gold), _pieces(answer)
    if isinstance(gold, Excluded) and isinstance(answer, Excluded):
        return _in_any_order(gold.points, answer.points, leaf)
    if one is not None and other is not None:
        return _in_any_order(one, other, leaf)
    return False


def _pieces(node: Node) -> list[Node] | None:
    """The intervals of a set of real numbers."""
    if isinstance(node, Union):
        return [_nameless(member) for member in node.members]
    if isinstance(node, Group):
        return [_nameless(node)]
    if isinstance(node, Excluded):
        points = [(number(p.text), p) for p in node.points if isinstance(p, Scalar)]
        if len(points) != len(node.points) or any(value is None for value, _ in points):
            return None
        ends: list[Node] = [
            Scalar(r"-\infty"),
            *(p for _, p in sorted(points, key=lambda pair: pair[0] or 0)),
            Scalar(r"\infty"),
        ]
        return [Group("()", pair) for pair in itertools.pairwise(ends)]
    return None


def _nameless(node: Node) -> Node:
    return Group(node.brackets, node.members) if isinstance(node, Group) else node


def _relations(gold: Relation, answer: Relation, leaf: Leaf) -> bool | None:
    flip = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
    if gold.signs == answer.signs and len(gold.parts) == len(answer.parts):
        forward = _all([leaf(a, b) for a, b in zip(gold.parts, answer.parts, strict=True)])
        if forward is not False:
            return forward
    if tuple(flip.get(sign, sign) for sign in reversed(answer.signs)) == gold.signs:
        return _all([leaf(a, b) for a, b in zip(gold.parts, reversed(answer.parts), strict=True)])
    return False
