"""Tied embeddings, which two pipeline stages hold, in checkpoints: any layout goes on from any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from phi4r.convert.hf import phi4r_to_hf
from phi4r.models.huggingface import HFWeights
from phi4r.parallel.launch import run_ranks
from tests.families.models import make
from tests.families.test_parity import documents

pytestmark = pytest.mark.multiprocess


def losses(folder: Path, run: str, layout: dict[str, Any], steps: int) -> list[float]:
    payload = {
        "hf": str(folder / "hf"),
        "run": str(folder / run),
        "documents": str(folder / "documents.pt"),
        "out": str(folder / "losses.json"),
        "layout": layout,
        "steps": steps,
    }
    ranks = 1
    for size in layout.values():
        ranks *= size
    run_ranks("tests.families.resume_ranks:run", payload, ranks, folder / "log")
    found: list[float] = json.loads((folder / "losses.json").read_text())
    return found


def test_a_tied_model_goes_on_in_another_layout(tmp_path: Path) -> None:
    make("phi4_mini", tmp_path / "hf")
    torch.save(documents(), tmp_path / "documents.pt")
    (tmp_path / "log").mkdir()
    expected = losses(tmp_path, "uninterrupted", {}, 4)
    begun = losses(tmp_path, "run", {"pp": 2}, 2)
    after = losses(tmp_path, "run", {"tp": 2}, 2)
    # float64 throughout: the orders of summation differ, and four steps let that grow a little
    assert [*begun, *after] == pytest.approx(expected, rel=1e-9)
    [checkpoint] = (tmp_path / "run" / "checkpoints").glob("step_*")
    phi4r_to_hf(checkpoint, tmp_path / "back")
    assert "lm_head.weight" not in HFWeights(tmp_path / "back").entries
