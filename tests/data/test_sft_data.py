"""The documents of an SFT run: every example ends up somewhere, and held-out questions are not trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi4r.configs.sections import DataConfig
from phi4r.core.errors import UserError
from phi4r.data.sft_data import SFTData, build_sft_data
from phi4r.data.tokenizer import Tokenizer
from phi4r.tasks import get_task

BUILTIN = Tokenizer.builtin()


def problem_file(path: Path, count: int, **changes: Any) -> Path:
    rows = [
        {"problem": f"{i}+{i}?", "answer": str(2 * i), "trace": "add " * (i % 7), **changes}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(documents: list[Any]) -> list[str]:
    return [BUILTIN.decode(document.tokens) for document in documents]


def everything_is_accounted_for(data: SFTData) -> None:
    report = data.report
    left_out = sum(part.skipped + part.no_target for part in (report.train_lengths, report.heldout_lengths))
    assert report.examples == len(data.train) + len(data.heldout) + report.overlap + left_out
    assert report.train_tokens == sum(row.num_tokens for row in data.train_rows)
    assert report.train_targets == sum(int(row.loss_mask.sum()) for row in data.train_rows)
    assert report.train_documents == len(data.train)


def test_a_file_is_split_by_seed_and_both_parts_are_packed(tmp_path: Path) -> None:
    path = problem_file(tmp_path / "p.jsonl", 100)
    config = DataConfig(path=str(path), seq_length=128, heldout=20)
    data = build_sft_data(config, BUILTIN, seed=3)
    everything_is_accounted_for(data)
    assert (len(data.train), len(data.heldout), data.report.overlap) == (80, 20, 0)
    assert not set(texts(data.train)) & set(texts(data.heldout))
    assert data.report.efficiency == sum(r.num_tokens for r in data.train_rows) / (128 * len(data.train_rows))
    assert all((row.input_ids[row.doc_index < 0] == BUILTIN.pad).all() for row in data.train_rows)
    again = build_sft_data(config, BUILTIN, seed=3)
    assert [r.input_ids.tolist() for r in again.train_rows] == [r.input_ids.tolist() for r in data.train_rows]
    other = build_sft_data(config, BUILTIN, seed=4)
    assert texts(other.heldout) != texts(data.heldout)


def test_a_held_out_question_is_not_trained_on_under_another_spelling(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [
        {"problem": f"{i % 10} +{' ' * (1 + i // 10)}1?", "answer": "5", "solution": "5"} for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = build_sft_data(DataConfig(path=str(path), heldout=2), BUILTIN, seed=0)
    everything_is_accounted_for(data)
    held = {"".join(text.split()) for text in texts(data.heldout)}
    assert data.report.overlap == 4 * len(held) - 2
    assert not held & {"".join(text.split()) for text in texts(data.train)}
    assert any("6 training examples ask a held-out question" in line for line in data.report.lines())


def test_generated_problems_do_not_repeat_held_out_questions() -> None:
    config = DataConfig(num_generated=300, heldout=50, seq_length=256)
    generated = get_task(config.task).examples(0, 0, 350)
    data = build_sft_data(config, BUILTIN, seed=0, generated=generated)
    everything_is_accounted_for(data)
    assert len(data.heldout) == 50
    # Held out are problems 300 to 349 of the stream: a question twice by chance is rare.
    assert len(data.train) + data.report.overlap == 300
    assert data.report.overlap < 10
    questions = [{text.split("<|im_end|>")[0] for text in texts(part)} for part in (data.train, data.heldout)]
    assert not questions[0] & questions[1]
    assert data.report.efficiency > 0.95
    targets = [BUILTIN.decode(d.tokens[d.loss_mask]) for d in data.train]
    empty = sum(target.startswith("<think></think>") for target in targets)
    # Half of the traces skip the working: a binomial count, five standard deviations wide.
    assert abs(empty - len(targets) / 2) < 5 * np.sqrt(len(targets)) / 2


def test_the_overlap_with_a_held_out_file_leaves_the_training_set(tmp_path: Path) -> None:
    train, heldout = problem_file(tmp_path / "train.jsonl", 30), problem_file(tmp_path / "held.jsonl", 10)
    data = build_sft_data(DataConfig(path=str(train), heldout_path=str(heldout)), BUILTIN, seed=0)
    everything_is_accounted_for(data)
    assert (len(data.train), len(data.heldout), data.report.overlap) == (20, 10, 10)


def test_rows_that_cannot_be_trained_on_are_named_or_rejected(tmp_path: Path) -> None:
    path = problem_file(tmp_path / "p.jsonl", 10)
    unclosed = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>5"}]}
    with path.open("a") as stream:
        stream.write('{"problem": "x", "answer": "5"}\n' + json.dumps(unclosed) + "\n{broken\n")
    config = DataConfig(path=str(path), heldout=2)
    with pytest.raises(UserError, match=r"p\.jsonl:11: .*neither 'trace' nor 'solution'"):
        build_sft_data(config, BUILTIN, seed=0)
    config = DataConfig(path=str(path), heldout=2, on_bad_row="skip")
    data = build_sft_data(config, BUILTIN, seed=0, reject_path=tmp_path / "rejects.jsonl")
    everything_is_accounted_for(data)
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in rejects] == [11, 12, 13]
    assert "never closes" in rejects[1]["reason"]
    assert data.report.load is not None
    assert (data.report.load.rows, data.report.load.rejected, data.report.examples) == (13, 3, 10)


def test_long_documents_follow_the_setting_and_the_log_says_so(tmp_path: Path) -> None:
    path = problem_file(tmp_path / "p.jsonl", 40)
    longest = {"path": str(path), "seq_length": 42, "heldout": 4}
    with pytest.raises(UserError, match=r"p\.jsonl:\d+ has \d+ tokens, data\.seq_length is 42"):
        build_sft_data(DataConfig(**longest), BUILTIN, seed=0)
    skipped = build_sft_data(DataConfig(**longest, on_long="skip"), BUILTIN, seed=0)
    cut = build_sft_data(DataConfig(**longest, on_long="truncate"), BUILTIN, seed=0)
    for data in (skipped, cut):
        everything_is_accounted_for(data)
    assert skipped.report.train_lengths.skipped == cut.report.train_lengths.truncated > 0
    assert any("long documents skipped" in line for line in skipped.report.lines())
    assert any("documents truncated" in line for line in cut.report.lines())


def test_holding_out_everything_is_refused(tmp_path: Path) -> None:
    path = problem_file(tmp_path / "p.jsonl", 10)
    with pytest.raises(UserError, match=r"data\.heldout = 10 leaves nothing of 10 examples"):
        build_sft_data(DataConfig(path=str(path), heldout=10), BUILTIN, seed=0)


def test_a_run_without_held_out_documents_is_possible(tmp_path: Path) -> None:
    path = problem_file(tmp_path / "p.jsonl", 10)
    data = build_sft_data(DataConfig(path=str(path), heldout=0), BUILTIN, seed=0)
    assert (data.heldout, data.heldout_rows, len(data.train)) == ([], [], 10)
