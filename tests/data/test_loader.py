"""The loader: an order made of counters, rows read ahead, and SFT that cannot tell shards from memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from phi4r.cli.main import main
from phi4r.core.seeds import items_of_step
from phi4r.data import build
from phi4r.data.loader import Loader, row_at
from phi4r.data.packing import PackedRow
from phi4r.data.shards import ShardRows
from tests.data import corpus


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(input file, shard folder)."""
    folder = tmp_path_factory.mktemp("loader")
    path = corpus.write_jsonl(folder / "in.jsonl", corpus.rows(80))
    build.main(corpus.config(path), folder / "out", build.Options(shard_tokens=128 * 9))
    return path, folder / "out"


def loaded(rows: Sequence[PackedRow], first: int, last: int, **options: Any) -> list[list[PackedRow]]:
    options |= {"seed": 5, "stream": 2, "rows_per_step": 6, "deadline_s": 20}
    with Loader(rows, first_step=first, last_step=last, **options) as loader:
        return [loader.next() for _ in range(first, last)]


def tokens(batches: list[list[PackedRow]]) -> list[list[bytes]]:
    return [[row.input_ids.tobytes() for row in batch] for batch in batches]


def test_positions_give_the_rows_of_the_steps() -> None:
    for step in range(9):
        expected = items_of_step(10, 3, 1, step, 7)
        assert [row_at(step * 7 + i, 10, 3, 1) for i in range(7)] == expected


def test_a_loader_that_starts_later_goes_on_with_exactly_the_next_rows(shards: tuple[Path, Path]) -> None:
    rows = ShardRows(shards[1])
    assert 2 * len(rows) < 20 * 6  # more than two epochs
    whole = tokens(loaded(rows, 0, 20))
    assert tokens(loaded(rows, 0, 7)) + tokens(loaded(rows, 7, 20)) == whole


@pytest.mark.parametrize("dp", [1, 2, 3, 6])
@pytest.mark.proves(
    "Any number of data-parallel ranks sees the same rows",
    how="the rows of one rank",
    layouts="dp 1, dp 2, dp 3, dp 6",
)
def test_any_number_of_ranks_shares_the_rows_and_reads_only_its_own(
    shards: tuple[Path, Path], dp: int
) -> None:
    rows = ShardRows(shards[1])
    whole = tokens(loaded(rows, 3, 6))
    shared = [loaded(rows, 3, 6, dp=dp, dp_rank=rank) for rank in range(dp)]
    for step in range(3):
        found: dict[int, bytes] = {}
        for rank in range(dp):
            read = [i for i, row in enumerate(shared[rank][step]) if "labels" in vars(row)]
            assert len(read) == 6 // dp
            assert not found.keys() & set(read)
            found |= {i: shared[rank][step][i].input_ids.tobytes() for i in read}
        assert [found[i] for i in range(6)] == whole[step]


class Failing(Sequence[PackedRow]):
    """Rows of which the ninth cannot be read."""

    def __init__(self, rows: Sequence[PackedRow]) -> None:
        self.rows, self.asked = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        self.asked += 1
        if self.asked == 9:
            raise OSError("the disk is gone")
        return self.rows[index]


def test_an_error_of_the_thread_is_raised_at_the_step_it_belongs_to(shards: tuple[Path, Path]) -> None:
    rows = Failing(ShardRows(shards[1]))
    with Loader(rows, seed=5, stream=2, rows_per_step=6, first_step=0, last_step=9) as loader:
        assert len(loader.next()) == 6
        with pytest.raises(OSError, match="the disk is gone"):
            loader.next()


def metrics(run: Path) -> list[dict[str, float]]:
    """What a step computed, without what the clock says."""
    names = ("loss", "grad_norm", "lr", "num_valid_tokens", "num_tokens", "epoch", "heldout_loss")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in names if name in line} for line in lines]


def sft(run: Path, data: Path, *words: str) -> list[dict[str, float]]:
    settings = [
        "--data.path", str(data), "--data.seq_length", "128", "--data.heldout", "8", "--train.num_steps", "4",
        "--model.hidden_size", "32", "--model.num_layers", "2", "--model.ffn_hidden_size", "64",
        "--model.head_dim", "8", "--train.eval_every", "2", "--checkpoint.every", "2",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(["sft", "tiny", "--run-dir", str(run), *settings, *words])
    assert not ended.value.code
    return metrics(run)


@pytest.mark.multiprocess
@pytest.mark.proves(
    "SFT from shards equals SFT from memory, also when dp changes",
    how="metrics of the real trainer: equal, 1e-5 after the change",
    layouts="dp 1 -> dp 2",
)
def test_sft_from_shards_equals_sft_from_memory_also_resumed_on_two_ranks(
    shards: tuple[Path, Path], tmp_path: Path
) -> None:
    path, folder = shards
    constant = ("--optimizer.decay", "constant", "--optimizer.warmup_steps", "0")
    from_memory = sft(tmp_path / "memory", path, *constant)
    assert len({row["loss"] for row in from_memory}) == 4
    assert sft(tmp_path / "shards", folder, *constant, "--train.num_steps", "2") == from_memory[:2]
    # Two ranks go on where one stopped: the same rows, so the same losses but for the order of sums.
    resumed = sft(tmp_path / "shards", folder, *constant, "--parallel.dp", "2")[2:]
    for row, reference in zip(resumed, from_memory[2:], strict=True):
        assert row["num_tokens"] == reference["num_tokens"]
        assert row["num_valid_tokens"] == reference["num_valid_tokens"]
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-5)
