"""Reading shards: rows by index, lazily, and damage that is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from phi4r.core.errors import UserError
from phi4r.data import build
from phi4r.data.packing import Document, PackedRow, pack
from phi4r.data.sft_data import open_shards
from phi4r.data.shards import (
    FORMAT,
    ShardRow,
    ShardRows,
    is_shard_folder,
    mark_targets,
    shard_paths,
    write_array,
)
from phi4r.data.tokenizer import Tokenizer
from tests.data import corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = corpus.write_jsonl(tmp_path / "in.jsonl", corpus.rows(80))
    build.main(corpus.config(path), tmp_path / "out", build.Options(shard_tokens=128 * 7))
    return tmp_path / "out"


def test_rows_can_be_asked_for_in_any_order_and_end_where_they_end(folder: Path) -> None:
    rows = ShardRows(folder)
    forward = [row.input_ids for row in rows]
    assert len(forward) == len(rows) > 14
    for index in (len(rows) - 1, 7, 6, 0, -1):
        assert np.array_equal(rows[index].input_ids, forward[index])
    assert [row.num_tokens for row in rows[3:9]] == [rows[i].num_tokens for i in range(3, 9)]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_a_row_makes_its_arrays_only_when_they_are_asked_for(folder: Path) -> None:
    row = ShardRows(folder)[2]
    assert isinstance(row, ShardRow)
    assert row.num_tokens > 0
    assert row.max_seqlen <= 128
    assert "input_ids" not in vars(row)
    row.load()
    assert {"input_ids", "labels", "loss_mask", "position_ids"} <= set(vars(row))


def test_a_row_that_is_sent_to_another_process_arrives_as_a_plain_one(folder: Path) -> None:
    row = ShardRows(folder)[1]
    sent = pickle.loads(pickle.dumps(row))
    assert type(sent) is PackedRow
    assert np.array_equal(sent.labels, row.labels)
    assert sent.num_tokens == row.num_tokens
    assert len(pickle.loads(pickle.dumps(ShardRows(folder)))) == len(ShardRows(folder))


def test_a_folder_is_refused_for_other_settings_than_it_was_built_with(folder: Path) -> None:
    tokenizer = Tokenizer.builtin()
    assert is_shard_folder(folder)
    open_shards(corpus.config(folder).data, tokenizer)
    with pytest.raises(UserError, match=r"data.seq_length: is 256, but .* was built with 128"):
        open_shards(corpus.config(folder, "data.seq_length=256").data, tokenizer)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "tokenizer": "another"}))
    with pytest.raises(UserError, match=r"tokenizer.path: is another tokenizer"):
        open_shards(corpus.config(folder).data, tokenizer)


def test_a_damaged_or_unfinished_folder_is_named(folder: Path) -> None:
    shard = folder / "train" / "tokens_00001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="shard 1 of train is damaged"):
        ShardRows(folder)[8].input_ids  # noqa: B018
    shard.write_bytes((folder / "train" / "tokens_00000.npy").read_bytes())
    np.save(shard, np.load(shard)[:-1])
    with pytest.raises(
        UserError, match=r"tokens_00001\.npy: expected 7 rows of 128 tokens, found shape \(6, 1"
    ):
        ShardRows(folder)[8].input_ids  # noqa: B018
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match="has not finished here"):
        ShardRows(folder)


def test_a_target_that_begins_a_document_is_predicted_by_nobody(tmp_path: Path) -> None:
    """Chat documents begin with a prompt; of others every token may be a target."""
    documents = [
        Document(np.arange(first, first + length, dtype=np.int32), np.ones(length, dtype=bool))
        for first, length in ((100, 5), (200, 7), (300, 9), (400, 3))
    ]
    (row,) = pack(documents, 32, 0)
    is_token = np.arange(32) < row.num_tokens
    paths = shard_paths(tmp_path / "train", 0)
    (tmp_path / "train").mkdir()
    write_array(paths["tokens"], mark_targets(row.input_ids.astype(np.int32), is_token)[None])
    write_array(paths["bounds"], row.cu_seqlens)
    write_array(paths["rows"], np.array([[0, len(row.cu_seqlens), row.num_tokens]]))
    index = {"format": FORMAT, "seq_length": 32, "pad_id": 0, "shards": {"train": [1], "heldout": []}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    found = ShardRows(tmp_path)[0]
    assert row.loss_mask.sum() == 24 - 4
    for name in ("input_ids", "labels", "loss_mask", "position_ids"):
        assert np.array_equal(getattr(found, name), getattr(row, name)), name
