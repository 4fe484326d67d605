"""How the quick start uses the machine it finds. The whole of it runs in test_pipeline.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from phi4r.commands.quickstart import wire


@pytest.mark.parametrize(
    ("cores", "overrides", "dp"),
    [
        ({0, 1}, [], 2),
        ({0}, [], 1),
        ({0, 1, 2, 3}, ["parallel.tp=2"], 1),
        ({0, 1}, ["train.global_batch_size=3"], 1),
    ],
)
def test_a_second_core_gets_a_rank_unless_the_layout_is_chosen(
    cores: set[int], overrides: list[str], dp: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    pipeline = wire(tmp_path, ["seed=0", *overrides])
    assert (pipeline.sft.parallel.dp, pipeline.rl.parallel.dp) == (dp, dp)
    assert (pipeline.sft.model.dtype, pipeline.rl.model.dtype) == ("fp64", "fp64")


def test_on_a_gpu_the_models_are_in_fp32_on_one_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pipeline = wire(tmp_path, ["seed=0"])
    for stage in (pipeline.sft, pipeline.rl):
        assert (stage.model.dtype, stage.parallel.dp) == ("fp32", 1)
