"""Text to ids and back: one class over Hugging Face `tokenizer.json` files (the Phi-4 family) and
SentencePiece models.

`encode` is for ordinary text: the characters "<|im_end|>" or "</think>" in a user's message are characters,
never the special id of that name. Special ids come from attributes (`tokenizer.im_end`), and only the
renderer puts them in place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from phi4r.core.errors import UserError
from phi4r.data import spm
from phi4r.families.family import END_THINK, THINK, ChatFormat
from phi4r.families.registry import chat_formats

HF_FILE = "tokenizer.json"
SPM_FILE = "tokenizer.model"
# Files that stand beside a tokenizer.json and travel with it.
_HF_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class _Backend(Protocol):
    """What the class needs of a tokenizer library. `specials` maps the text of each special token to its
    id."""

    vocab_size: int
    specials: dict[str, int]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class _HuggingFace:
    def __init__(self, data: bytes, source: str) -> None:
        import tokenizers

        try:
            spec = json.loads(data)
            added = spec["added_tokens"]
            # All added tokens become "special": the library can then be told to read their text as text.
            spec["added_tokens"] = [{**token, "special": True} for token in added]
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
            self.specials: dict[str, int] = {token["content"]: token["id"] for token in added}
        except Exception as error:  # noqa: BLE001 (the library raises nothing more precise)
            raise UserError(f"{source}: not a Hugging Face tokenizer.json: {error}") from None
        for text, token_id in self.specials.items():
            found = self._tokenizer.token_to_id(text)
            if found != token_id:
                raise UserError(
                    f"{source}: added token {text!r} says id {token_id}, but the vocabulary makes it {found}"
                )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


class _SentencePiece:
    def __init__(self, data: bytes, source: str) -> None:
        import sentencepiece

        names = {
            *spm.CHAT_SYMBOLS,
            *(name for chat in chat_formats() for name in (*chat.special_tokens, *chat.pad)),
        }
        try:
            if not data:
                raise ValueError("the file is empty")
            model = spm.as_control_symbols(data, names)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[-1] if str(error) else "unreadable"
            raise UserError(f"{source}: not a SentencePiece model: {reason}") from None
        self.vocab_size = self._processor.vocab_size()
        self.specials = {
            self._processor.id_to_piece(index): index
            for index in range(self.vocab_size)
            if self._processor.is_control(index)
        }
        # SentencePiece writes spaces as U+2581 inside, so that character itself must travel as bytes or
        # become a space.
        self._mark: list[int] = []
        if self._processor.is_byte(self._processor.piece_to_id("<0xE2>")):
            self._mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]

    def encode(self, text: str) -> list[int]:
        if "\u2581" not in text or not self._mark:
            return list(self._processor.encode(text))
        first, *rest = text.split("\u2581")
        ids = self.encode(first)
        for part in rest:
            ids += self._mark + self.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode(list(ids)))


class Tokenizer:
    """Ids and text of one vocabulary, with the special ids of its chat format.

    Attributes: `vocab_size` (largest id + 1); `chat`: its chat format, told by its special tokens;
    `im_end`: the id that ends a turn (Phi-4's `<|im_end|>`); `think`, `end_think`, `endoftext`, `pad` (ids);
    `eos_ids`: what ends a response, `im_end` and then `endoftext`; `special_ids`: id -> its text; `specials`:
    the same the other way round; `note`: what was changed in the tokenizer that was loaded ("": nothing).
    """

    def __init__(self, backend: _Backend, files: dict[str, bytes], source: str, note: str = "") -> None:
        self._backend, self._files, self.source, self.note = backend, files, source, note
        self.vocab_size = backend.vocab_size
        self.specials = backend.specials
        self.special_ids: dict[int, str] = {index: text for text, index in backend.specials.items()}
        self.chat = self._check_specials()
        self.im_end, self.endoftext = self.specials[self.chat.end], self.specials[self.chat.end_of_text]
        self.think, self.end_think = self.specials[THINK], self.specials[END_THINK]
        self.pad = next(
            (self.specials[name] for name in self.chat.pad if name in self.specials), self.endoftext
        )
        self.eos_ids: tuple[int, ...] = (self.im_end, self.endoftext)
        by_length = sorted(backend.specials, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, by_length)) + ")")

    def _check_specials(self) -> ChatFormat:
        chat = _chat_format(self.specials)
        if chat is None:
            known = {*self.specials}
            needed = min(
                (chat.special_tokens for chat in chat_formats()),
                key=lambda names: len({*names} - known) / len(names),
            )
            missing = [name for name in needed if name not in known]
            raise UserError(
                f"{self.source}: has no special token {', '.join(missing)}; its chat format needs "
                f"{', '.join(needed)}, {THINK} and {END_THINK} as single tokens"
            )
        missing = [name for name in (THINK, END_THINK) if name not in self.specials]
        if missing:
            raise UserError(
                f"{self.source}: has no single token for {' and '.join(missing)}; take a tokenizer "
                f"that has them, such as Phi-4-reasoning's, or name two unused tokens to become them, with a "
                f"comma between, in tokenizer.think_tokens"
            )
        for text in self._backend.specials:
            made = [
                self.special_ids[index] for index in self._backend.encode(text) if index in self.special_ids
            ]
            if made:
                raise UserError(
                    f"{self.source}: ordinary text {text!r} becomes the special token {made[0]!r}"
                )
        return chat

    def header(self, role: str) -> list[int]:
        """Ids that open a turn of `role`."""
        return self.encode_trusted(self.chat.header.format(role=role))

    # --- text and ids

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text. Never a special id, whatever the text says. Text must be valid Unicode (no
        surrogates)."""
        return self._backend.encode(text) if text else []

    def encode_trusted(self, text: str) -> list[int]:
        """Ids of text *we* wrote, in which special tokens are written out: "<|im_end|>" becomes its id.

        For templates and test vectors. On text from a user or a file this is an injection hole: use the
        renderer.
        """
        parts = self._special_pattern.split(text)
        ids: list[int] = []
        for index, part in enumerate(parts):
            ids += [self._backend.specials[part]] if index % 2 else self.encode(part)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids, special tokens written out by name. `skip_special` leaves out the chat template's
        tokens and padding; `<think>` and `</think>` stay, because they are part of what the assistant
        said."""
        kept = {self.think, self.end_think}
        text = []
        for is_special, run in groupby(map(int, ids), key=self.special_ids.__contains__):
            if is_special:
                text += [self.special_ids[index] for index in run if not skip_special or index in kept]
            else:
                text.append(self._backend.decode(list(run)))
        return "".join(text)

    # --- files

    @property
    def kind(self) -> str:
        """ "huggingface" or "sentencepiece"."""
        return "huggingface" if HF_FILE in self._files else "sentencepiece"

    @property
    def files(self) -> dict[str, bytes]:
        """The tokenizer's files by name: what `save` writes."""
        return dict(self._files)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's own files into `folder`, so that a checkpoint can be used without the
        original."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self._files.items():
            temporary = folder / f".{name}.tmp"
            temporary.write_bytes(data)
            temporary.replace(folder / name)

    @classmethod
    def builtin(cls) -> Tokenizer:
        """The small SentencePiece model for generated tasks: 320 pieces, characters of arithmetic, and all
        bytes."""
        data = spm.builtin_model()
        return cls(_SentencePiece(data, "built-in tokenizer"), {SPM_FILE: data}, "built-in tokenizer")

    @classmethod
    def load(cls, path: str | Path = "", think_tokens: str = "") -> Tokenizer:
        """A tokenizer from a folder (tokenizer.json, else a .model file), a .json or a .model file; "" is
        `builtin()`.

        A tokenizer.json without think tokens gets them where its chat format says how; `note` then says
        which. `think_tokens`: "A,B", two other tokens of it that take the place of `<think>` and `</think>`.
        The copy that `save` writes has them renamed, so it is read back without this setting.
        """
        if path == "":
            return cls.builtin()
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path}: no such tokenizer file or folder (tokenizer.path)")
        if path.is_dir():
            path = _file_in(path)
        if path.suffix not in (".json", ".model"):
            raise UserError(
                f"{path}: unknown kind of tokenizer (expected a folder, a tokenizer.json or a .model file)"
            )
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot read the tokenizer: {error.strerror}") from None
        if path.suffix == ".model":
            if think_tokens:
                raise UserError(
                    f"{path}: tokenizer.think_tokens is for tokenizer.json files; train this model with them"
                )
            return cls(_SentencePiece(data, str(path)), {SPM_FILE: data}, str(path))
        companions = [path.parent / name for name in _HF_COMPANIONS]
        files = {HF_FILE: data} | {file.name: file.read_bytes() for file in companions if file.is_file()}
        note = ""
        if think_tokens:
            files = _rename_think_tokens(files, think_tokens, str(path))
        elif f'"{THINK}"'.encode() not in data:
            files, note = _own_think_tokens(files, str(path))
        return cls(_HuggingFace(files[HF_FILE], str(path)), files, str(path), note)


def _file_in(folder: Path) -> Path:
    if (folder / HF_FILE).is_file():
        return folder / HF_FILE
    models = sorted(folder.glob("*.model"))
    if (folder / SPM_FILE).is_file():
        return folder / SPM_FILE
    if len(models) != 1:
        found = ", ".join(model.name for model in models) or "neither"
        raise UserError(
            f"{folder}: expected {HF_FILE} or one SentencePiece .model file in this folder, found {found}"
        )
    return models[0]


def _rename(value: Any, names: dict[str, str]) -> Any:
    """`value` with every "content" (and every whole string in a list) that is a key of `names` renamed."""
    if isinstance(value, dict):
        result = {}
        for key, item in value.items():
            is_name = key == "content" and isinstance(item, str)
            result[key] = names.get(item, item) if is_name else _rename(item, names)
        return result
    if isinstance(value, list):
        return [names.get(item, item) if isinstance(item, str) else _rename(item, names) for item in value]
    return value


def _chat_format(specials: Collection[str]) -> ChatFormat | None:
    """The chat format whose special tokens are all there; of several the one that needs most."""
    fitting = [chat for chat in chat_formats() if {*chat.special_tokens} <= {*specials}]
    return max(fitting, key=lambda chat: len(chat.special_tokens), default=None)


def _added_tokens(files: dict[str, bytes], source: str) -> tuple[dict[str, Any], dict[str, int]]:
    """(parsed tokenizer.json, text -> id of its added tokens)."""
    try:
        spec = json.loads(files[HF_FILE])
        return spec, {token["content"]: token["id"] for token in spec["added_tokens"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source}: not a Hugging Face tokenizer.json: {error}") from None


def _own_think_tokens(files: dict[str, bytes], source: str) -> tuple[dict[str, bytes], str]:
    """The files with the think tokens that their chat format gives them, and what is to be said of it."""
    spec, added = _added_tokens(files, source)
    chat = _chat_format(added)
    if chat is None:
        return files, ""
    if chat.think_placeholders is None:
        first = max([*spec.get("model", {}).get("vocab", {}).values(), *added.values()]) + 1
        note = f"{source}: {THINK} and {END_THINK} are new tokens, ids {first} and {first + 1}"
        return _append_think_tokens(files, spec, first), note
    if not {*chat.think_placeholders} <= {*added}:
        return files, ""
    old = " and ".join(chat.think_placeholders)
    return (
        _rename_think_tokens(files, ",".join(chat.think_placeholders), source),
        f"{source}: its unused tokens {old} become {THINK} and {END_THINK}",
    )


def _append_think_tokens(files: dict[str, bytes], spec: dict[str, Any], first: int) -> dict[str, bytes]:
    changed = dict(files)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = {THINK: first, END_THINK: first + 1}
    spec["added_tokens"] += [{"id": index, "content": name, **flags} for name, index in names.items()]
    changed[HF_FILE] = json.dumps(spec, ensure_ascii=False).encode()
    for file, key in (("tokenizer_config.json", "added_tokens_decoder"), ("added_tokens.json", "")):
        if file not in files:
            continue
        table = json.loads(files[file])
        if key:
            entries = {str(index): {"content": name, **flags} for name, index in names.items()}
            table[key] = {**table.get(key, {}), **entries}
        else:
            table |= names
        changed[file] = json.dumps(table, indent=2, ensure_ascii=False).encode()
    return changed


def _rename_think_tokens(files: dict[str, bytes], think_tokens: str, source: str) -> dict[str, bytes]:
    spec, contents = _added_tokens(files, source)
    chat = _chat_format(contents)
    needed = {*chat.special_tokens, *chat.pad} if chat else set()
    olds = [name.strip() for name in think_tokens.split(",")]
    if len(olds) != 2 or olds[0] == olds[1]:
        raise UserError(
            f"tokenizer.think_tokens: expected two token names and a comma, found {think_tokens!r}"
        )
    names = dict(zip(olds, (THINK, END_THINK), strict=True))
    for old, new in names.items():
        if new in contents:
            raise UserError(
                f"{source}: already has {new}, so tokenizer.think_tokens must not name another token for it"
            )
        if old not in contents:
            raise UserError(
                f"{source}: tokenizer.think_tokens names {old!r}, which is not an added token of this file"
            )
        if old in needed:
            raise UserError(
                f"{source}: tokenizer.think_tokens names {old!r}, which the chat template itself needs"
            )
    spec["added_tokens"] = _rename(spec["added_tokens"], names)
    renamed = dict(files)
    renamed[HF_FILE] = json.dumps(spec, ensure_ascii=False).encode()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in files:
            renamed[name] = json.dumps(
                _rename(json.loads(files[name]), names), indent=2, ensure_ascii=False
            ).encode()
    if "added_tokens.json" in files:
        table = {
            names.get(text, text): index for text, index in json.loads(files["added_tokens.json"]).items()
        }
        renamed["added_tokens.json"] = json.dumps(table, indent=2, ensure_ascii=False).encode()
    return renamed
