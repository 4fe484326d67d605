"""How the families write conversations, and where their think tokens come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from phi4r.data.render import chat_template, render_example, render_prompt
from phi4r.data.tokenizer import Tokenizer
from phi4r.families.registry import FAMILIES, get_family

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?\n"},
    {"role": "assistant", "content": "<think>add</think>2"},
]
MINI = (
    "<|system|>Be brief.<|end|><|user|>1+1?\n<|end|><|assistant|>",
    "<think>add</think>2<|end|>",
    "",
)
QWEN3 = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?\n<|im_end|>\n<|im_start|>assistant\n",
    "<think>add</think>2<|im_end|>",
    "\n",
)
PHI4 = (
    "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>1+1?\n<|im_end|>"
    "<|im_start|>assistant<|im_sep|>",
    "<think>add</think>2<|im_end|>",
    "",
)
TEXTS = {"phi4": PHI4, "phi4_mini": MINI, "qwen3": QWEN3}
"""Family -> (prompt, what is trained on, what follows) of TURNS."""


def write_tokenizer(folder: Path, specials: list[str]) -> Path:
    """A byte-level tokenizer folder with these special tokens."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in specials])
    folder.mkdir()
    (folder / "tokenizer.json").write_text(made.to_str())
    decoder = {str(256 + i): {"content": name} for i, name in enumerate(specials)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_is_written_as_its_family_writes_it(name: str, tmp_path: Path) -> None:
    chat = get_family(name).chat
    folder = write_tokenizer(tmp_path / "tokenizer", [*chat.special_tokens, "<think>", "</think>"])
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.chat == chat
    prompt, target, rest = TEXTS[name]
    ids, mask = render_example(tokenizer, TURNS)
    assert tokenizer.decode(ids) == prompt + target + rest
    assert tokenizer.decode(ids[mask]) == target
    assert ids.tolist()[: mask.tolist().index(True)] == render_prompt(tokenizer, TURNS[:2])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    theirs.chat_template = chat_template("none", chat)
    assert theirs.apply_chat_template(TURNS, return_dict=False) == ids.tolist()
    text = theirs.apply_chat_template(TURNS[:2], tokenize=False, add_generation_prompt=True)
    assert text == prompt


def test_phi4_mini_gets_think_tokens_behind_its_last(tmp_path: Path) -> None:
    names = [*get_family("phi4_mini").chat.special_tokens, "<|tag|>"]
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path / "mini", names))
    first = 256 + len(names)
    assert (tokenizer.think, tokenizer.end_think, tokenizer.vocab_size) == (first, first + 1, first + 2)
    assert tokenizer.note.endswith(f"<think> and </think> are new tokens, ids {first} and {first + 1}")
    tokenizer.save(tmp_path / "saved")
    saved = Tokenizer.load(tmp_path / "saved")
    assert (saved.think, saved.end_think, saved.note) == (first, first + 1, "")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "saved" / "tokenizer.json"))
    assert theirs.encode("<think>") == [first]
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"][str(first)]["content"] == "<think>"
