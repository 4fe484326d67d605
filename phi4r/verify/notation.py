r"""One notation for the same text: what people, models and data sets write, as plain LaTeX.

`normalise` is the first half of the grammar of answers (`verify.reading` is the second). It changes how an
answer is written, never what it says:

    unicode         full-width and other digits, superscripts, vulgar fractions, signs, Greek letters
    delimiters      `$...$`, `\(...\)`, `**...**`, quotes, outer braces, a final stop or comma
    decoration      fonts, sizes, colours, `\left`, `\displaystyle`, boxes, phantoms
    spacing         `\,` `\;` `\!` `~` `\quad`; between groups of three digits they are dropped
    commands        `\dfrac` `\cfrac` `a \over b` `\frac12` -> `\frac{1}{2}`; `\sqrt2` `√2` `sqrt(2)`
                    -> `\sqrt{2}`; `\leq` `<=` -> `\le`; `sin x` -> `\sin x`; `p.m.` -> `\text{pm}`
    words           every word in the text, whatever font it had, stands as `\text{word}`

A comma between groups of three digits (`1,234`) is left alone: it may separate a list (`100,200`).
"""

from __future__ import annotations

import re
import unicodedata

from phi4r.verify.extract import strip_outer_braces

# Longer texts are nobody's answer: they are compared as they are.
MAX_CHARS = 4000

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₙᵢ", "0123456789+-ni", strict=True))
_SYMBOLS = {
    **dict.fromkeys("−–—‐‑‒﹣－⁃", "-"), "×": r"\times ", **dict.fromkeys("·∙⋅•", r"\cdot "), "÷": r"\div ",
    "∞": r"\infty ", "≤": r"\le ", "≦": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "≧": r"\ge ", "⩾": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "≃": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∅": r"\emptyset ", "⌀": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", **dict.fromkeys("°º˚", r"^\circ "), "±": r"\pm ", "∓": r"\mp ",
    "…": "...", "⋯": "...", "∠": r"\angle ", "△": r"\triangle ", "′": "'", "″": "''", "“": '"', "”": '"',
    "‘": "'", "’": "'", "→": r"\to ", "∖": r"\setminus ", "∧": r"\land ", "∨": r"\lor ", "ℯ": "e", "ⅈ": "i",
    "ⅇ": "e", "‰": r"\text{permille}", "€": r"\text{EUR}", "£": r"\text{GBP}", "¥": r"\text{JPY}", "∣": "|",
    "₹": r"\text{INR}", "₽": r"\text{RUB}", "¢": r"\text{cents}", "⟨": r"\langle ", "⟩": r"\rangle ",
    "∶": ":", "∗": "*", "⁄": "/", "∕": "/", "，": ",", "、": ",", "。": ".", "％": r"\%", "∛": "∛", "√": "√",
    "℃": r"^\circ C", "℉": r"^\circ F",
}  # fmt: skip
_GREEK = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
    "rho",
    "-",
    "sigma",
    "tau",
    "upsilon",
    "phi",
    "chi",
    "psi",
    "omega",
]
_SYMBOLS |= {chr(0x3B1 + place): rf"\{name} " for place, name in enumerate(_GREEK) if name != "-"}
_SYMBOLS |= {
    "ϕ": r"\phi ",
    "ϑ": r"\theta ",
    "Δ": r"\Delta ",
    "Ω": r"\Omega ",
    "Σ": r"\Sigma ",
    "Γ": r"\Gamma ",
}

FUNCTIONS = (
    "arcsin", "arccos", "arctan", "arccot", "arcsec", "arccsc", "sinh", "cosh", "tanh", "coth", "sin", "cos",
    "tan", "cot", "sec", "csc", "log", "ln", "exp", "max", "min", "gcd", "lcm", "det", "cis", "mod", "sqrt",
    "pi", "infty", "binom", "cbrt", "lg", "deg", "dim", "ker", "arg", "sgn", "floor", "ceil", "asin", "acos",
    "atan",
)  # fmt: skip
# Runs of two and three letters that are words and no products of variables.
_SHORT_WORDS = frozenset(
    str.split(
        "or and no an is of to in at by as it on am pm me we km cm mm nm kg mg lb lbs oz ft yd hr hrs"
        " min mph kph"
        " sec ms ml dl cl sq cu mi per day km/h yes not all odd the one two six ten red old men one usd"
        " eur gbp"
        " hz kw gb mb kb dm ha cal pts pt box cup rs inr jpy cad aud am pm none null rad deg st nd rd th pies"
        " dne day way set sum any ave avg boy dog cat car pen egg hen cow pig ant bee fox win too few low top"
    )
)
_TEXT_FONTS = (
    "text|mathrm|textrm|textbf|textit|textsf|texttt|textsc|textup|textnormal|textmd|emph|mbox|hbox|mathnormal"
    "|operatorname|mathop|mathsf|mathtt|mathit|mathbf|boldsymbol|bm|bold|pmb|mathcal|mathscr|mathfrak|rm"
)
_PLAIN_FONTS = (
    "underline|uline|underbar|boxed|fbox|framebox|ensuremath|mathstrut|large|Large|smash|vcenter|cancel"
)
_SWITCHES = (
    "left|right|bigl|bigr|Bigl|Bigr|biggl|biggr|Biggl|Biggr|big|Big|bigg|Bigg|middle|displaystyle|textstyle"
    "|scriptstyle|scriptscriptstyle|limits|nolimits|bf|it|sf|tt|sl|sc|cal|rm|em|bfseries|itshape|rmfamily|large"
    "|Large|LARGE|huge|Huge|small|footnotesize|scriptsize|tiny|normalsize|centering|mathstrut|strut|noindent"
)
_NOT_LETTER = r"(?![a-zA-Z])"

_REPLACEMENTS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\(?:phantom|hphantom|vphantom|hspace\*?|vspace\*?|label|tag|color|cellcolor)\s*\{[^{}]*\}", ""),
        (r"\\(?:textcolor|colorbox|fcolorbox)\s*\{[^{}]*\}", ""),
        (rf"\\(?:{_PLAIN_FONTS}){_NOT_LETTER}(?=\s*\{{)", ""),
        (r"\\(?:left|right)\s*\.(?=\s|$|\\)", ""),
        (rf"\\(?:{_SWITCHES}){_NOT_LETTER}\s*", ""),
        (r"\\!\s*", ""),
        (rf"\\(?:dfrac|tfrac|cfrac|sfrac|nicefrac|xfrac|flatfrac){_NOT_LETTER}", r"\\frac"),
        (rf"\\(?:dbinom|tbinom){_NOT_LETTER}", r"\\binom"),
        (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"^([^{}]*)\\over(?![a-zA-Z])([^{}]*)$", r"\\frac{\1}{\2}"),
        (r"^([^{}]*)\\choose(?![a-zA-Z])([^{}]*)$", r"\\binom{\1}{\2}"),
        (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (rf"\\(?:leq|leqslant|leqq){_NOT_LETTER}|<=|=<", r"\\le "),
        (rf"\\(?:geq|geqslant|geqq){_NOT_LETTER}|>=", r"\\ge "),
        (rf"\\(?:neq|not\s*=){_NOT_LETTER}|!=|\\not\s*=", r"\\ne "),
        (rf"\\lt{_NOT_LETTER}", "<"), (rf"\\gt{_NOT_LETTER}", ">"),
        (rf"\\(?:lbrace){_NOT_LETTER}", r"\\{"), (rf"\\(?:rbrace){_NOT_LETTER}", r"\\}"),
        (rf"\\(?:lbrack){_NOT_LETTER}", "["), (rf"\\(?:rbrack){_NOT_LETTER}", "]"),
        (rf"\\(?:lvert|rvert|vert|mid){_NOT_LETTER}", "|"), (rf"\\colon{_NOT_LETTER}", ":"),
        (rf"\\(?:varnothing|O){_NOT_LETTER}", r"\\emptyset "), (rf"\\(?:Re|R|reals){_NOT_LETTER}",
        r"\\mathbb{R}"),
        (rf"\\(?:simeq|thickapprox){_NOT_LETTER}", r"\\approx "), (r"\\doteq", "="),
        (rf"\\(?:wedge|land){_NOT_LETTER}", r"\\text{and}"), (rf"\\(?:vee|lor){_NOT_LETTER}", r"\\text{or}"),
        (rf"\\(?:dots|ldots|cdots|dotsc|dotsb){_NOT_LETTER}", "..."), (rf"\\(?:prime){_NOT_LETTER}", "'"),
        (rf"\\pounds{_NOT_LETTER}", r"\\text{GBP}"), (rf"\\euro{_NOT_LETTER}|\\texteuro{_NOT_LETTER}",
        r"\\text{EUR}"),
        (rf"\\(?:textdegree|degree|textordmasculine){_NOT_LETTER}|\^\s*\{{\s*\\circ\s*\}}"
        rf"|\^\s*o(?![a-zA-Z])", r"^\\circ "),
        (rf"\\(?:checkmark|blacksquare|square|Box|qed|textquotesingle){_NOT_LETTER}|[_^]\{{\s*\}}", ""),
        (r"(?<![\w)}\]'!])\+\s*(?=\\infty)", ""),
        (rf"\\(?:lefteqn|mathord|mathbin|mathrel|mathopen|mathclose){_NOT_LETTER}", ""),
        (r"(?<![\\a-zA-Z])\{\s*([:.;!'])\s*\}", r"\1"), (r"\\%", "%"), (r"\*\*", "^"), (r"\\&", "&"),
        (r"\\#", ""),
        (rf"\\(?:ast|star){_NOT_LETTER}", "*"),
        (r"\\root\s*\{?(\d+)\}?\s*\\of\s*(\{[^{}]*\}|\w)", r"\\sqrt[\1]{\2}"),
        (r"\^\s*\{?(\d+)\}?\s*/\s*_\s*\{?(\d+)\}?", r"\\frac{\1}{\2}"),
        (r"(?<![A-Za-z])([ap])\.\s?m\.?(?![A-Za-z])", r"\\text{\1m}"),
        (r"(?<![A-Za-z])([AP])\.\s?M\.?(?![A-Za-z])", r"\\text{\1M}"),
    )
)  # fmt: skip
_FONT = re.compile(
    rf"\\(?:{_TEXT_FONTS})\*?{_NOT_LETTER}\s*\{{((?:[^{{}}\\]|\\[^a-zA-Z]|\\(?:text)\{{[a-zA-Z]+\}})*)\}}"
)
_NESTED_FONT = re.compile(rf"\\(?:{_TEXT_FONTS})\*?{_NOT_LETTER}\s*(?=\{{)")
_GROUPS = re.compile(
    r"(?<![\d.,])(\d{1,3})((?:(?:(?<!\\)\\[,;: ]|\\thinspace|\{,\}|[~'  ]| )\s?\d{3})+)(?![\d])"
)
_NOT_DIGIT = re.compile(r"\D")
_SPACING = re.compile(
    r"(?<!\\)\\[,;:> ]|~|\\(?:quad|qquad|enspace|thinspace|medspace|thickspace|space|hfill|nobreak"
    r"|newline)(?![a-zA-Z])|\s+"
)
_FRACTION_ARGUMENT = r"(\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|\\[a-zA-Z]+|[0-9a-zA-Z])"
_SHORT_FRACTION = re.compile(rf"\\(frac|binom)\s*{_FRACTION_ARGUMENT}\s*{_FRACTION_ARGUMENT}")
_SHORT_ROOT = re.compile(
    r"(?:\\sqrt|√|\\surd)\s*(\[[^\[\]]*\])?\s*(?:\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[a-zA-Z]|\\[a-zA-Z]+))"
)
_CUBE_ROOT = re.compile(r"(?:∛|\\cbrt)\s*(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9]+|[a-zA-Z]))")
_ASCII_FUNCTION = re.compile(rf"(?<![\\a-zA-Z{{])({'|'.join(FUNCTIONS)}|frac)(?![a-zA-Z])")
_GLUED_FUNCTION = re.compile(r"(?<![\\a-zA-Z])(sqrt|sin|cos|tan|ln|log)(?=[a-z0-9](?![a-z]))")
_ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log"}
_FUNCTION_WORDS = "|".join(name for name in FUNCTIONS if name not in ("min", "sec", "deg"))
_FUNCTION_UNIT = re.compile(r"(?<=\d)(\s*|\\[ ,;])(min|sec|deg)\b(?!\s*[({_])")
_RUN = re.compile(
    r"\\text\{[^{}]*\}|\\(?:begin|end)\{[a-zA-Z*]+\}(?:\{[clr|]*\})?|\\[a-zA-Z]+|(?<![_^])[^\W\d_]{2,}(?:['-][^\W\d_]{2,})*"
)
_VOWEL = re.compile(r"[aeiouyAEIOUY]|[^\x00-\x7f]")
_OVERESCAPED = re.compile(r"\\\\(?=[a-zA-Z]{2,})")
_SPACE_AROUND_TEXT = re.compile(r"\s+")


def _plain_unicode(text: str) -> str:
    """ASCII and LaTeX for what has an equivalent; the rest as it is."""
    out: list[str] = []
    place = 0
    while place < len(text):
        char = text[place]
        if char.isascii():
            out.append(char)
        elif char in _SUPERSCRIPTS or char in _SUBSCRIPTS:
            table = _SUPERSCRIPTS if char in _SUPERSCRIPTS else _SUBSCRIPTS
            end = place
            while end < len(text) and text[end] in table:
                end += 1
            before = "".join(out[-1:]).rstrip()
            if before and (before[-1].isalnum() or before[-1] in ")}]|'"):
                sign = "^" if table is _SUPERSCRIPTS else "_"
                out.append(f"{sign}{{{''.join(table[each] for each in text[place:end])}}}")
            else:
                out.append(text[place:end])
            place = end
            continue
        elif char in _SYMBOLS:
            out.append(_SYMBOLS[char])
        else:
            out.append(_one_char(char))
        place += 1
    return "".join(out)


def _one_char(char: str) -> str:
    category, decomposition = unicodedata.category(char), unicodedata.decomposition(char)
    if category == "Nd":
        return str(unicodedata.digit(char))
    if category == "Zs":
        return " "
    if char == "\u0305":  # a bar over the digit before it
        return "\u0305"
    if category == "Cf":
        return ""
    if decomposition.startswith("<fraction>"):
        above, _, below = unicodedata.normalize("NFKC", char).partition("\u2044")
        return rf"\frac{{{above}}}{{{below}}}" if below else char
    if decomposition.startswith(("<wide>", "<font>", "<narrow>", "<noBreak>", "<small>")):
        plain = unicodedata.normalize("NFKC", char)
        return _SYMBOLS.get(plain, plain)
    return char


def _text_words(match: re.Match[str]) -> str:
    r"""The content of a text font: its words as `\text{word}`, anything else as it is."""
    return " " * match[0].endswith(" }") + re.sub(
        r"\\text\{[a-zA-Z]+\}|[^\W\d_]+(?:['-][^\W\d_]+)*",
        lambda word: word[0] if word[0].startswith("\\") else rf"\text{{{word[0]}}}",
        match[1],
    )


def _as_word(match: re.Match[str]) -> str:
    run = match[0]
    if run[0] == "\\":
        return run
    low = run.lower()
    if low in FUNCTIONS or low == "frac":
        return run
    if low in _SHORT_WORDS or (len(run) >= 4 and _VOWEL.search(run)) or "-" in run or "'" in run:
        return rf"\text{{{run}}}"
    return run


def _strip_marks(text: str) -> str:
    """Without delimiters, quotes and stops around all of it."""
    while True:
        before = text
        text = text.strip()
        if text.startswith("**") and text.endswith("**") and len(text) > 4:
            text = text[2:-2]
        if len(text) > 2 and text[0] == text[-1] and text[0] in '"`':
            text = text[1:-1]
        if len(text) > 2 and text[0] == "'" == text[-1] and "'" not in text[1:-1]:
            text = text[1:-1]
        if text.startswith("``") and text.endswith("''"):
            text = text[2:-2]
        while text.endswith("\\"):
            text = text[:-1].rstrip()
        if text.endswith((".", ",", ";", ":", r"\text{.}")) and not text.endswith(
            ("...", "\\,", "\\;", "\\:")
        ):
            text = text.removesuffix(r"\text{.}").rstrip(".,;:")
        text = text.lstrip("=").strip()
        if text == before:
            return text


def normalise(answer: str) -> str:
    """The answer in one notation (see the module's docstring). Linear in the text; idempotent on what it
    returns for answers people write."""
    text = answer.strip()
    if len(text) > MAX_CHARS:
        return text
    if not text.isascii():
        text = _plain_unicode(text)
    if text.isascii() and text.isdigit():
        return text
    if "\\" in text and r"\begin" not in text:
        text = _OVERESCAPED.sub(r"\\", text)
    text = text.replace(r"\$", r"\text{USD}")
    for delimiter in ("$", r"\(", r"\)"):
        text = text.replace(delimiter, " ")
    if r"\begin" not in text:
        text = text.replace(r"\[", " ").replace(r"\]", " ")
    text = _strip_marks(text)
    if "\\" in text or any(mark in text for mark in "<>!=*^.{"):
        for pattern, new in _REPLACEMENTS:
            text = pattern.sub(new, text)
    text = _GROUPS.sub(lambda m: m[1] + _NOT_DIGIT.sub("", m[2]), text)
    text = text.replace("{,}", ",")
    text = _with_words(text)
    text = _SPACING.sub(" ", text)
    text = _with_commands(text)
    text = strip_outer_braces(_strip_marks(text))
    return _SPACE_AROUND_TEXT.sub(" ", text)


def _with_words(text: str) -> str:
    text = _FUNCTION_UNIT.sub(r"\1 \\text{\2}", text)
    for _ in range(6):
        changed = _FONT.sub(_text_words, text)
        if changed == text:
            break
        text = changed
    text = re.sub(rf"\\(?:{_TEXT_FONTS})\*?(?![a-zA-Z])\s*(?=\{{(?!\}}))(?!\{{[a-zA-Z'-]+\}})", "", text)
    text = _GLUED_FUNCTION.sub(r"\\\1 ", text)
    if re.search(r"[^\W\d_]{2}", text):
        text = _RUN.sub(_as_word, text)
    return text


def _with_commands(text: str) -> str:
    text = re.sub(
        rf"(?<!\d)(?<!\d )\\text\{{(min|sec|deg)\}}|\\text\{{({_FUNCTION_WORDS})\}}",
        lambda m: "\\" + _ALIASES.get(m[1] or m[2], m[1] or m[2]),
        text,
    )
    text = _ASCII_FUNCTION.sub(lambda m: "\\" + _ALIASES.get(m[1], m[1]) + " ", text) if text else text
    text = re.sub(r"(\\(?:sqrt|frac|binom|max|min|gcd|lcm|cbrt|exp)) (?=[({\[])", r"\1", text)
    if "√" in text or r"\sqrt" in text or r"\surd" in text:
        text = _SHORT_ROOT.sub(lambda m: rf"\sqrt{m[1] or ''}{{{m[2] if m[2] is not None else m[3]}}}", text)
    if "∛" in text or r"\cbrt" in text:
        text = _CUBE_ROOT.sub(lambda m: rf"\sqrt[3]{{{m[1] or m[2] or m[3]}}}", text)
    if r"\frac" in text or r"\binom" in text:
        text = _SHORT_FRACTION.sub(_braced_fraction, text)
    return text


def _braced_fraction(match: re.Match[str]) -> str:
    one, other = (
        part if part.startswith("{") else f"{{{part}}}" for part in (match[2].strip(), match[3].strip())
    )
    inner = (_SHORT_FRACTION.sub(_braced_fraction, part) for part in (one, other))
    return rf"\{match[1]}" + "".join(inner)
