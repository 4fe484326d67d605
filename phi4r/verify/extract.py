r"""Where a response's answer stands. Pure text functions, linear in the length of the text.

A response looks like `<think>{working}</think>{solution}<|im_end|>`. Only what follows the last `</think>`
can hold the answer, so a box inside the think block never counts. In the solution the answer is the last
`\boxed{...}`; an unterminated last box is no answer (the response was cut off inside it; an earlier box is
not what it meant to say). Without any box, the solution itself is the answer if it is nothing but an answer
(`7`, `\frac{1}{2}`, `x^2+1`, `blue`): prose without a box is no answer, whatever numbers it mentions. A
last line `#### 7` (GSM8K's mark) counts as that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

THINK = "<think>"
END_THINK = "</think>"
_END_MARKERS = ("<|im_end|>", "<|endoftext|>")

# Longest unboxed solution that is looked at as a bare answer.
MAX_PLAIN_CHARS = 400

# Over-escaped data has doubled backslashes (`\\boxed`); the look-behind keeps long runs of them linear.
_BOX_TOKENS = re.compile(r"(?<!\\)\\+(?:boxed|fbox)(?![a-zA-Z])\s*\{|\\\\|\\[{}]|[{}]")
_BOX_OPEN = re.compile(r"(?<!\\)\\+(?:boxed|fbox)(?![a-zA-Z])\s*\{")
_LATEX_COMMAND = re.compile(r"\\text\{[^{}]*\}|\\[a-zA-Z]+")
_LONG_WORD = re.compile(r"[^\W\d_]{2,}")
_FUNCTION_WORD = re.compile(r"(arc)?(sin|cos|tan)h?|cot|sec|csc|log|ln|exp|sqrt|pi|max|min|gcd|lcm|mod")


@dataclass(frozen=True)
class Extraction:
    """What was found in a response.

    `answer`: the text of the answer, None where there is none. `source`: how it was found, or why not:
    "boxed", "plain", or "unterminated_box", "unclosed_think", "prose", "empty".
    """

    answer: str | None
    source: str


def strip_end_markers(text: str) -> str:
    """`text` without surrounding blanks and without end-of-turn tokens at its end."""
    text = text.strip()
    shorter = True
    while shorter:
        shorter = False
        for marker in _END_MARKERS:
            if text.endswith(marker):
                text = text[: -len(marker)].rstrip()
                shorter = True
    return text


def think_block_is_valid(response: str) -> bool:
    """Whether the response opens with one `<think>` block that is closed, with no other think tag anywhere.

    The block may be empty; what follows it may be empty too (that is a missing answer, not a missing think
    block).
    """
    return (
        response.lstrip().startswith(THINK) and response.count(THINK) == 1 and response.count(END_THINK) == 1
    )


def solution_text(response: str) -> str | None:
    """What follows the last `</think>`; the whole text if it has no think tags; None if a think block is
    still open.
    """
    opened, closed = response.rfind(THINK), response.rfind(END_THINK)
    if opened > closed:
        return None
    return response if closed < 0 else response[closed + len(END_THINK) :]


def last_boxed(text: str) -> tuple[str | None, bool]:
    r"""(content of the last `\boxed{...}`, whether any box was opened).

    Braces are matched; escaped braces (`\{`) do not count. Of nested boxes the outermost is meant, and
    boxes inside the content are unwrapped to plain braces. The content is None if the last box never
    closes.
    """
    open_braces: list[tuple[int, int, bool]] = []  # (start of the token, start of the content, opens a box)
    boxes: list[tuple[int, int, int]] = []  # (start of the token, start and end of the content), closed boxes
    last_opened = -1
    for token in _BOX_TOKENS.finditer(text):
        symbol = token.group()
        if symbol == "{":
            open_braces.append((token.start(), token.end(), False))
        elif symbol == "}":
            if open_braces:
                start, content_start, is_box = open_braces.pop()
                if is_box:
                    boxes.append((start, content_start, token.start()))
        elif symbol.endswith("{") and symbol != r"\{":
            last_opened = token.start()
            open_braces.append((token.start(), token.end(), True))
    if last_opened < 0:
        return None, False
    enclosing = [box for box in boxes if box[0] <= last_opened < box[2]]
    if not any(box[0] == last_opened for box in enclosing):
        return None, True
    _, content_start, content_end = min(enclosing)
    return strip_outer_braces(_BOX_OPEN.sub("{", text[content_start:content_end])), True


def strip_outer_braces(text: str) -> str:
    """`text` without the pairs of braces that wrap all of it: `{{7}}` is `7`, `{1}{2}` stays."""
    text = text.strip()
    partner: dict[int, int] = {}
    opened: list[int] = []
    for token in _BOX_TOKENS.finditer(text):
        symbol = token.group()
        if symbol == "{" or (symbol.endswith("{") and symbol != r"\{"):
            opened.append(token.end() - 1)
        elif symbol == "}" and opened:
            partner[opened.pop()] = token.start()
    start, end = 0, len(text)
    while start < end and partner.get(start) == end - 1:
        start, end = start + 1, end - 1
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
    return text[start:end]


def is_plain_answer(text: str) -> bool:
    r"""Whether `text`, which has no box, is a bare answer and not prose.

    One line, at most `MAX_PLAIN_CHARS` characters, and either a single word (`blue`, `yes`) or without any
    word of two or more letters other than LaTeX commands, `\text{...}` and names of functions.
    """
    if not text or len(text) > MAX_PLAIN_CHARS or "\n" in text:
        return False
    if text.isalpha():
        return True
    words = _LONG_WORD.findall(_LATEX_COMMAND.sub(" ", text))
    return all(_FUNCTION_WORD.fullmatch(word.lower()) for word in words)


def extract_solution_answer(solution: str) -> Extraction:
    """The answer in a solution (the text after `</think>`): its last box, or all of it if it is a bare
    answer.
    """
    solution = strip_end_markers(solution)
    boxed, has_box = last_boxed(solution)
    if has_box:
        if boxed is None:
            return Extraction(None, "unterminated_box")
        return Extraction(boxed, "boxed") if boxed else Extraction(None, "empty")
    if not solution:
        return Extraction(None, "empty")
    before, marker, marked = solution.rpartition("####")
    if marker and (not before or before.endswith("\n")):
        solution = marked.strip()
    return Extraction(solution, "plain") if is_plain_answer(solution) else Extraction(None, "prose")


def extract_answer(response: str) -> Extraction:
    """The answer in a whole response, think block included. See the module docstring for the rules."""
    solution = solution_text(response)
    if solution is None:
        return Extraction(None, "unclosed_think")
    return extract_solution_answer(solution)


def gold_answer(gold: str) -> str:
    r"""The reference answer in `gold`, which may be bare (`7`), boxed, or GSM8K's `worked steps #### 7`."""
    boxed, _ = last_boxed(gold)
    if boxed:
        return boxed
    return gold.rpartition("####")[2].strip()
