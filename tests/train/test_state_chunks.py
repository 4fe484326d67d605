"""Flat ranges of arrays as boxes, and what is made of them. Whole checkpoints of every layout are loaded in
every other by test_checkpoint, whose small matrices are hardly ever cut within a row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from phi4r.train.checkpoint import fill_adam_state, sharded_state
from phi4r.train.engine import Engine
from phi4r.train.folders import DIST
from phi4r.train.state_chunks import boxes, load_states, state_chunks
from tests.train import checkpoint_ranks as ranks

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@given(SHAPES, st.data())
def test_boxes_hold_the_elements_of_a_range_in_order_and_are_few(
    shape: list[int], data: st.DataObject
) -> None:
    array = np.arange(math.prod(shape)).reshape(shape)
    start, end = sorted(data.draw(st.tuples(st.integers(0, array.size), st.integers(0, array.size))))
    found = list(boxes(start, end, shape))
    parts = [
        array[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].reshape(-1)
        for offsets, sizes in found
    ]
    assert np.concatenate([*parts, np.empty(0, int)]).tolist() == list(range(start, end))
    assert all(part.size for part in parts)
    assert len(found) <= 2 * len(shape) - 1


class Part:
    """What one of `number` data-parallel ranks holds of a distributed optimizer: a part of every weight, cut
    without regard to its rows. Copies; empty: without the values."""

    def __init__(self, whole: Any, rank: int, number: int, empty: bool = False) -> None:
        self.optimizer = whole.optimizer
        self.states: dict[Tensor, dict[str, Tensor]] = {}
        ranges = {}
        for parameter in parameters(whole):
            start, end = (parameter.numel() * r // number for r in (rank, rank + 1))
            ranges[parameter] = {"param": SimpleNamespace(start=start, end=end)}
            states = whole._get_main_param_and_optimizer_states(parameter)
            self.states[parameter] = {
                name: values.detach().view(-1)[start:end].clone()
                for name, values in states.items()
                if name != "step"
            }
            if empty:
                for values in self.states[parameter].values():
                    values.fill_(math.nan)
        self.gbuf_ranges = [{"dtype": [{"param_map": ranges}]}]

    def _get_main_param_and_optimizer_states(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"step": torch.tensor(1.0), **self.states[parameter]}


def parameters(optimizer: Any) -> Iterator[Tensor]:
    """The weights of a distributed optimizer."""
    for by_dtype in optimizer.gbuf_ranges:
        for (bucket,) in by_dtype.values():
            yield from bucket["param_map"]


def weights(engine: Engine) -> Any:
    """The sharded state dict of the weights."""
    return sharded_state(engine.chunks, None, is_loading=False)


def arrays(optimizers: list[Any], model: Any) -> dict[str, Tensor]:
    """What all of `optimizers` would store together; an element that is stored twice or not at all is nan."""
    found: dict[str, Tensor] = {}
    for item, value in state_chunks(optimizers, model):
        assert item.tensor_data is not None
        array = found.setdefault(item.index.fqn, torch.full(item.tensor_data.size, math.nan))
        chunk = item.tensor_data.chunk
        place = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        array[place] = torch.where(array[place].isnan(), value, math.nan)
    return found


@pytest.fixture(scope="module")
def trained() -> Engine:
    """One rank, whose optimizer has states."""
    engine = ranks.make_engine({})
    ranks.train(engine, 0, 2)
    return engine


@pytest.fixture(scope="module")
def folder(trained: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint."""
    return ranks.save(trained, Path(tmp_path_factory.mktemp("run"))) / DIST


def test_parts_cut_within_rows_make_the_same_arrays(trained: Engine) -> None:
    (whole,) = trained.optimizer.chained_optimizers
    expected = arrays([whole], weights(trained))
    found = arrays([Part(whole, rank, 3) for rank in range(3)], weights(trained))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert torch.equal(found[name], array), name


@pytest.mark.parametrize("rank", range(3))
def test_a_part_cut_within_rows_is_read_and_nothing_else(
    trained: Engine, folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = trained.optimizer.chained_optimizers
    read: list[ReadItem] = []
    read_data = FileSystemReader.read_data

    def spy(self: FileSystemReader, plan: LoadPlan, planner: LoadPlanner) -> Any:
        read.extend(plan.items)
        return read_data(self, plan, planner)

    monkeypatch.setattr(FileSystemReader, "read_data", spy)
    part, expected = Part(whole, rank, 3, empty=True), Part(whole, rank, 3)
    load_states(folder, [part], weights(trained))
    for parameter, states in part.states.items():
        for name, values in states.items():
            assert torch.equal(values, expected.states[parameter][name]), name
    held = sum(values.numel() for states in part.states.values() for values in states.values())
    assert sum(math.prod(item.lengths) for item in read) == held


def test_rows_that_pad_the_vocabulary_are_zero(folder: Path, trained: Engine) -> None:
    larger = ranks.make_engine({}, model=replace(ranks.MODEL, vocab_size=2 * ranks.VOCAB))
    fill_adam_state(larger.optimizer)
    (whole,) = larger.optimizer.chained_optimizers
    parts = [Part(trained.optimizer.chained_optimizers[0], 0, 1), Part(whole, 0, 1, empty=True)]
    load_states(folder, parts[1:], weights(larger))
    ours, theirs = (list(part.states.values()) for part in parts)
    padded = 0
    for expected, found in zip(ours, theirs, strict=True):
        for name, values in expected.items():
            assert torch.equal(found[name][: len(values)], values)
            assert not found[name][len(values) :].any()
            padded += len(found[name]) - len(values)
    assert padded == 2 * 3 * ranks.VOCAB * ranks.MODEL.hidden_size
