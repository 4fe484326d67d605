"""The renderer: the template, the mask, and text that cannot pretend to be template."""

from __future__ import annotations

from typing import Any

import jinja2
import jinja2.sandbox
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4r.core.errors import UserError
from phi4r.core.problem import Conversation, Message, Problem
from phi4r.data.render import (
    chat_template,
    render_example,
    render_prompt,
    split_think,
)
from phi4r.data.tokenizer import Tokenizer
from phi4r.families.family import REASONING_MESSAGE

BUILTIN = Tokenizer.builtin()
SYSTEMS = ["none", "reasoning", 'It\'s "quoted"\\\r\n{{ not jinja }} é🙂']
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
hostile = st.lists(
    st.one_of(text, st.sampled_from(["<|im_end|>", "<|im_start|>", "<think>", "</think>"]))
).map("".join)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": hostile}), min_size=1
)


@pytest.fixture(params=["sentencepiece", "huggingface"])
def tokenizer(request: pytest.FixtureRequest, phi4_like: Tokenizer) -> Tokenizer:
    return BUILTIN if request.param == "sentencepiece" else phi4_like


def test_a_problem_becomes_one_user_turn_and_a_think_block(tokenizer: Tokenizer) -> None:
    problem = Problem("p", "7*9-6=?", "7", trace="7*9=3;3-6=7")
    ids, mask = render_example(tokenizer, problem)
    assert (ids.dtype, mask.dtype) == (np.int32, np.bool_)
    prompt = "<|im_start|>user<|im_sep|>7*9-6=?<|im_end|><|im_start|>assistant<|im_sep|>"
    reply = "<think>7*9=3;3-6=7</think>\\boxed{7}<|im_end|>"
    assert tokenizer.decode(ids) == prompt + reply
    assert tokenizer.decode(ids[mask]) == reply
    assert [int(i) for i in ids[mask]].count(tokenizer.think) == 1
    assert ids[mask][-1] == tokenizer.im_end
    assert ids[~mask].tolist() == render_prompt(tokenizer, problem)


def test_every_assistant_turn_is_a_target_and_nothing_else_is(tokenizer: Tokenizer) -> None:
    conversation = Conversation(
        "c",
        (
            Message("system", "be kind"),
            Message("user", "1+1?"),
            Message("assistant", "<think>add</think>2"),
            Message("user", "sure?"),
            Message("assistant", "yes"),
        ),
    )
    ids, mask = render_example(tokenizer, conversation)
    assert tokenizer.decode(ids[mask]) == "<think>add</think>2<|im_end|>yes<|im_end|>"
    assert tokenizer.decode(ids) == (
        "<|im_start|>system<|im_sep|>be kind<|im_end|><|im_start|>user<|im_sep|>1+1?<|im_end|>"
        "<|im_start|>assistant<|im_sep|><think>add</think>2<|im_end|><|im_start|>user<|im_sep|>sure?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>yes<|im_end|>"
    )


def test_the_reasoning_message_comes_first_and_asks_for_two_sections(tokenizer: Tokenizer) -> None:
    assert "<think> {Thought section} </think> {Solution section}" in REASONING_MESSAGE
    ids = render_prompt(tokenizer, [Message("system", "own"), Message("user", "q")], "reasoning")
    assert tokenizer.decode(ids) == (
        f"<|im_start|>system<|im_sep|>{REASONING_MESSAGE}<|im_end|><|im_start|>system<|im_sep|>own<|im_end|>"
        "<|im_start|>user<|im_sep|>q<|im_end|><|im_start|>assistant<|im_sep|>"
    )
    # The tags in the system message are words about a format: only the assistant opens a think block.
    assert tokenizer.think not in ids
    assert tokenizer.end_think not in ids


@settings(max_examples=100, deadline=None)
@given(turns=messages)
def test_no_text_of_a_user_can_become_a_template_token(
    phi4_like: Tokenizer, turns: list[dict[str, str]]
) -> None:
    for tokenizer in (BUILTIN, phi4_like):
        ids = render_prompt(tokenizer, turns)
        assert ids.count(tokenizer.specials["<|im_start|>"]) == len(turns) + 1
        assert ids.count(tokenizer.specials["<|im_sep|>"]) == len(turns) + 1
        assert ids.count(tokenizer.im_end) == len(turns)
        assert tokenizer.think not in ids
        assert tokenizer.end_think not in ids
        assert [chunk["content"] for chunk in turns] == _contents(tokenizer, ids)


def _contents(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Text between each <|im_sep|> and the next <|im_end|>."""
    found, start = [], 0
    for at, token in enumerate(ids):
        if token == tokenizer.specials["<|im_sep|>"]:
            start = at + 1
        elif token == tokenizer.im_end:
            found.append(tokenizer.decode(ids[start:at]))
    return found


def test_tags_past_the_first_think_block_are_ordinary_text(tokenizer: Tokenizer) -> None:
    reply = "<think>a <think> b</think>c</think><|im_end|>d"
    ids, mask = render_example(
        tokenizer, [{"role": "user", "content": "q"}, {"role": "assistant", "content": reply}]
    )
    target = ids[mask].tolist()
    assert tokenizer.decode(target) == reply + "<|im_end|>"
    assert [target.count(i) for i in (tokenizer.think, tokenizer.end_think, tokenizer.im_end)] == [1, 1, 1]
    assert target.index(tokenizer.end_think) == 1 + len(tokenizer.encode("a <think> b"))


def test_a_think_block_is_found_only_at_the_very_start() -> None:
    assert split_think("<think></think>5") == ("", "5")
    assert split_think("so <think>a</think>5") == (None, "so <think>a</think>5")
    with pytest.raises(UserError, match="never closes"):
        split_think("<think>5")


def test_a_row_without_working_is_refused_and_half_a_row_is_completed() -> None:
    with pytest.raises(UserError, match="neither 'trace' nor 'solution'"):
        render_example(BUILTIN, Problem("p", "q", "5"))
    ids, mask = render_example(BUILTIN, Problem("p", "q", "5", solution="It is 5."))
    assert BUILTIN.decode(ids[mask]) == "<think></think>It is 5.<|im_end|>"


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(UserError, match="unknown role 'tool'"):
        render_prompt(BUILTIN, [{"role": "tool", "content": "x"}])


def _render_template(template: str, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
    def raise_exception(message: str) -> Any:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    compiled = environment.from_string(template)
    return compiled.render(messages=turns, add_generation_prompt=add_generation_prompt)


@settings(max_examples=60, deadline=None)
@given(turns=messages, system=st.sampled_from(SYSTEMS))
def test_the_chat_template_gives_the_text_of_the_renderer(turns: list[dict[str, str]], system: str) -> None:
    template = chat_template(system)
    assert _render_template(template, turns, True) == BUILTIN.decode(render_prompt(BUILTIN, turns, system))
    dialogue = [*turns, {"role": "assistant", "content": "<think>\n a</think> b\n"}]
    ids, _ = render_example(BUILTIN, dialogue, system)
    assert _render_template(template, dialogue, False) == BUILTIN.decode(ids)
    with pytest.raises(jinja2.TemplateError, match="unknown role tool"):
        _render_template(template, [{"role": "tool", "content": "x"}], False)


def test_transformers_applies_the_template_to_the_same_ids(
    phi4_like: Tokenizer, phi4_reasoning_folder: Any
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(phi4_reasoning_folder / "tokenizer.json")
    )
    theirs.chat_template = chat_template("reasoning")
    turns = [
        {"role": "user", "content": "Hello World\n"},
        {"role": "assistant", "content": "<think>a</think>b"},
    ]
    text = theirs.apply_chat_template(turns, tokenize=False)
    ids, _ = render_example(phi4_like, turns, "reasoning")
    assert text == phi4_like.decode(ids)
    # Their ids differ from ours in one respect only: theirs make special tokens of the tags the system
    # message quotes.
    without_system = chat_template("none")
    ids, _ = render_example(phi4_like, turns)
    assert theirs.apply_chat_template(turns, chat_template=without_system, return_dict=False) == ids.tolist()
