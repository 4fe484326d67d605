"""SentencePiece models: training the small ones, and the two facts of the file format that the tokenizer
needs.

Every model made here maps text to ids and back without loss: no normalisation, no dummy prefix, no folding of
spaces, and bytes for characters that are not in the vocabulary (so each ASCII character is one token, known
or not). Digits are split, and the chat symbols are *control* symbols, which SentencePiece never produces from
text.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from phi4r.core.errors import UserError

CHAT_SYMBOLS = ("<|endoftext|>", "<pad>", "<|im_start|>", "<|im_sep|>", "<|im_end|>", "<think>", "</think>")

# The chat roles are whole pieces of the built-in model: spelt out they would be a third of a short document.
ROLES = ("system", "user", "assistant")

# With 256 bytes, 7 chat symbols, 3 roles, "\n" and <unk> this makes 320 pieces, a multiple of 64: no padding.
BUILTIN_ALPHABET = "0123456789 abcdefghijklmnopqrstuvwxyz+-*/=%;:,.(){}?"

_TYPE_CONTROL, _TYPE_USER_DEFINED = 3, 4


def _train(
    texts: Iterable[str], vocab_size: int, model_type: str, hard_limit: bool, words: tuple[str, ...] = ()
) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=hard_limit,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            control_symbols=list(CHAT_SYMBOLS),
            user_defined_symbols=["\n", *words],
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            unk_surface="\N{REPLACEMENT CHARACTER}",
            max_sentence_length=1 << 24,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[-1] if str(error) else "no reason given"
        raise UserError(f"SentencePiece could not train {vocab_size} pieces on this text: {reason}") from None
    return model.getvalue()


@lru_cache(maxsize=1)
def builtin_model() -> bytes:
    """The built-in character model: 320 pieces, trained in milliseconds, the same bytes every time.

    The i-th character of the alphabet is repeated so often that its rank, and with it its id, is never a tie.
    """
    lines = [char * (len(BUILTIN_ALPHABET) - rank) for rank, char in enumerate(BUILTIN_ALPHABET)]
    return _train(lines, vocab_size=4096, model_type="char", hard_limit=False, words=ROLES)


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, path: str | Path, model_type: str = "bpe"
) -> Path:
    """Trains a SentencePiece model on a user's texts and writes it to `path` (a .model file); returns the
    path.

    `vocab_size` counts 256 bytes, the chat symbols and every character seen; too small or too large a number
    for the text is a `UserError`. `model_type`: bpe, unigram or char. One thread, so the same texts give the
    same file.
    """
    path = Path(path)
    if model_type not in ("bpe", "unigram", "char"):
        raise UserError(f"model_type {model_type!r} is unknown (expected bpe, unigram or char)")
    # A line of a text is a training sentence: "\n" is a symbol of its own and no piece ever spans it.
    lines = (line for text in texts for line in text.split("\n") if line)
    model = _train(lines, vocab_size, model_type, hard_limit=model_type != "char")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(model)
    temporary.replace(path)
    return path


# --- the file format (protocol buffers): ModelProto.pieces is field 1; a piece has 1: text, 2: score, 3: type


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yields (field number, start of the field's key, start of its value, end) for each field of a
    message."""
    position = 0
    while position < len(data):
        start = position
        key, position = _varint(data, position)
        value = position
        kind = key & 7
        if kind == 0:
            _, position = _varint(data, position)
        elif kind == 2:
            length, value = _varint(data, position)
            position = value + length
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            raise ValueError(f"field of unknown kind {kind}")
        if position > len(data):
            raise ValueError("truncated")
        yield key >> 3, start, value, position


def as_control_symbols(model: bytes, symbols: Iterable[str]) -> bytes:
    """A copy of a SentencePiece model in which the user-defined pieces named `symbols` are control pieces.

    SentencePiece turns the text of a user-defined piece into its id, which would let a user's message close
    its own turn; a control piece is never made from text. Both types take one byte, so nothing else in the
    file moves.
    """
    wanted = {symbol.encode() for symbol in symbols}
    changed = bytearray(model)
    for number, _, start, end in _fields(model):
        if number != 1:
            continue
        piece = model[start:end]
        text, type_at = b"", -1
        for inner, _, inner_start, inner_end in _fields(piece):
            if inner == 1:
                text = piece[inner_start:inner_end]
            elif inner == 3:
                type_at = inner_start
        if text in wanted and type_at >= 0 and piece[type_at] == _TYPE_USER_DEFINED:
            changed[start + type_at] = _TYPE_CONTROL
    return bytes(changed)
