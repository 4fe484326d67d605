"""The documents of an SFT run: rows of a file or generated problems, rendered, split, fitted and packed, all
counted.

Held-out documents measure the evaluation loss, so they must not be trained on: a training example that asks
the same question as a held-out one is left out and counted as overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi4r.configs.sections import DataConfig, require
from phi4r.core.errors import UserError
from phi4r.core.problem import Conversation, Problem, Record
from phi4r.core.seeds import Stream
from phi4r.data.packing import Document, LengthReport, PackedRow, efficiency, fit_documents, pack
from phi4r.data.records import LoadReport, load_records
from phi4r.data.render import problem_reply, render_example, split_think
from phi4r.data.shards import ShardRows, fingerprint, read_index, read_settings
from phi4r.data.tokenizer import Tokenizer


@dataclass
class SFTDataReport:
    """Where every example went: examples = train + held out + overlap + left out by the length rule.

    Documents and tokens count what remains after the length rule; targets are tokens in the loss;
    `efficiency` is the share of row positions that hold a token.
    """

    source: str
    load: LoadReport | None
    heldout_load: LoadReport | None
    examples: int
    overlap: int
    train_lengths: LengthReport
    heldout_lengths: LengthReport
    train_documents: int
    train_tokens: int
    train_targets: int
    train_rows: int
    efficiency: float
    heldout_documents: int

    def lines(self) -> list[str]:
        """For the console and the log: what was read, what was left out, how full the rows are."""
        lines = [f"data: {self.source}: {self.examples:,} examples"]
        lines += [f"data: {load.summary()}" for load in (self.load, self.heldout_load) if load is not None]
        for name, lengths in (("train", self.train_lengths), ("held out", self.heldout_lengths)):
            if lengths.truncated:
                tokens = lengths.truncated_tokens
                lines.append(
                    f"data: {name}: {lengths.truncated:,} documents truncated ({tokens:,} tokens cut)"
                )
            if lengths.skipped:
                tokens = lengths.skipped_tokens
                lines.append(f"data: {name}: {lengths.skipped:,} long documents skipped ({tokens:,} tokens)")
            if lengths.no_target:
                lines.append(f"data: {name}: {lengths.no_target:,} documents without a target left out")
        if self.overlap:
            lines.append(f"data: {self.overlap:,} training examples ask a held-out question: left out")
        lines.append(
            f"data: {self.train_documents:,} documents, {self.train_tokens:,} tokens ({self.train_targets:,} "
            f"targets) in {self.train_rows:,} rows, {self.efficiency:.1%} full; "
            f"{self.heldout_documents:,} held out"
        )
        return lines


@dataclass(frozen=True, eq=False)
class SFTData:
    """Documents and packed rows to train on and to hold out, and the report. Rows come longest first: shuffle
    them."""

    train: list[Document]
    heldout: list[Document]
    train_rows: list[PackedRow]
    heldout_rows: list[PackedRow]
    report: SFTDataReport


def trainable(record: Record) -> None:
    """Raises `UserError` for a record that is well formed but has nothing to imitate."""
    if isinstance(record, Problem):
        problem_reply(record)
        return
    for message in record.messages:
        if message.role == "assistant":
            split_think(message.content)


def question(record: Record) -> str:
    """What a record asks: two records with the same question may not stand on both sides of the split."""
    if isinstance(record, Conversation):
        asked = [message.content for message in record.messages if message.role != "assistant"]
        return "\n".join(" ".join(text.split()) for text in asked)
    return " ".join(record.problem.split())


def draw_heldout(num_records: int, heldout: int, seed: int) -> list[int]:
    """Indices of the `heldout` records kept out of training, drawn at random (by seed only)."""
    if heldout >= num_records:
        raise UserError(f"data.heldout = {heldout} leaves nothing of {num_records} examples to train on")
    random = np.random.default_rng([seed, Stream.HELDOUT])
    drawn: list[int] = random.choice(num_records, size=heldout, replace=False).tolist()
    return drawn


def _split(records: Sequence[Record], heldout: int, seed: int) -> tuple[list[Record], list[Record]]:
    """`draw_heldout` of records; both parts keep the order of the file."""
    chosen = set(draw_heldout(len(records), heldout, seed))
    train = [record for index, record in enumerate(records) if index not in chosen]
    return train, [record for index, record in enumerate(records) if index in chosen]


def render_documents(
    records: Sequence[Record], tokenizer: Tokenizer, data: DataConfig
) -> tuple[list[Document], LengthReport]:
    """Renders records and applies the length rule of `data` (`seq_length`, `on_long`)."""
    documents = [Document(*render_example(tokenizer, record, data.system_message)) for record in records]
    names = [record.id for record in records]
    kept, _, report = fit_documents(documents, data.seq_length, data.on_long, names)
    return kept, report


def build_sft_data(
    data: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    reject_path: str | Path | None = None,
    generated: Sequence[Record] = (),
) -> SFTData:
    """Everything from the `[data]` section to packed rows; the same arguments and files give the same rows.

    From `data.path`, or else from `generated`: problems of `data.task` with their traces, first the
    `data.num_generated` to train on, then `data.heldout` more. Held out: the rows of `data.heldout_path`, or
    `data.heldout` rows drawn by `seed` (generated: those after the training ones).
    `reject_path` takes bad rows where `data.on_bad_row` is "skip". `UserError` on bad rows, on documents that
    do not fit, and on empty parts.
    """
    load: LoadReport | None = None
    heldout_load: LoadReport | None = None
    options: dict[str, Any] = {"on_bad_row": data.on_bad_row, "check": trainable}
    train: list[Record]
    heldout: list[Record] = []
    if data.path:
        train, load = load_records(data.path, reject_path=reject_path, **options)
    else:
        train = list(generated[: data.num_generated])
    if data.heldout_path:
        rejects = None
        if reject_path is not None:
            rejects = Path(reject_path).with_name(f"heldout_{Path(reject_path).name}")
        heldout, heldout_load = load_records(data.heldout_path, reject_path=rejects, **options)
    elif data.path:
        train, heldout = _split(train, data.heldout, seed)
    else:
        heldout = list(generated[data.num_generated :])
    examples = len(train) + len(heldout)

    held_questions = {question(record) for record in heldout}
    kept = [record for record in train if question(record) not in held_questions]
    overlap = len(train) - len(kept)
    train_documents, train_lengths = render_documents(kept, tokenizer, data)
    heldout_documents, heldout_lengths = render_documents(heldout, tokenizer, data)
    source = data.path or f"generated {data.task}"
    if not train_documents:
        raise UserError(
            f"{source}: no document is left to train on, of {examples} examples ({overlap} overlap)"
        )
    train_rows = pack(train_documents, data.seq_length, tokenizer.pad)
    report = SFTDataReport(
        source=source,
        load=load,
        heldout_load=heldout_load,
        examples=examples,
        overlap=overlap,
        train_lengths=train_lengths,
        heldout_lengths=heldout_lengths,
        train_documents=len(train_documents),
        train_tokens=sum(len(document.tokens) for document in train_documents),
        train_targets=sum(document.num_targets for document in train_documents),
        train_rows=len(train_rows),
        efficiency=efficiency(train_rows),
        heldout_documents=len(heldout_documents),
    )
    heldout_rows = pack(heldout_documents, data.seq_length, tokenizer.pad)
    return SFTData(train_documents, heldout_documents, train_rows, heldout_rows, report)


def open_shards(data: DataConfig, tokenizer: Tokenizer) -> tuple[ShardRows, Sequence[PackedRow], list[str]]:
    """(training rows, held-out rows, what to say about them) of a folder made by `phi4r data build`.

    Held-out documents are those of `data.heldout_path`, else the folder's own. ConfigError where the folder
    was made for another row length, tokenizer or system message.
    """
    index, built = read_index(data.path), read_settings(data.path)
    for name in ("seq_length", "system_message", "heldout_path"):
        require(
            built[name] == getattr(data, name),
            f"data.{name}",
            f"is {getattr(data, name)!r}, but {data.path} was built with {built[name]!r}",
        )
    require(
        index["tokenizer"] == fingerprint(tokenizer),
        "tokenizer.path",
        f"is another tokenizer than {data.path} was built with",
    )
    rows = ShardRows(data.path)
    heldout: Sequence[PackedRow] = ShardRows(data.path, "heldout")
    if data.heldout_path:
        records, _ = load_records(data.heldout_path, check=trainable)
        documents, _ = render_documents(records, tokenizer, data)
        heldout = pack(documents, data.seq_length, tokenizer.pad)
    train = index["statistics"]["train"]
    line = f"data: {data.path}: {train['documents']:,} documents, {train['tokens']:,} tokens"
    line += f" ({train['targets']:,} targets) in {train['rows']:,} rows, {train['efficiency']:.1%} full"
    return rows, heldout, [f"{line}; {len(heldout):,} rows held out"]
