"""What a step is worth: FLOPs by the formula, and the wall-clock columns of a run of two ranks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi4r.configs.sections import ModelConfig, ParallelConfig
from phi4r.data.packing import Document, pack
from phi4r.parallel.launch import run_ranks
from phi4r.train.log import WALL_CLOCK
from phi4r.train.throughput import StepClock, model_flops
from tests.train import checkpoint_ranks as ranks


def documents(*lengths: int) -> list[Document]:
    return [Document(np.ones(n, dtype=np.int32), np.ones(n, dtype=bool)) for n in lengths]


def test_attention_is_counted_inside_each_document_and_padding_not_at_all() -> None:
    model = ModelConfig.from_preset("phi4", vocab_size=100_352)
    # the sum that `phi4r plan` writes down for Phi-4: 84.9e9 + 1.23e6 n a token
    for lengths in ((4096,), (1000, 3000), (1, 1, 17)):
        found = model_flops(model, pack(documents(*lengths), 4096))
        expected = sum(84.9e9 * n + 1.2288e6 * n * n for n in lengths)
        assert found == pytest.approx(expected, rel=1e-3)
    one = model_flops(model, pack(documents(2000), 2000))
    assert model_flops(model, pack(documents(2000), 4000)) == one
    assert model_flops(model, pack(documents(1000, 1000), 2000)) < one


def test_phases_add_up_to_the_step() -> None:
    engine = ranks.make_engine({})
    clock = StepClock(engine)
    for _ in range(2):  # the second step starts from nothing
        clock.begin()
        time.sleep(0.03)
        clock.phase("train")
        engine.train_step(ranks.rows(0), ranks.sft_loss, 1e-3)
        clock.phase("eval")
        time.sleep(0.02)
        columns = clock.columns(100)
    assert columns["data_seconds"] >= 0.03
    assert columns["eval_seconds"] >= 0.02
    phases = sum(columns[f"{name}_seconds"] for name in ("data", "train", "eval"))
    assert phases == pytest.approx(columns["step_seconds"], abs=0.02 + 0.5 * columns["step_seconds"])
    assert phases <= columns["step_seconds"]
    assert columns["tokens_per_second"] == 100 / columns["step_seconds"]
    assert set(columns) <= set(WALL_CLOCK)
    spans = [(what, end - start) for lane, what, start, end in columns["timeline"]]
    assert [what for what, _ in spans] == ["data", "train", "eval"], "only the first step has a start"
    for what, seconds in spans:
        assert seconds == pytest.approx(columns[f"{what}_seconds"], abs=0.002)
    assert "mfu" not in columns, "there is no peak to compare with"


def slow_rank(job: dict[str, Any]) -> None:
    """Rank 1 takes a second longer over its microbatches."""
    parallel = ParallelConfig(dp=2)
    engine = ranks.make_engine(parallel.__dict__)
    clock = StepClock(engine)
    for _ in range(2):
        clock.begin()
        clock.phase("train")
        if engine.layout.rank == 1:
            time.sleep(1.0)
        engine.train_step(ranks.rows(0), ranks.sft_loss, 1e-3)
        columns = clock.columns(100)
    Path(job["out"] + str(engine.layout.rank)).write_text(json.dumps(columns))


@pytest.mark.multiprocess
def test_the_slowest_rank_and_its_excess_are_named(tmp_path: Path) -> None:
    run_ranks(f"{__name__}:slow_rank", {"out": str(tmp_path / "out")}, 2, tmp_path)
    found = [json.loads((tmp_path / f"out{rank}").read_text()) for rank in (0, 1)]
    for columns in found:
        assert columns["slowest_rank"] == 1
        assert columns["slowest_excess"] > 0.1
        assert columns["tokens_per_second_per_gpu"] == pytest.approx(columns["tokens_per_second"] / 2)
    assert found[0]["slowest_excess"] == found[1]["slowest_excess"]
