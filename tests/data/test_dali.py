"""DALI's loader gives the rows of ours. Skipped without the package: what runs here is its CPU part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phi4r.cli.main import main
from phi4r.configs.sections import ModelConfig, ParallelConfig, TrainConfig
from phi4r.core import optional
from phi4r.core.errors import UserError
from phi4r.data import build
from phi4r.data.dali import NAMES, DaliLoader
from phi4r.data.loader import Loader
from phi4r.data.packing import PackedRow
from phi4r.data.shards import ShardRow, ShardRows
from phi4r.models.names import load_weights, random_weights
from phi4r.parallel.layout import init_layout
from phi4r.train.engine import Engine
from tests.data import corpus

has_dali = optional.available("nvidia.dali")
needs_dali = pytest.mark.skipif(
    not has_dali, reason=f"no nvidia.dali: {optional.TABLE['nvidia.dali'].install}"
)
ORDER: dict[str, Any] = {"seed": 5, "stream": 2, "rows_per_step": 6}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dali")
    path = corpus.write_jsonl(folder / "in.jsonl", corpus.rows(80))
    build.main(corpus.config(path), folder / "out", build.Options(shard_tokens=128 * 9))
    return folder / "out"


def batches(kind: Any, rows: Sequence[PackedRow], first: int, last: int, **options: Any) -> list[Any]:
    with kind(rows, first_step=first, last_step=last, deadline_s=60, **ORDER, **options) as loader:
        found = [loader.next() for _ in range(first, last)]
        with pytest.raises(StopIteration):
            loader.next()
    return found


@needs_dali
@pytest.mark.parametrize("dp", [1, 3])
def test_a_rank_gets_the_rows_and_the_shares_of_our_loader(shards: Path, dp: int) -> None:
    rows = ShardRows(shards)
    last = 3 + 2 * len(rows) // 6  # beyond an epoch
    for rank in range(dp):
        ours = batches(Loader, rows, 3, last, dp=dp, dp_rank=rank)
        theirs = batches(DaliLoader, rows, 3, last, dp=dp, dp_rank=rank, workers=2)
        for expected, found in zip(ours, theirs, strict=True):
            assert [row.cu_seqlens.tolist() for row in found] == [r.cu_seqlens.tolist() for r in expected]
            read = [i for i, row in enumerate(expected) if "labels" in vars(row)]
            assert [i for i, row in enumerate(found) if row.placed] == read
            for index in read:
                for name in NAMES:
                    array = getattr(expected[index], name)
                    placed = found[index].placed[name].numpy()
                    assert placed.dtype == array.dtype
                    assert np.array_equal(placed, array)


@needs_dali
def test_a_damaged_shard_ends_the_run_with_its_name(shards: Path, tmp_path: Path) -> None:
    for path in shards.rglob("*.*"):
        target = tmp_path / path.relative_to(shards)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    damaged = tmp_path / "train" / "tokens_00000.npy"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(Exception, match="shard 0 of train is damaged"):
        batches(DaliLoader, ShardRows(tmp_path), 0, 9)


def sft(run: Path, data: Path, *words: str) -> int | str | None:
    settings = [
        "--data.path", str(data), "--data.seq_length", "128", "--data.heldout", "8", "--train.num_steps", "3",
        "--model.hidden_size", "32", "--model.num_layers", "1",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(["sft", "tiny", "--run-dir", str(run), *settings, *words])
    return ended.value.code


@needs_dali
def test_sft_gives_the_same_losses_through_dali(shards: Path, tmp_path: Path) -> None:
    assert not sft(tmp_path / "thread", shards)
    assert not sft(tmp_path / "dali", shards, "--data.loader", "dali")
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("thread", "dali")]
    ours, theirs = ([json.loads(line) for line in part] for part in lines)
    assert len({row["loss"] for row in ours}) == 3
    for name in ("loss", "grad_norm", "num_valid_tokens"):
        assert [row[name] for row in theirs] == [row[name] for row in ours]


def test_the_engine_takes_what_a_loader_has_placed(shards: Path) -> None:
    model = ModelConfig(num_layers=1, hidden_size=32, ffn_hidden_size=64, head_dim=8, vocab_size=512)
    engine = Engine(model, ParallelConfig(), init_layout(ParallelConfig()), TrainConfig())
    load_weights(engine.models, model, random_weights(model, 1), 0, 1)
    row = ShardRows(shards)[0]
    assert isinstance(row, ShardRow)
    before = engine.evaluate([row])
    assert before.count == row.loss_mask.sum() > 2
    row.placed["loss_mask"] = torch.from_numpy(row.loss_mask) * 0
    row.placed["loss_mask"][int(row.loss_mask.argmax())] = 1
    assert engine.evaluate([row]).count == 1
    row.placed["labels"] = (torch.from_numpy(row.labels) + 1) % 512
    assert engine.evaluate([row]).loss != before.loss


@needs_dali
def test_rows_that_are_not_of_shards_are_refused() -> None:
    with pytest.raises(UserError, match="dali reads shards"):
        DaliLoader([], first_step=0, last_step=1, **ORDER)


@pytest.mark.skipif(has_dali, reason="nvidia.dali is installed")
def test_without_dali_the_run_ends_with_how_to_install_it(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft(tmp_path / "run", shards, "--data.loader", "dali") == 2
    said = capsys.readouterr().err
    assert "data.loader = dali needs nvidia-dali" in said
    assert "which is not installed: make install EXTRAS=dali" in said
