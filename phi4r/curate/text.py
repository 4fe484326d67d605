"""What makes two problem texts the same: tokens, the quantities among them, and stable hashes.

Every comparison in curation (exact, near, n-gram) goes through `analyse`, so "3 * 7" and "3*7", "5 apples"
and "five apples", `\\frac{1}{2}` and "1/2" are the same everywhere, and "3*7+5-9" and "3*7+5-8" nowhere.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SYMBOLS = str.maketrans("×·⋅∗÷⁄−–—’≤≥", "****//---'<>")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LATEX_SYMBOLS = {
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "le": "<", "leq": "<", "ge": ">", "geq": ">",
    "mod": "%", "bmod": "%", "pmod": "%", "lbrace": "", "rbrace": "",
}  # fmt: skip
_LATEX_LAYOUT = _words(
    "left right big Big bigg Bigg bigl bigr quad qquad displaystyle textstyle text mathrm mathbf "
    "mathit textbf textit operatorname mathcal boxed limits nolimits"
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_LATEX_COMMAND = re.compile(r"\\([A-Za-z]+)\*?")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_TOKEN = re.compile(r"\d+(?:\.\d+)?|(?<![\w.])\.\d+|[^\W\d_]+(?:'[^\W\d_]+)?|[^\w\s]|_")

_DROPPED_PUNCTUATION = frozenset(".,;:?'\"`$&#@~\\{}“”‘…•")
_NUMBER_WORDS = {  # without "one", a pronoun too often to read it as a number
    "zero": "0", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10", "eleven": "11", "twelve": "12", "thirteen": "13", "fourteen": "14",
    "fifteen": "15", "sixteen": "16", "seventeen": "17", "eighteen": "18", "nineteen": "19", "twenty": "20",
    "thirty": "30", "forty": "40", "fifty": "50", "sixty": "60", "seventy": "70", "eighty": "80",
    "ninety": "90",
}  # fmt: skip
# Words that decide the answer as a number does: two problems that differ in one of them are different
# problems.
_QUANTITY_WORDS = _words(
    "hundred thousand million billion dozen half halves third thirds quarter quarters fifth tenth "
    "once twice thrice double doubled triple tripled more less fewer least most minimum maximum "
    "smallest largest greatest before after increase increased decrease decreased add subtract plus "
    "minus times divided percent sum difference product quotient remainder first second last even odd "
    "not no without except each every per morning day days week weeks month months year years hour "
    "hours minute minutes"
)
_FUNCTION_WORDS = _words(
    "sin cos tan cot sec csc log ln exp sqrt pi min max gcd lcm floor ceil det deg theta"
)
# Lead-ins that carry no content: "Compute 3*7" and "What is 3*7" ask the same.
_FILLER_WORDS = _words(
    "what is are the value of compute calculate evaluate find determine solve simplify please answer "
    "problem question result give me let express"
)


@dataclass(frozen=True, kw_only=True)
class Text:
    """One analysed problem text.

    `tokens` are words, numbers and mathematical symbols in order; `quantities` is the ordered sub-sequence
    of those that decide the answer (numbers, number words, comparison words, operators, single-letter
    variables); `num_words` counts content words.
    """

    tokens: tuple[str, ...]
    quantities: tuple[str, ...]
    num_words: int

    @property
    def symbolic(self) -> bool:
        """True for pure arithmetic: fewer than three content words, so every token is the problem itself."""
        return self.num_words < 3

    @property
    def key(self) -> str:
        """The whole text as one string: equal for two texts exactly when their tokens are equal."""
        return " ".join(self.tokens)

    @property
    def core(self) -> str:
        """As `key`, without lead-in words, for whole-string comparison of pure arithmetic."""
        return " ".join(token for token in self.tokens if token not in _FILLER_WORDS) or self.key


def analyse(text: str) -> Text:
    """Tokens and quantities of a problem text; never raises, an empty text has no tokens."""
    raw = _TOKEN.findall(_plain(text))
    tokens = tuple(_keep_mathematics(_unwrap_brackets([_canonical(token) for token in raw])))
    quantities = tuple(token for token in tokens if _is_quantity(token))
    num_words = sum(1 for token in tokens if is_word(token) and token not in _FILLER_WORDS)
    return Text(tokens=tokens, quantities=quantities, num_words=num_words)


def is_word(token: str) -> bool:
    """True for a word of two letters or more that is not the name of a function."""
    return len(token) > 1 and token[0].isalpha() and token not in _FUNCTION_WORDS


def masked(tokens: tuple[str, ...]) -> tuple[str, ...]:
    """The tokens with every number replaced by "#"."""
    return tuple("#" if token[0].isdigit() else token for token in tokens)


@lru_cache(maxsize=1 << 18)
def token_hash(token: str) -> int:
    """A 64-bit hash of a token that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "little")


def ngram_hashes(tokens: tuple[str, ...], n: int) -> np.ndarray:
    """Hashes of all n-grams, in order: uint64[max(0, len(tokens) - n + 1)]."""
    if len(tokens) < n:
        return np.zeros(0, np.uint64)
    hashes = np.array([token_hash(token) for token in tokens], np.uint64)
    num = len(tokens) - n + 1
    combined = np.zeros(num, np.uint64)
    for offset in range(n):  # a polynomial with an odd base: order matters, and wrap-around keeps all 64 bits
        combined = combined * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + num]
    return mix(combined)


def mix(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser, element by element: uint64 -> uint64, a bijection."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _plain(text: str) -> str:
    """Unicode and LaTeX spelled out in plain characters, lower case."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: f"^({match[0].translate(_SUPERSCRIPTS)})", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda match: "_" + match[0].translate(_SUBSCRIPTS), text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", "+", text)  # "1½" is 1+1/2, not 11/2
    text = unicodedata.normalize("NFKC", text.translate(_SYMBOLS)).translate(_SYMBOLS)
    if "\\" in text:
        text = _strip_latex(text)
    text = text.replace("{", "(").replace("}", ")").replace("**", "^").lower()
    return _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)


def _strip_latex(text: str) -> str:
    previous = None
    while previous != text:  # innermost fractions first
        previous = text
        text = _FRACTION.sub(lambda m: f"({m[1] or m[2] or ''})/({m[3] or m[4] or ''})", text)
    text = text.replace("\\{", " ").replace("\\}", " ")
    text = _LATEX_COMMAND.sub(_spell_command, text)
    return re.sub(r"\\[^A-Za-z]", " ", text)  # spacing: "\,", "\!", "\ "


def _spell_command(match: re.Match[str]) -> str:
    name = match[1]
    if name in _LATEX_LAYOUT:
        return " "
    return f" {_LATEX_SYMBOLS.get(name, name)} "


def _canonical(token: str) -> str:
    if "." in token and len(token) > 1:
        return ("0" + token if token[0] == "." else token).rstrip("0").rstrip(".")
    return _NUMBER_WORDS.get(token, token)


def _unwrap_brackets(tokens: list[str]) -> list[str]:
    """ "(2)" is "2": brackets round a single token say nothing (LaTeX writes many of them)."""
    out: list[str] = []
    for token in tokens:
        if token == ")" and len(out) >= 2 and out[-2] == "(" and out[-1] not in "()":
            out.pop(-2)
        else:
            out.append(token)
    return out


def _keep_mathematics(tokens: list[str]) -> list[str]:
    """Drop punctuation; keep hyphens and brackets only where they are mathematics, not prose."""
    out: list[str] = []
    kept_brackets: list[bool] = []
    for index, token in enumerate(tokens):
        following = tokens[index + 1] if index + 1 < len(tokens) else ""
        if token in _DROPPED_PUNCTUATION:
            continue
        if token == "(":
            kept_brackets.append(not is_word(following))
            if not kept_brackets[-1]:
                continue
        elif token == ")":
            if not (kept_brackets.pop() if kept_brackets else True):
                continue
        elif token == "-" and (is_word(following) or not following):
            continue  # "a 5-mile run", "2 apples - and"; but "of -3", "x-sin(y)"
        out.append(token)
    return out


def _is_quantity(token: str) -> bool:
    if token in _QUANTITY_WORDS:
        return True
    if token in ("a", "i"):  # the article and the pronoun, far more often than variables
        return False
    return not is_word(token)
