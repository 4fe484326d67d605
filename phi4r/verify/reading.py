r"""What an answer says: the grammar of whole answers. Text in the notation of `verify.notation` to nodes.

    answer    = choice | words | list | union | relation | equation | group | matrix | ratio | clock | scalar
    list      = answer ("," | ";" | "and" | "or" | "\pm" in a member)...       any order
    group     = "(" | "[" list ")" | "]"  in order      "\{" list "\}"  any order
    relation  = interval written with < > \le \ge \ne \in; two of them joined are an interval or a union
    equation  = side ("=" side)...        the last side counts; a lone name on the right makes it the first
    scalar    = an expression, with or without a unit; what the expression means is settled elsewhere

`readings` gives every way to read a text: `2,256` is a number and a list. Nothing here evaluates anything;
time is linear in the text, whose length the caller limits.
"""

from __future__ import annotations

import re

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
from phi4r.verify.numbers import number, words_value
from phi4r.verify.scalars import scalar, total

MAX_MEMBERS = 100
"""Of a list; longer ones are compared as strings."""
MAX_SIGNS = 4
"""Plus-minus signs of one answer."""
_TIGHT = re.compile(r"(?<![\d.])(\d{1,3}(?:,\d{3})+)(?![\d])")
_SPACED_COMMA = re.compile(r",\s")
_TOKEN = re.compile(r"\\text\{[^{}]*\}|\\[a-zA-Z]+|\\.|[\s\S]")
_WORDS = re.compile(r"(?:\\text\{[^{}]*\}|[\s.,'\"!?-]|(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z]))++")
_WORD = re.compile(r"\\text\{([^{}]*)\}|([a-zA-Z])")
_LETTER = r"(?:([A-J])|\\text\{([A-J])\})"
_CHOICE = re.compile(
    rf"(?:\\text\{{(?:option|choice|answer|statement)\}}\s*:?\s*)?(?:[(\[]\s*{_LETTER}\s*[.:]?\s*[)\]]"
    rf"|{_LETTER}\s*(?:[).:]|\s-(?=\s)|(?=\\text\{{is\}} \\text\{{(?:correct|right)\}})|$))\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)
_NO_REST = re.compile(r"[-+*/^_=!<>|,;&]|\\(?:cdot|times|cup|cap|le|ge|in|ne|div)(?![a-zA-Z])")
_FILL = frozenset(
    str.split(
        "the answer is final answers are equals equal result value of exactly approximately about only"
        " there thus"
        " so therefore hence total sum we have get about roughly correct option"
    )
)
_LEADING_WORD = re.compile(r"\s*(?:\\text\{([^{}]*)\}|\\approx|\\sim|~|\\therefore|a(?= \\text))\s*:?\s*")
_ARTICLES = frozenset(("a", "an", "the"))
_PREPOSITIONS = frozenset(("on", "in", "at"))
_NONE = re.compile(
    r"(?:there (?:is|are|exists?) )?(?:no|none|zero) ?(?:such )?(?:real |integer |positive |valid "
    r"|possible |rational |finite )*"
    r"(?:solutions?|roots?|values?|numbers?|integers?|answers?|points?|pairs?|triples?|intersections?)?"
    r"(?: (?:exists?|exist|found|in reals|possible|of x|to equation|satisf(?:y|ies)(?: equation)?))*"
)
_SPECIAL = {
    "none": "none", "empty set": "none", "null set": "none", "empty": "none", "no": "", "zero": "",
    "all real numbers": "reals", "all reals": "reals", "real numbers": "reals", "reals": "reals",
    "set of all real numbers": "reals", "any real number": "reals", "every real number": "reals",
    "all real": "reals", "set of real numbers": "reals", "all real values": "reals", "all x": "",
    "all real values of x": "reals", "all real x": "reals", "any real": "reals", "entire real line": "reals",
    "all integers": "integers", "integers": "integers", "any integer": "integers", "set of"
    " integers": "integers",
    "set of all integers": "integers", "every integer": "integers",
    "infinitely many": "infinite", "infinitely many solutions": "infinite", "infinite": "infinite",
    "infinite solutions": "infinite", "infinite number of solutions": "infinite", "infinity": "infinite",
    "infinite number": "infinite", "infinitely many answers": "infinite", "infinite number"
    " solutions": "infinite",
    "dne": "undefined", "does not exist": "undefined", "undefined": "undefined", "limit does not"
    " exist": "undefined",
    "not exist": "undefined", "doesn't exist": "undefined", "is undefined": "undefined",
}  # fmt: skip
_SYMBOL_SPECIAL = {
    r"\emptyset": "none", r"\{\}": "none", r"\{ \}": "none", "{}": "none", r"\mathbb{R}": "reals",
    r"\mathbb R": "reals",
    r"\mathbb{Z}": "integers", r"\infty": "infinite", r"\{\emptyset\}": "",
}  # fmt: skip
_COMMENT = re.compile(r"(.*\S)\s*\(([^()]*\\text\{[^()]*)\)")
_RELATION = re.compile(r"(\\le|\\ge|\\ne|\\in|\\notin|<|>)(?![a-zA-Z])")
_MATRIX = re.compile(
    r"[(\[]?\s*\\begin\{(p|b|B|small)?(?:matrix|array)\}(?:\s*\{[clr|]*\})?(.*?)\\end\{[a-zA-Z]+\}\s*[)\]]?",
    re.DOTALL,
)
_IN_REALS = re.compile(r"[a-z] ?\\in ?\\mathbb ?\{?[RZN]\}?")
# Possessive: the parts overlap, and a text that is no name must not be tried in every way to split it.
_NAME = re.compile(
    r"(?:\\text\{[^{}]*\}|\\(?!text)[a-zA-Z]+|[a-zA-Z]|_\s*(?:\{[^{}]*\}|\w)|'|\||\s|\^\\circ|\([^()]*\)|\{[^{}]*\})++"
)
_FUNCTION_NAME = re.compile(
    r"\\(?:frac|sqrt|sin|cos|tan|log|ln|pi|exp|binom|cdot|times|pm|mp|infty)(?![a-zA-Z])"
)
_BASED = re.compile(r"([0-9A-Fa-f]+) ?_ ?(?:\{ ?)?\(?(\d{1,2}|\\text\{[a-z]+\})\)?(?: ?\})?", re.IGNORECASE)
_CLOCK = re.compile(
    r"(\d{1,2})(?: ?: ?(\d{2}))? ?(?:\\text\{(am|pm|noon|midnight|AM|PM|Am|Pm)\}|([ap]m|[AP]M))?"
)
_SIGN = re.compile(r"\\(pm|mp)(?![a-zA-Z]) ?")


def split_top(text: str, separators: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(the parts between separators outside all brackets, the separators found)."""
    parts, found, depth, start = list[str](), list[str](), 0, 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in ("(", "[", "{", r"\{", r"\langle"):
            depth += 1
        elif token in (")", "]", "}", r"\}", r"\rangle"):
            depth -= 1
        elif depth <= 0 and (token in separators or token.lower() in separators):
            parts.append(text[start : match.start()])
            found.append(token)
            start = match.end()
    return [*parts, text[start:]], found


def readings(text: str) -> list[Node]:
    """All ways to read a normalised answer, at most three."""
    texts = [text]
    if "," in text and _TIGHT.search(text):
        merged = _merge_thousands(text)
        texts = [merged, text] if merged != text else [text]
    return [read(each) for each in texts]


def _merge_thousands(text: str) -> str:
    r"""With commas before three digits taken for separators of thousands: outside brackets, and inside where
    another comma has a blank behind it."""
    depth, depths = 0, list[int]()
    for match in _TOKEN.finditer(text):
        depth += (match[0] in ("(", "[", r"\{")) - (match[0] in (")", "]", r"\}"))
        depths += [depth] * len(match[0])
    spaced = bool(_SPACED_COMMA.search(text))
    return _TIGHT.sub(lambda m: m[1].replace(",", "") if spaced or depths[m.start()] <= 0 else m[0], text)


def read(text: str) -> Node:
    """One reading of a normalised answer."""
    text = text.strip().lstrip("= ")
    simple = Scalar(text)
    if not text or number(text) is not None:
        return simple
    return _special(text) or _matrix(text) or _choice(text) or _clock(text) or _several(text) or _single(text)


def _special(text: str) -> Node | None:
    if name := _SYMBOL_SPECIAL.get(text):
        return Special(name)
    if "\\text" in text and _WORDS.fullmatch(text):
        words = [(a or b).lower() for a, b in _WORD.findall(text)]
        words = [word for word in words if word not in _ARTICLES or len(words) == 1]
        joined = " ".join(words)
        if name := _SPECIAL.get(joined, "none" if _NONE.fullmatch(joined) and joined not in _SPECIAL else ""):
            return Special(name)
    return None


def _words(text: str) -> Node | None:
    r"""The words of a text that has nothing else: \text{...} runs, and single letters among them."""
    if "\\text" not in text or not _WORDS.fullmatch(text):
        return None
    words = [(a or b).lower() for a, b in _WORD.findall(text)]
    if words_value(words) is not None:
        return None
    if len(words) > 1 and words[0] in _PREPOSITIONS:
        del words[0]
    kept = tuple(word for word in words if word not in _ARTICLES or len(words) == 1)
    return Words(kept) if any(len(word) > 1 for word in kept) else None


def _choice(text: str) -> Node | None:
    if len(text) == 1:
        return Choice(text) if "A" <= text <= "J" else None
    found = _CHOICE.fullmatch(text)
    if found is None:
        return None
    letter, rest = next(filter(None, found.groups()[:4])), found[5].strip()
    if not letter.isupper():
        return None
    if not rest or re.fullmatch(r"(?:\\text\{is\} )?\\text\{(?:correct|right)\}", rest):
        return Choice(letter)
    if _NO_REST.match(rest) or re.match(r"[A-J]([).:]|$)", rest):
        return None
    if split_top(rest, (r"\text{or}",))[1] and _CHOICE.fullmatch(
        split_top(rest, (r"\text{or}",))[0][-1].strip()
    ):
        return None
    return Choice(letter, read(rest))


def _matrix(text: str) -> Node | None:
    found = _MATRIX.fullmatch(text) if r"\begin" in text else None
    if found is None:
        return None
    rows = [row.split("&") for row in re.split(r"\\\\(?:\s*\[[^\]]*\])?|\\cr(?![a-z])", found[2])]
    cells = tuple(tuple(read(cell) for cell in row) for row in rows if any(cell.strip() for cell in row))
    if cells and all(len(row) == 1 for row in cells):
        return Group("", tuple(row[0] for row in cells))
    if len(cells) == 1:
        return Group("", cells[0])
    return Matrix(cells)


def _clock(text: str) -> Node | None:
    found = _CLOCK.fullmatch(text)
    if found is None or not (found[2] or found[3] or found[4]):
        return None
    half = (found[3] or found[4] or "").lower()
    hours, minutes = int(found[1]), int(found[2] or 0)
    if half in ("noon", "midnight"):
        return Clock(12, minutes, "pm" if half == "noon" else "am") if hours == 12 else None
    if not half and (hours > 24 or minutes > 59):
        return None
    return Clock(hours, minutes, half) if hours <= 24 and minutes < 60 else None


def _several(text: str) -> Node | None:
    """Lists, unions, assignments: what has parts at the top."""
    parts, cups = split_top(text, (r"\cup",))
    if cups:
        *named, first = re.split(r"\\in(?![a-zA-Z])", parts[0])
        sets = tuple(read(part) for part in (first, *parts[1:]))
        return Union(sets, tidy_name(named[0]) if named else "")
    parts, found = split_top(text, (",", ";", r"\text{and}", r"\text{or}", "&", r"\text{as}"))
    if r"\text{as}" in [each.lower() for each in found]:
        return None
    parts = [part for part in parts if part.strip()]
    if len(parts) == 2 and _IN_REALS.fullmatch(parts[1].strip()):
        return read(parts[0])
    if len(parts) < 2:
        return None
    if len(parts) > MAX_MEMBERS:
        return Opaque(text)
    if _WORDS.fullmatch(text) and not found[0].startswith("\\") and all(len(p.strip()) > 40 for p in parts):
        return Words(tuple((a or b).lower() for a, b in _WORD.findall(text)))
    members = [_special(part.strip()) or _several(part.strip()) or read(part) for part in parts]
    joined = {each.lower() for each in found}
    if (
        all(isinstance(member, Group | Excluded | Union) for member in members)
        and any(_is_interval(m) for m in members)
        and (combined := _combine(members, r"\text{or}" in joined))
    ):
        return combined
    if isinstance(members[0], Excluded) and all(isinstance(member, Scalar) for member in members[1:]):
        return Excluded((*members[0].points, *members[1:]), members[0].name)  # x \ne 1, 3
    if (summed := total(members)) is not None:
        return summed
    pairs = [_assignment(part) for part in parts]
    names = {pair[0] for pair in pairs if pair}
    if len(names) == len(parts) and all(pairs):
        return Assignments(tuple(pair for pair in pairs if pair))
    if (
        names
        and len(names) == 1
        and pairs[0]
        and all(pair or "=" not in part for pair, part in zip(pairs, parts, strict=True))
    ):
        members = [pair[1] if pair else member for pair, member in zip(pairs, members, strict=True)]
    return Many("list", _flat(members))


def _flat(members: list[Node]) -> tuple[Node, ...]:
    out: list[Node] = []
    for member in members:
        if isinstance(member, Many) and member.is_expanded:
            out += member.members
        else:
            out.append(member)
    return tuple(out)


def _assignment(part: str) -> tuple[str, Node] | None:
    sides, found = split_top(part, ("=",))
    if len(found) != 1 or not is_name(sides[0]):
        return None
    return tidy_name(sides[0]), read(sides[1])


def _is_interval(node: Node) -> bool:
    return isinstance(node, Excluded | Union) or (isinstance(node, Group) and bool(node.name))


def _bounds(node: Node) -> tuple[str, str] | None:
    if isinstance(node, Group) and len(node.members) == 2:
        ends = [member.text if isinstance(member, Scalar) else "" for member in node.members]
        return ends[0], ends[1]
    return None


def _combine(members: list[Node], is_or: bool) -> Node | None:
    """Relations joined: "or" a union; "and" or a comma an intersection where one bounds from below and the
    other from above and they meet, else a union."""
    name = next((m.name for m in members if isinstance(m, Group | Excluded | Union) and m.name), "")
    if any(isinstance(m, Excluded) for m in members):
        if all(isinstance(m, Excluded) for m in members):
            points = tuple(point for m in members if isinstance(m, Excluded) for point in m.points)
            return Excluded(points, name)
        return None
    if not is_or and len(members) == 2:
        one, other = members
        ends = _bounds(one), _bounds(other)
        if ends[0] and ends[1]:
            first, second = ends[0], ends[1]
            if first[0] == r"-\infty":
                one, other, first, second = other, one, second, first
            low, high = first[0], second[1]
            if first[1] == r"\infty" and second[0] == r"-\infty":
                values = number(low), number(high)
                if values[0] is None or values[1] is None or values[0] <= values[1]:
                    assert isinstance(one, Group)
                    assert isinstance(other, Group)
                    return Group(
                        one.brackets[0] + other.brackets[1], (one.members[0], other.members[1]), name
                    )
    return Union(tuple(members), name)


def is_name(side: str) -> bool:
    r"""Whether the side of an equation only names what the other side is: `x`, `f(x)`, `S_n`, `(x, y)`,
    `\angle ABC`, `\text{Area}`."""
    side = side.strip()
    return bool(side) and (
        bool(_NAME.fullmatch(side.replace(",", "")))
        and not _FUNCTION_NAME.search(side)
        and any(c.isalpha() for c in side)
    )


def tidy_name(name: str) -> str:
    return re.sub(r"\s+|\\text|[{}]", "", name)


def _single(text: str) -> Node:
    """What is no list: relation, equation, group, ratio, words, scalar."""
    stripped = _without_fill(text)
    if stripped != text:
        return read(stripped)
    for reader in (_relation, _equation, _group, _set_minus, _plus_minus, _ratio, _words):
        if (node := reader(text)) is not None:
            return node
    if comment := _COMMENT.fullmatch(text):
        return _commented(comment[1], comment[2])
    if based := _BASED.fullmatch(text):
        base = based[2]
        if base.startswith("\\"):
            value = words_value([base[6:-1]])
            base = str(value) if value is not None else ""
        digits = based[1].upper()
        is_written = any(c.isdigit() for c in digits) or (base == "16" and len(digits) > 1)
        if base.isdigit() and is_written and all(int(c, 16) < int(base) for c in digits):
            return Based(digits, int(base))
    return scalar(text)


def _without_fill(text: str) -> str:
    """Without words before an answer that say nothing: `the answer is`, `approximately`."""
    place, seen = 0, False
    while match := _LEADING_WORD.match(text, place):
        word = (match[1] or "").lower()
        if match[1] and word not in _FILL and word not in _ARTICLES:
            break
        place, seen = match.end(), True
    rest = text[place:].strip()
    return rest if seen and rest else text


def _commented(main: str, comment: str) -> Node:
    words = [word.lower() for word, _ in _WORD.findall(comment)]
    if any(word in ("or", "and", "not", "and/or", "but", "if") for word in words):
        return Opaque(f"{main}({comment})")
    value = number(comment.strip())
    if value is None:
        value = words_value(words) if words else None
    if value is not None or any(char.isdigit() for char in comment):
        said = number(main)
        inside = read(comment)
        if value is not None and said == value:
            return read(main)
        if isinstance(inside, Scalar) and number(inside.text) is not None and number(inside.text) == said:
            return read(main)
        return Opaque(f"{main}({comment})")
    return read(main)


_FLIP = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}


def _relation(text: str) -> Node | None:
    if not _RELATION.search(text):
        return None
    parts, signs = split_top(text, ("<", ">", r"\le", r"\ge", r"\ne", r"\in", r"\notin"))
    parts = [part.strip() for part in parts]
    if not signs:
        return None
    if signs[0] == r"\in" and len(signs) == 1:
        inner = read(parts[1])
        if is_name(parts[0]) and isinstance(inner, Group | Union | Excluded | Many | Special):
            if isinstance(inner, Group) and inner.brackets == "()" and "," in parts[0]:
                return inner
            return _named(inner, tidy_name(parts[0]))
        return Relation(tuple(parts), tuple(signs))
    if signs[0] == r"\notin" and len(signs) == 1 and is_name(parts[0]):
        inner = read(parts[1])
        if isinstance(inner, Many):
            return Excluded(inner.members, tidy_name(parts[0]))
    if len(signs) == 1:
        return _one_relation(parts[0], signs[0], parts[1])
    if len(signs) == 2 and is_name(parts[1]):
        upward = all(sign in ("<", r"\le") for sign in signs)
        if upward or all(sign in (">", r"\ge") for sign in signs):
            low, high = (parts[0], parts[2]) if upward else (parts[2], parts[0])
            first, second = signs if upward else reversed(signs)
            brackets = ("(" if first in "<>" else "[") + (")" if second in "<>" else "]")
            return Group(brackets, (scalar(low), scalar(high)), tidy_name(parts[1]))
    return Relation(tuple(parts), tuple(signs))


def _one_relation(left: str, sign: str, right: str) -> Node:
    if left and is_name(right) and not is_name(left):
        left, sign, right = right, _FLIP[sign], left
    if (left and not is_name(left)) or not right or (left and is_name(right)):
        return Relation((left, right), (sign,))
    name, end = tidy_name(left), scalar(right)
    if (
        (absolute := re.fullmatch(r"\|\s*([a-z])\s*\|", left))
        and sign in ("<", r"\le")
        and isinstance(end, Scalar)
    ):
        low = Scalar(end.text[1:] if end.text.startswith("-") else f"-{end.text}")
        return Group("()" if sign == "<" else "[]", (low, end), absolute[1])
    if sign == r"\ne":
        return Excluded((end,), name or "x")
    if sign in ("<", r"\le"):
        return Group("(" + (")" if sign == "<" else "]"), (Scalar(r"-\infty"), end), name or "x")
    return Group(("(" if sign == ">" else "[") + ")", (end, Scalar(r"\infty")), name or "x")


def _named(node: Node, name: str) -> Node:
    if isinstance(node, Group):
        return Group(node.brackets, node.members, name)
    if isinstance(node, Union):
        return Union(node.members, name)
    if isinstance(node, Excluded):
        return Excluded(node.points, name)
    return node


def _equation(text: str) -> Node | None:
    if "=" not in text and r"\approx" not in text and r"\equiv" not in text:
        return None
    exact, *rest = split_top(text, (r"\approx",))[0]
    sides = [side.strip() for side in split_top(exact, ("=",))[0]]
    sides = [side for side in sides if side]
    if not sides or (len(sides) < 2 and not rest):
        return read(rest[0]) if rest and not sides else None
    return Equation(tuple(sides), tuple(part.strip() for part in rest))


def _group(text: str) -> Node | None:
    r"""`(a, b)`, `P(a, b)`, `[a, b)`, `\{a, b\}`, `\langle a, b \rangle`, `\{x \mid ...\}`; a bracket around
    one thing is read as that thing, except square ones."""
    if point := re.fullmatch(r"[A-Z](?:_\{?\d\}?)? ?(\(.*,.*\))", text):
        text = point[1]
    for opening, closing in ((r"\{", r"\}"), (r"\langle", r"\rangle"), ("(", ")"), ("[", "]"), ("(",
    "]"), ("[", ")"),
                             ("]", "["), ("]", "]"), ("[", "["), ("{", "}")):  # fmt: skip
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening):
            inner = text[len(opening) : -len(closing)].strip()
            if opening != "]" and closing != "[" and not _closes_at_end(text):
                continue
            return _bracketed(opening, closing, inner)
    return None


def _closes_at_end(text: str) -> bool:
    depth = 0
    for match in _TOKEN.finditer(text):
        depth += (match[0] in ("(", "[", "{", r"\{", r"\langle")) - (
            match[0] in (")", "]", "}", r"\}", r"\rangle")
        )
        if depth == 0:
            return match.end() == len(text)
    return False


def _bracketed(opening: str, closing: str, inner: str) -> Node | None:
    if opening in (r"\{", "{"):
        head, bar, condition = inner.partition("|")
        if not bar:
            head, bar, condition = inner.partition(":")
        if bar and re.fullmatch(r"\s*[a-zA-Z](?:\s*\\in\s*\\mathbb\{?R\}?)?\s*", head) and condition.strip():
            return read(condition)
    parts, found = split_top(inner, (",", ";"))
    parts = [part for part in parts if part.strip()] if opening == r"\{" else parts
    if not inner:
        return None
    if opening in (r"\{", "{"):
        if opening == "{" and not found:
            return None
        return Many("set", _flat([read(part) for part in parts]))
    if len(parts) < 2:
        if opening == "(" and closing == ")":
            return read(inner)
        return Group(opening + closing, (read(inner),)) if opening == "[" else None
    brackets = {"]": "(", "[": "["}.get(opening, opening) + {"[": ")", "]": "]"}.get(closing, closing)
    if opening == r"\langle":
        brackets = ""
    return Group(brackets, tuple(read(part) for part in parts))


def _set_minus(text: str) -> Node | None:
    found = re.fullmatch(r"(.*?)\\mathbb ?\{?R\}? ?(?:\\setminus|\\backslash|-) ?(.*)", text)
    if found:
        node = read(found[2])
        if isinstance(node, Many):
            return Excluded(node.members)
    words = re.fullmatch(
        r"((?:\\text\{[a-zA-Z]+\} ?)+?)\\text\{(?:except|but|excluding|besides)\} ?(?:\\text\{for\} ?)?(.*)",
        text,
    )
    if words and isinstance(special := _special(words[1].strip()), Special) and special.name == "reals":
        node = read(words[2])
        if isinstance(node, Equation) and len(node.sides) == 2:
            node = read(node.sides[1])
        return Excluded(node.members if isinstance(node, Many) else (node,))
    return None


def _plus_minus(text: str) -> Node | None:
    signs = _SIGN.findall(text)
    if not signs or len(signs) > MAX_SIGNS:
        return None
    members = list[Node]()
    pm_count = sum(sign == "pm" for sign in signs) or 1
    linked = "mp" in signs
    for choice in range(2 if linked else 2**pm_count):
        place = 0

        def one(match: re.Match[str], choice: int = choice) -> str:
            nonlocal place
            bit = (choice if linked else choice >> place) & 1
            place += 1
            plus = bit == 0 if match[1] == "pm" else bit == 1
            before = match.string[: match.start()].rstrip()
            leading = not before or before[-1] in "=([{,"
            return ("" if leading else "+") if plus else "-"

        members.append(read(_SIGN.sub(one, text)))
    return Many("list", tuple(members), is_expanded=True)


def _ratio(text: str) -> Node | None:
    parts, found = split_top(text, (":", r"\text{to}"))
    parts = [part.strip() for part in parts]
    if not found or any(not part or "\\text" in part for part in parts):
        return None
    return Ratio(tuple(parts))
