"""Packed rows: every token once, labels inside their document, positions that restart, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4r.core.errors import UserError
from phi4r.data.packing import Document, efficiency, fit_documents, pack, unpack

PAD = 9


def make_documents(lengths: list[int], seed: int = 0) -> list[Document]:
    """Documents whose tokens are all different, with a random mask and an extra that says which token it
    belongs to."""
    random = np.random.default_rng(seed)
    documents, first = [], 1000
    for length in lengths:
        tokens = np.arange(first, first + length, dtype=np.int32)
        extras = {"own": tokens.astype(np.float32), "noise": random.random(length, dtype=np.float32)}
        documents.append(Document(tokens, random.random(length) < 0.5, extras))
        first += length
    return documents


cases = st.integers(1, 40).flatmap(
    lambda t: st.tuples(st.just(t), st.lists(st.integers(1, t), max_size=40), st.integers(0, 9))
)


@settings(max_examples=200, deadline=None)
@given(cases)
@pytest.mark.proves("Packing loses and doubles no token", how="random documents")
def test_every_token_appears_once_and_every_row_is_consistent(case: tuple[int, list[int], int]) -> None:
    seq_length, lengths, seed = case
    documents = make_documents(lengths, seed)
    rows = pack(documents, seq_length, PAD)
    seen: dict[int, np.ndarray] = {}
    for row in rows:
        assert {
            len(a) for a in (row.input_ids, row.labels, row.loss_mask, row.position_ids, row.doc_index)
        } == {seq_length}
        assert (row.cu_seqlens[0], row.cu_seqlens[-1]) == (0, seq_length)
        assert (np.diff(row.cu_seqlens) > 0).all()
        spans = list(zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True))
        for number, (start, stop) in enumerate(spans):
            index = int(row.doc_index[start])
            assert (row.doc_index[start:stop] == index).all()
            assert row.position_ids[start:stop].tolist() == list(range(stop - start))
            assert (row.loss_mask[stop - 1], row.labels[stop - 1]) == (0, PAD)
            if index < 0:
                assert number == len(spans) - 1
                assert (row.input_ids[start:stop] == PAD).all()
                assert row.loss_mask[start:stop].sum() == 0
                continue
            assert index not in seen
            seen[index] = row.input_ids[start:stop]
            document = documents[index]
            assert row.labels[start : stop - 1].tolist() == document.tokens[1:].tolist()
            assert row.loss_mask[start : stop - 1].tolist() == document.loss_mask[1:].tolist()
            for name, values in document.extras.items():
                assert row.extras[name][start : stop - 1].tolist() == values[1:].tolist()
                assert row.extras[name][stop - 1] == 0
    assert sorted(seen) == list(range(len(documents)))
    assert all(seen[i].tolist() == documents[i].tokens.tolist() for i in seen)
    assert sum(row.num_tokens for row in rows) == sum(lengths)
    masked = sum(int(row.loss_mask.sum()) for row in rows)
    assert masked == sum(document.num_targets for document in documents)


@settings(max_examples=100, deadline=None)
@given(cases)
@pytest.mark.proves("Labels and per-token values belong to the next token", how="random documents")
def test_labels_and_extras_of_unmasked_positions_belong_to_the_next_token(
    case: tuple[int, list[int], int],
) -> None:
    seq_length, lengths, seed = case
    for row in pack(make_documents(lengths, seed), seq_length, PAD):
        on = row.loss_mask > 0
        # Tokens of all documents are consecutive numbers, so a label that crossed a boundary would still be
        # +1: the document index must be the same at both ends as well.
        at = np.flatnonzero(on)
        assert (row.labels[at] == row.input_ids[at] + 1).all()
        assert (row.doc_index[at] == row.doc_index[at + 1]).all()
        assert (row.extras["own"][at] == row.labels[at]).all()


@settings(max_examples=100, deadline=None)
@given(cases)
def test_unpacking_brings_each_value_back_to_the_token_it_belongs_to(
    case: tuple[int, list[int], int],
) -> None:
    seq_length, lengths, seed = case
    documents = make_documents(lengths, seed)
    rows = pack(documents, seq_length, PAD)
    for name in ("own", "noise"):
        values = unpack(rows, [row.extras[name] for row in rows], documents)
        assert len(values) == len(documents)
        for value, document in zip(values, documents, strict=True):
            assert value[0] == 0
            assert value[1:].tolist() == document.extras[name][1:].tolist()


def test_unpacking_ignores_what_stands_on_padding_and_on_last_tokens() -> None:
    documents = make_documents([3, 2])
    (row,) = pack(documents, 8, PAD)
    garbage = np.where(row.extras["own"] > 0, row.extras["own"], np.nan)
    values = unpack([row], [garbage], documents)
    assert [value.tolist() for value in values] == [[0, 1001, 1002], [0, 1004]]


def test_unpacking_refuses_rows_and_values_that_do_not_match() -> None:
    documents = make_documents([3, 2])
    rows = pack(documents, 4, PAD)
    with pytest.raises(ValueError, match="2 rows but 1 arrays"):
        unpack(rows, [np.zeros(4)], documents)
    with pytest.raises(ValueError, match="shape"):
        unpack(rows, [np.zeros(4), np.zeros(5)], documents)
    with pytest.raises(ValueError, match="1 documents are in no row"):
        unpack(rows, [np.zeros(4)] * 2, make_documents([3, 2, 1]))


def test_a_full_row_has_no_padding_document_and_efficiency_counts_tokens() -> None:
    rows = pack(make_documents([5, 3, 4]), 8, PAD)
    assert [row.cu_seqlens.tolist() for row in rows] == [[0, 5, 8], [0, 4, 8]]
    assert [row.max_seqlen for row in rows] == [5, 4]
    assert efficiency(rows) == 12 / 16
    assert (pack([], 8), efficiency([])) == ([], 0.0)


def test_packing_is_deterministic_and_first_fit_decreasing() -> None:
    rows = pack(make_documents([2, 6, 3, 5, 2, 2]), 8, PAD)
    # 6+2(first of the twos), 5+3, 2+2
    assert [np.unique(row.doc_index[row.doc_index >= 0]).tolist() for row in rows] == [[0, 1], [2, 3], [4, 5]]


def test_long_documents_are_refused_truncated_or_skipped_and_counted() -> None:
    documents = make_documents([4, 10, 8])
    documents = [Document(d.tokens, np.ones(len(d.tokens), dtype=bool), d.extras) for d in documents]
    with pytest.raises(UserError, match=r"b:2 has 10 tokens, data\.seq_length is 8"):
        fit_documents(documents, 8, "error", ["a:1", "b:2", "c:3"])
    kept, indices, report = fit_documents(documents, 8, "truncate")
    assert indices == [0, 1, 2]
    assert kept[1].tokens.tolist() == documents[1].tokens[:8].tolist()
    assert kept[1].extras["own"].tolist() == documents[1].extras["own"][:8].tolist()
    assert (report.documents, report.truncated, report.truncated_tokens, report.skipped) == (3, 1, 2, 0)
    kept, indices, report = fit_documents(documents, 8, "skip")
    assert indices == [0, 2]
    assert (report.truncated, report.skipped, report.skipped_tokens) == (0, 1, 10)


def test_a_document_whose_targets_are_cut_off_is_left_out_and_counted() -> None:
    tokens = np.arange(6, dtype=np.int32)
    late = Document(tokens, tokens >= 4)
    only_first = Document(tokens, tokens == 0)
    kept, _, report = fit_documents([late, only_first], 4, "truncate")
    assert (kept, report.truncated, report.no_target) == ([], 2, 2)


def test_packing_refuses_what_does_not_fit_or_does_not_match() -> None:
    with pytest.raises(ValueError, match="not between 1 and the capacity 8"):
        pack(make_documents([9]), 8)
    tokens = np.arange(3, dtype=np.int32)
    with pytest.raises(ValueError, match=r"document 1 has extras \[\]"):
        pack([*make_documents([3]), Document(tokens, tokens > 0)], 8)
    with pytest.raises(ValueError, match="loss_mask has shape"):
        Document(tokens, np.ones(2, dtype=bool))
    with pytest.raises(ValueError, match="non-empty"):
        Document(tokens[:0], np.ones(0, dtype=bool))
