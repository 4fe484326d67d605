"""Messages to ids and loss mask: the one place where a conversation becomes tokens.

The template is that of the tokenizer's family (`ChatFormat`). Phi-4's, without newlines, is
`<|im_start|>{role}<|im_sep|>{content}<|im_end|>` per turn; a prompt to be answered ends with
`<|im_start|>assistant<|im_sep|>`, and `<think>` is not pre-filled. Template tokens are placed as ids, never
found in text, so nothing a user writes can open or close a turn. The loss covers what the assistant wrote,
the closing `<|im_end|>` included; an assistant's text that opens with `<think>` gets its think block as ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from phi4r.core.errors import UserError
from phi4r.core.problem import ROLES, Conversation, Message, Problem
from phi4r.data.tokenizer import Tokenizer
from phi4r.families.family import END_THINK, REASONING_MESSAGE, THINK, ChatFormat
from phi4r.families.phi4 import PHI4

AnyMessage = Message | Mapping[str, str]


def system_text(system: str) -> str:
    """The text of the `system_message` setting: "none" -> "", "reasoning" -> our reasoning message, else the
    text itself."""
    return {"none": "", "reasoning": REASONING_MESSAGE}.get(system, system)


def split_think(content: str) -> tuple[str | None, str]:
    """(text of the think block, text after it) of an assistant's content; (None, content) if it does not open
    with one.

    The block opens at the very start and closes at the first `</think>`. One that never closes is a
    `UserError`: as a training target it would teach a format that earns the lowest reward.
    """
    if not content.startswith(THINK):
        return None, content
    trace, closed, solution = content[len(THINK) :].partition(END_THINK)
    if not closed:
        raise UserError(f"assistant content opens {THINK} and never closes it: {content[:60]!r}")
    return trace, solution


def _assistant_ids(tokenizer: Tokenizer, trace: str | None, solution: str) -> list[int]:
    answer = tokenizer.encode(solution)
    if trace is None:
        return answer
    return [tokenizer.think, *tokenizer.encode(trace), tokenizer.end_think, *answer]


def conversation(messages: Sequence[AnyMessage] | Problem, system: str = "none") -> list[Message]:
    """The turns to be answered or trained on, checked: a problem is one user turn; the turn that `system`
    gives (`system_text`) comes first."""
    if isinstance(messages, Problem):
        messages = [Message("user", messages.problem)]
    turns = [Message("system", system_text(system))] if system_text(system) else []
    for message in messages:
        turn = message if isinstance(message, Message) else Message(message["role"], message["content"])
        if turn.role not in ROLES:
            raise UserError(f"unknown role {turn.role!r} (known: {', '.join(ROLES)})")
        turns.append(turn)
    return turns


class _Writer:
    """Ids and mask of a conversation, a turn at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.mask: list[bool] = []

    def add(self, ids: Sequence[int], is_target: bool) -> None:
        self.ids += ids
        self.mask += [is_target] * len(ids)

    def open_turn(self, role: str) -> None:
        self.add(self.tokenizer.header(role), False)

    def turn(self, role: str, content: Sequence[int]) -> None:
        self.open_turn(role)
        self.add([*content, self.tokenizer.im_end], role == "assistant")
        self.add(self.tokenizer.encode(self.tokenizer.chat.after_end), False)

    def message(self, message: Message) -> None:
        if message.role == "assistant":
            self.turn(message.role, _assistant_ids(self.tokenizer, *split_think(message.content)))
        else:
            self.turn(message.role, self.tokenizer.encode(message.content))


def render_prompt(
    tokenizer: Tokenizer, messages: Sequence[AnyMessage] | Problem, system: str = "none"
) -> list[int]:
    """Ids of a conversation to be answered: all turns, then the generation prompt
    `<|im_start|>assistant<|im_sep|>`.

    `messages`: `Message`s or {"role", "content"}, or a `Problem` (its text is one user turn). `system`: see
    `system_text`; the system turn it gives comes first, before a system turn of the conversation's own.
    """
    writer = _Writer(tokenizer)
    for turn in conversation(messages, system):
        writer.message(turn)
    writer.open_turn("assistant")
    return writer.ids


def problem_reply(problem: Problem) -> tuple[str, str]:
    """(think text, solution text) that SFT trains on for a problem row.

    A row with a trace but no solution is closed with `\\boxed{answer}`; one with a solution but no trace gets
    an empty think block. A row with neither has nothing to imitate: `UserError`.
    """
    if problem.trace is None and problem.solution is None:
        raise UserError(
            f"problem {problem.id} has neither 'trace' nor 'solution', so there is nothing to train on"
        )
    solution = rf"\boxed{{{problem.answer}}}" if problem.solution is None else problem.solution
    return problem.trace or "", solution


def render_example(
    tokenizer: Tokenizer, example: Sequence[AnyMessage] | Conversation | Problem, system: str = "none"
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """(ids int32[n], loss_mask bool[n]) of a training example; the mask is True on tokens that are targets.

    Targets are every assistant turn's tokens and its closing `<|im_end|>`; system and user turns and all turn
    headers are not. The ids up to the first target are exactly `render_prompt` of what stands before the
    reply.
    """
    writer = _Writer(tokenizer)
    if isinstance(example, Problem):
        reply = problem_reply(example)
        for turn in conversation(example, system):
            writer.message(turn)
        writer.turn("assistant", _assistant_ids(tokenizer, *reply))
    else:
        messages = example.messages if isinstance(example, Conversation) else example
        for turn in conversation(messages, system):
            writer.message(turn)
    return np.asarray(writer.ids, dtype=np.int32), np.asarray(writer.mask, dtype=np.bool_)


def _jinja_literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def chat_template(system: str = "none", chat: ChatFormat = PHI4.chat) -> str:
    """The renderer as a Jinja template, for tokenizer folders that other programs load.

    Rendering it gives the text of `render_prompt` (with `add_generation_prompt`) or of `render_example`
    (without). Text is all it can give: a program that tokenises that text cannot tell a special token from a
    user who typed its name.
    """
    text, close = system_text(system), chat.end + chat.after_end
    opening = _jinja_literal(chat.header.format(role="system") + text + close)
    start = f"{{{{ {opening} }}}}" if text else ""
    roles = "[" + ", ".join(f"'{role}'" for role in ROLES) + "]"
    before, after = map(_jinja_literal, chat.header.split("{role}"))
    header = f"{before} + message['role'] + {after}"
    assistant = _jinja_literal(chat.header.format(role="assistant"))
    return (
        f"{start}"
        "{% for message in messages %}"
        f"{{% if message['role'] not in {roles} %}}"
        "{{ raise_exception('unknown role ' + message['role']) }}"
        "{% endif %}"
        f"{{{{ {header} + message['content'] + {_jinja_literal(close)} }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {assistant} }}}}{{% endif %}}"
    )
