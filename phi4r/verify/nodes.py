"""What an answer can be: the nodes that `verify.reading` gives and `verify.equality` compares."""

from __future__ import annotations

from dataclasses import dataclass

from phi4r.verify.units import Unit


@dataclass(frozen=True)
class Scalar:
    """An expression and its unit, if it has one."""

    text: str
    unit: Unit | None = None


@dataclass(frozen=True)
class Words:
    """Words in lower case, without articles."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Special:
    """What several ways of writing mean: "none", "reals", "integers", "infinite", "undefined"."""

    name: str


@dataclass(frozen=True)
class Choice:
    """An option's letter, and its text if that is given too."""

    letter: str
    rest: Node | None = None


@dataclass(frozen=True)
class Many:
    """Several answers in any order. kind: "list" or "set" (in braces); `is_expanded`: from a plus-minus
    sign."""

    kind: str
    members: tuple[Node, ...]
    is_expanded: bool = False


@dataclass(frozen=True)
class Group:
    """Members in order, in their brackets ("()", "[)", ...; "" for a vector); also an interval, whose
    variable is `name` where it was written as a relation."""

    brackets: str
    members: tuple[Node, ...]
    name: str = ""


@dataclass(frozen=True)
class Union:
    """A union of sets."""

    members: tuple[Node, ...]
    name: str = ""


@dataclass(frozen=True)
class Excluded:
    """All real numbers but some."""

    points: tuple[Node, ...]
    name: str = ""


@dataclass(frozen=True)
class Equation:
    """The sides of an equation; `approximate`: sides after an approximation sign."""

    sides: tuple[str, ...]
    approximate: tuple[str, ...] = ()


@dataclass(frozen=True)
class Assignments:
    """Equations for several names, in their order."""

    pairs: tuple[tuple[str, Node], ...]


@dataclass(frozen=True)
class Relation:
    """An order or membership that is no interval of one variable."""

    parts: tuple[str, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Ratio:
    """3 : 4 : 5."""

    parts: tuple[str, ...]


@dataclass(frozen=True)
class Clock:
    """A time of day. half: "am", "pm" or ""."""

    hours: int
    minutes: int
    half: str = ""


@dataclass(frozen=True)
class Based:
    """Digits in a number base."""

    digits: str
    base: int


@dataclass(frozen=True)
class Matrix:
    """Rows of cells."""

    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Opaque:
    """Words and symbols that this grammar does not read: equal as strings or not at all."""

    text: str


Node = (
    Scalar | Words | Special | Choice | Many | Group | Union | Excluded | Equation | Assignments | Relation
    | Ratio | Clock | Based | Matrix | Opaque
)  # fmt: skip
