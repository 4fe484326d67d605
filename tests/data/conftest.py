"""A tokenizer.json with the names and ids of Phi-4's special tokens, made here: the real one is not needed to
test ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from phi4r.data.tokenizer import Tokenizer

PHI4_IDS = {
    "<|endoftext|>": 100257,
    "<|im_start|>": 100264,
    "<|im_end|>": 100265,
    "<|im_sep|>": 100266,
    "<|dummy_85|>": 100349,
}
WORDS = {"Hello": 9906, "ĠWorld": 4435, "assistant": 78191}


def write_phi4_like(folder: Path, think: tuple[str, str]) -> Path:
    """Writes tokenizer.json (byte-level BPE, 100,352 ids) and tokenizer_config.json; `think` names ids 100350
    and 100351."""
    bytes_in_order = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_id = dict(enumerate(bytes_in_order)) | {i: word for word, i in WORDS.items()}
    specials = {i: name for name, i in PHI4_IDS.items()} | {100350: think[0], 100351: think[1]}
    specials |= {i: f"<|dummy_{i - 100264}|>" for i in range(100267, 100349)}
    vocab = {by_id.get(index, f"\uffff{index}"): index for index in range(100256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [specials.get(index, f"<|unused_{index}|>") for index in range(100256, 100352)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names])
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:
        # As in the wild: think tags are often added tokens that are not marked as special.
        token["special"] = token["content"] not in ("<think>", "</think>")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    decoder = {str(token["id"]): {"content": token["content"]} for token in spec["added_tokens"]}
    config = {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>", "pad_token": "<|dummy_85|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def phi4_reasoning_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phi4_like(tmp_path_factory.mktemp("phi4_reasoning"), ("<think>", "</think>"))


@pytest.fixture(scope="session")
def phi4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phi4_like(tmp_path_factory.mktemp("phi4"), ("<|dummy_86|>", "<|dummy_87|>"))


@pytest.fixture(scope="session")
def phi4_like(phi4_reasoning_folder: Path) -> Tokenizer:
    return Tokenizer.load(phi4_reasoning_folder)
