"""Tokenizers: text survives, special ids come only from us, files travel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phi4r.core.errors import UserError
from phi4r.data import spm
from phi4r.data.tokenizer import Tokenizer

BUILTIN = Tokenizer.builtin()
any_text = st.text(st.characters(exclude_categories=["Cs"]))
SPECIAL_TEXTS = ["<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<pad>"]


@settings(max_examples=300, deadline=None)
@given(any_text)
@example("  two  spaces \n\n\ttab\r\n ")
@example("\u2581 is SentencePiece's own mark, twice \u2581\u2581")
@example("\x00 é ∀ 🙂 \ufeff <0x41> <unk>")
@example("".join(SPECIAL_TEXTS))
def test_the_builtin_tokenizer_round_trips_and_makes_no_special_id(text: str) -> None:
    ids = BUILTIN.encode(text)
    assert BUILTIN.decode(ids) == text
    assert not set(ids) & set(BUILTIN.special_ids)


@settings(max_examples=100, deadline=None)
@given(text=any_text)
@example(text="a <|im_end|> b</think><|dummy_85|><|dummy_3|>")
def test_a_hugging_face_tokenizer_round_trips_and_makes_no_special_id(
    phi4_like: Tokenizer, text: str
) -> None:
    tokenizer = phi4_like
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids)


@pytest.mark.parametrize("symbol", list("0123456789+-*/=%()<>;:,.? \n") + list("azAZ_{}\\^$"))
def test_every_ascii_character_of_a_problem_is_one_token(symbol: str) -> None:
    assert len(BUILTIN.encode(symbol)) == 1
    assert BUILTIN.encode("7" + symbol + symbol + "4") == [
        i for char in ("7", symbol, symbol, "4") for i in BUILTIN.encode(char)
    ]


def test_the_builtin_vocabulary_is_small_and_needs_no_padding() -> None:
    assert BUILTIN.vocab_size == 320
    names = [BUILTIN.special_ids[i] for i in sorted(BUILTIN.special_ids)]
    assert names == list(spm.CHAT_SYMBOLS)


def test_the_builtin_model_has_the_same_bytes_every_time() -> None:
    first = spm.builtin_model()
    spm.builtin_model.cache_clear()
    assert spm.builtin_model() == first


def test_decode_writes_special_tokens_and_can_leave_out_the_template() -> None:
    t = BUILTIN
    ids = [
        t.specials["<|im_sep|>"],
        t.think,
        *t.encode("1+1 "),
        t.end_think,
        *t.encode(" 2"),
        t.im_end,
        t.pad,
    ]
    assert t.decode(ids) == "<|im_sep|><think>1+1 </think> 2<|im_end|><pad>"
    assert t.decode(ids, skip_special=True) == "<think>1+1 </think> 2"
    assert t.eos_ids == (t.im_end, t.endoftext)


def test_phi4_test_vectors_of_the_reference_page(phi4_reasoning_folder: Path) -> None:
    tokenizer = Tokenizer.load(phi4_reasoning_folder / "tokenizer.json")
    text = "<|im_start|>Hello<|im_sep|> World<|im_end|><|dummy_85|>"
    assert tokenizer.encode_trusted(text) == [100264, 9906, 100266, 4435, 100265, 100349]
    turn = "<|im_end|><|im_start|>assistant<|im_sep|>"
    assert tokenizer.encode_trusted(turn) == [100265, 100264, 78191, 100266]
    assert tokenizer.decode(tokenizer.encode_trusted(text)) == text
    assert (tokenizer.pad, tokenizer.eos_ids) == (100349, (100265, 100257))
    assert (tokenizer.think, tokenizer.end_think) == (100350, 100351)
    assert tokenizer.vocab_size == 100352


def test_phi4s_own_placeholders_become_think_tokens_with_a_note(phi4_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(phi4_folder)
    assert (tokenizer.think, tokenizer.end_think, tokenizer.vocab_size) == (100350, 100351, 100352)
    assert "its unused tokens <|dummy_86|> and <|dummy_87|> become <think> and </think>" in tokenizer.note
    tokenizer.save(tmp_path)
    saved = Tokenizer.load(tmp_path)
    assert (saved.think, saved.end_think, saved.note) == (100350, 100351, "")


def test_a_tokenizer_without_tokens_to_spare_is_refused_with_the_way_out(
    phi4_folder: Path, tmp_path: Path
) -> None:
    spec = json.loads((phi4_folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["content"] = token["content"].replace("<|dummy_86|>", "<|taken|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"no single token for <think> and </think>.*tokenizer\.think_tokens"):
        Tokenizer.load(tmp_path)


def test_named_tokens_become_think_tokens_and_stay_so_in_the_saved_copy(
    phi4_folder: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(phi4_folder, think_tokens="<|dummy_86|>, <|dummy_87|>")
    assert tokenizer.note == ""
    assert (tokenizer.think, tokenizer.end_think) == (100350, 100351)
    assert tokenizer.decode([100350, 100351]) == "<think></think>"
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.think, again.end_think, again.vocab_size) == (100350, 100351, 100352)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"]["100350"]["content"] == "<think>"
    assert config["added_tokens_decoder"]["100349"]["content"] == "<|dummy_85|>"


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("<|dummy_86|>", "two token names"),
        ("<|dummy_86|>,<|dummy_86|>", "two token names"),
        ("<|dummy_86|>,<|nobody|>", "not an added token"),
        ("<|dummy_85|>,<|dummy_87|>", "needs"),
    ],
)
def test_a_wrong_think_tokens_setting_is_named(phi4_folder: Path, setting: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Tokenizer.load(phi4_folder, think_tokens=setting)


def test_think_tokens_may_not_rename_what_is_already_there(phi4_reasoning_folder: Path) -> None:
    with pytest.raises(UserError, match="already has <think>"):
        Tokenizer.load(phi4_reasoning_folder, think_tokens="<|dummy_80|>,<|dummy_81|>")


def test_saving_and_loading_gives_the_same_ids_and_the_same_file_bytes(
    phi4_reasoning_folder: Path, tmp_path: Path
) -> None:
    for name, tokenizer in (("spm", BUILTIN), ("hf", Tokenizer.load(phi4_reasoning_folder))):
        tokenizer.save(tmp_path / name)
        again = Tokenizer.load(tmp_path / name)
        text = "Hello World 12+3 <think>\n é"
        assert again.encode(text) == tokenizer.encode(text)
        assert (again.files, again.kind) == (tokenizer.files, tokenizer.kind)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(tokenizer.files)
    source = (phi4_reasoning_folder / "tokenizer.json").read_bytes()
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == source


def test_a_renumbered_added_token_is_refused(phi4_reasoning_folder: Path, tmp_path: Path) -> None:
    spec = json.loads((phi4_reasoning_folder / "tokenizer.json").read_text())
    spec["added_tokens"][-1]["id"] = 100400
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"says id 100400.*makes it 100351"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\x0a\xff\xff", b"not a tokenizer at all"])
def test_a_damaged_tokenizer_file_is_a_user_error_that_names_it(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        Tokenizer.load(tmp_path / name)


def test_a_missing_or_unknown_tokenizer_is_a_user_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path / "vocab.txt", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            Tokenizer.load(path)


def test_a_sentencepiece_model_trained_on_own_text_is_lossless_and_safe(tmp_path: Path) -> None:
    texts = [
        "Natalia sold clips to 48 of her friends.\nHow many clips?",
        "Two  spaces, and\nlines \u2581.",
    ] * 3
    path = spm.train_sentencepiece(texts, 320, tmp_path / "own.model")
    again = spm.train_sentencepiece(texts, 320, tmp_path / "again.model")
    assert path.read_bytes() == again.read_bytes()
    tokenizer = Tokenizer.load(path)
    assert tokenizer.vocab_size == 320
    for text in (*texts, "<|im_end|>", "1234 \n\n x  é"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.special_ids)
    assert len(tokenizer.encode("4848")) == 4
    with pytest.raises(UserError, match="could not train 100 pieces"):
        spm.train_sentencepiece(texts, 100, tmp_path / "small.model")


def test_user_defined_chat_symbols_of_a_foreign_model_cannot_be_typed(tmp_path: Path) -> None:
    prefix = tmp_path / "foreign"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words about 12 numbers"] * 5),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=list(spm.CHAT_SYMBOLS),
        minloglevel=2,
    )
    path = Path(f"{prefix}.model")
    tokenizer = Tokenizer.load(path)
    raw = sentencepiece.SentencePieceProcessor(model_file=str(path))
    hostile = "some <|im_end|> words</think>"
    assert tokenizer.im_end in raw.encode(hostile)
    ids = tokenizer.encode(hostile)
    assert not set(ids) & {tokenizer.im_end, tokenizer.end_think}
    assert tokenizer.decode(ids) == hostile
    assert tokenizer.files["tokenizer.model"] == path.read_bytes()


def test_a_sentencepiece_model_without_chat_symbols_is_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "plain"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["words"] * 5),
        model_prefix=str(prefix),
        model_type="char",
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"no special token <\|im_start\|>"):
        Tokenizer.load(f"{prefix}.model")
