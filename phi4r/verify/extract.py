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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from phi4r.families.registry import chat_formats

THINK = "<think>"
END_THINK = "</think>"
_END_MARKERS = tuple(dict.fromkeys(end for chat in chat_formats() for end in (chat.end, chat.end_of_text)))

# Longest unboxed solution that is looked at as a bare answer.
MAX_PLAIN_CHARS = 400

# Over-escaped data has doubled backslashes (`\\boxed`); the look-behind keeps long runs of them linear.
_BOX_TOKENS = re.compile(r"(?<!\\)\\+(?:boxed|fbox)(?![a-zA-Z])\s*\{|\\\\|\\[{}]|[{}]")
_BOX_OPEN = re.compile(r"(?<!\\)\\+(?:boxed|fbox)(?![a-zA-Z])\s*\{")
_LATEX_COMMAND = re.compile(r"\\text\{[^{}]*\}|\\[a-zA-Z]+")
_LONG_WORD = re.compile(r"[^\W\d_]{2,}")
_FUNCTION_WORD = re.compile(r"(arc)?(sin|cos|tan)h?|cot|sec|csc|log|ln|exp|sqrt|pi|max|min|gcd|lcm|mod")


AnswerStyle = Literal["boxed", "line", "tag"]
ANSWER_STYLES: tuple[AnswerStyle, ...] = ("boxed", "line", "tag")
_ANSWER_LINE = re.compile(
    r"^[ \t*_#>-]*(?:the[ ]|my[ ])?(?:final[ ])?answer(?:[ ]is)?[ \t*_]*:[ \t*_]*(\S.*?)[ \t*_]*$",
    re.IGNORECASE | re.MULTILINE,
)
_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Extraction:
    """What was found in a response.

    `answer`: the text of the answer, None where there is none. `source`: how it was found, or why not:
    "boxed", "plain", or "unterminated_box", "unclosed_think", "prose", "empty". `boxes`: the content of all
    boxes, where there are several and not one answer in them.
    """

    answer: str | None
    source: str
    boxes: tuple[str, ...] = ()


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


_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;.~]|\\[,;: ()\[\]]|\\q?quad|(?:\\(?:text|mathrm|textbf)\{)?\s*\b(?:and|or)\b\s*\}?"
    r"|(?<![a-zA-Z])[a-zA-Z](?:_\{?\w+\}?)?\s*=)*+"
)
_JOINER = re.compile(r",|;|\band\b|\bor\b|=")
MAX_BOXES = 12


def list_of_boxes(boxes: Sequence[str]) -> str:
    """Several boxes as one list."""
    return ", ".join(boxes)


def joined_boxes(text: str) -> tuple[str | None, tuple[str, ...]]:
    r"""(the boxes at the end of `text` as one answer, if they are one, all boxes if there are several).

    `x=\boxed{1}$ or $x=\boxed{2}` is one answer, `1, 2`: between such boxes stand a comma, "and", "or", names
    and signs of equality, and nothing else. The name of the first is then a part of the answer as well.
    """
    spans = _outer_boxes(text)
    if not 1 < len(spans) <= MAX_BOXES:
        return None, ()
    contents = tuple(strip_outer_braces(_BOX_OPEN.sub("{", text[start:end])) for _, start, end in spans)
    run = [len(spans) - 1]
    while run[0] > 0:
        between = text[spans[run[0] - 1][2] + 1 : spans[run[0]][0]]
        if not _BETWEEN_BOXES.fullmatch(between) or not _JOINER.search(between):
            break
        run.insert(0, run[0] - 1)
    if len(run) == 1:
        return None, contents
    parts = []
    for place in run:
        before = text[spans[place - 1][2] + 1 if place else 0 : spans[place][0]]
        name = _NAME_BEFORE.search(before)
        parts.append((name[1] + "=" if name and "=" not in contents[place] else "") + contents[place])
    if len(set(parts)) == 1:
        return parts[0], ()
    return list_of_boxes(parts), ()


_NAME_BEFORE = re.compile(r"(?<![a-zA-Z\\])([a-zA-Z](?:_\{?\w+\}?)?)\s*=\s*$")


def _outer_boxes(text: str) -> list[tuple[int, int, int]]:
    """(start of the command, start and end of the content) of the boxes that are in no other, in order."""
    opened: list[tuple[int, int, bool]] = []
    found: list[tuple[int, int, int]] = []
    for token in _BOX_TOKENS.finditer(text):
        symbol = token.group()
        if symbol == "{":
            opened.append((token.start(), token.end(), False))
        elif symbol == "}":
            if opened:
                start, content, is_box = opened.pop()
                if is_box and not any(each[2] for each in opened):
                    found.append((start, content, token.start()))
        elif symbol.endswith("{") and symbol != r"\{":
            opened.append((token.start(), token.end(), True))
    return found


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
        if not boxed:
            return Extraction(None, "empty")
        joined, boxes = joined_boxes(solution)
        return Extraction(boxed if joined is None else joined, "boxed", boxes)
    if not solution:
        return Extraction(None, "empty")
    before, marker, marked = solution.rpartition("####")
    if marker and (not before or before.endswith("\n")):
        solution = marked.strip()
    return Extraction(solution, "plain") if is_plain_answer(solution) else Extraction(None, "prose")


def in_box(response: str, style: AnswerStyle) -> str:
    r"""The response with its answer in a box, where `style` says that it stands elsewhere.

    "boxed": the response as it is. "line": the last line `Answer: X` of the solution. "tag": the last
    `<answer>X</answer>`. A solution without it has no answer, whatever boxes it has.
    """
    solution = solution_text(response) if style != "boxed" else None
    if solution is None:
        return response
    found = (_ANSWER_LINE if style == "line" else _ANSWER_TAG).findall(strip_end_markers(solution))
    before = response[: len(response) - len(solution)]
    return f"{before}\\boxed{{{found[-1].strip()}}}" if found else before


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
