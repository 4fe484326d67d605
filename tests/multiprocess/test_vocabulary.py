"""A vocabulary that tensor parallelism does not divide: 64 rows on 3 ranks are 66 rows, and nobody sees the
two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi4r.convert.hf import phi4r_to_hf
from phi4r.models.huggingface import HFWeights
from phi4r.parallel.launch import run_ranks
from tests.multiprocess.vocabulary import MODEL, VOCAB

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """(folder of the checkpoints, {run: what it found}). "again" is one rank that goes on from three's
    checkpoint."""
    folder: Path = tmp_path_factory.mktemp("vocabulary")
    results = {}
    for name, tp, other in (("one", 1, ""), ("three", 3, "tp1"), ("again", 1, "tp3")):
        payload = {"tp": tp, "out": str(folder / f"{name}.json"), "other": other, "folder": str(folder)}
        if name == "again":
            payload["folder"] = str(folder / "again")
            (folder / "again").mkdir()
            (folder / "again" / "tp3").symlink_to(folder / "tp3")
        program = "tests.multiprocess.vocabulary:run"
        run_ranks(program, payload, tp, folder / f"run_{name}", timeout_s=120, threads=1)
        results[name] = json.loads((folder / f"{name}.json").read_text())
    return folder, results


@pytest.mark.proves(
    "A vocabulary that tp does not divide gives the losses of one rank",
    how="6 optimizer steps, fp64, 1e-12",
    layouts="tp 3",
)
def test_losses_and_gradient_norms_equal_those_of_one_rank(found: tuple[Path, Any]) -> None:
    results = found[1]
    for key in ("steps", "later"):
        np.testing.assert_allclose(results["three"][key], results["one"][key], rtol=1e-12)


@pytest.mark.proves(
    "Padding rows of the vocabulary get no gradient",
    how="every row of embedding and head against one rank",
    layouts="tp 3",
)
def test_gradients_equal_and_those_of_padding_rows_are_zero(found: tuple[Path, Any]) -> None:
    for name, expected in found[1]["one"]["gradients"].items():
        three = np.array(found[1]["three"]["gradients"][name])
        assert three.shape == (66, MODEL.hidden_size)
        assert not three[VOCAB:].any()
        # what rounding leaves of sums over 192 tokens in fp64
        np.testing.assert_allclose(three[:VOCAB], expected, rtol=0, atol=1e-12 * np.abs(expected).max())
        assert np.abs(expected).max(1).min() > 0, "every real row should have a gradient"


def test_the_same_tokens_are_sampled(found: tuple[Path, Any]) -> None:
    assert found[1]["three"]["samples"] == found[1]["one"]["samples"]
    assert len({token for tokens in found[1]["one"]["samples"] for token in tokens}) > 10


@pytest.mark.proves(
    "A checkpoint goes on in a layout with other padding",
    how="losses after loading, both ways, fp64, 1e-12",
    layouts="tp 1 <-> tp 3",
)
def test_a_checkpoint_goes_on_in_a_layout_with_other_padding(found: tuple[Path, Any]) -> None:
    results = found[1]
    np.testing.assert_allclose(results["three"]["from_other"], results["one"]["later"], rtol=1e-12)
    np.testing.assert_allclose(results["again"]["from_other"], results["one"]["later"], rtol=1e-12)


@pytest.mark.proves(
    "Exports leave padding rows out", how="Hugging Face folders from both layouts", layouts="tp 3"
)
def test_exports_hold_the_real_rows_only(found: tuple[Path, Any], tmp_path: Path) -> None:
    exported = {}
    for tp in (1, 3):
        phi4r_to_hf(found[0] / f"tp{tp}", tmp_path / f"hf{tp}")
        exported[tp] = HFWeights(tmp_path / f"hf{tp}")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        one, three = (exported[tp].get_tensor(name) for tp in (1, 3))
        assert three.shape == (VOCAB, MODEL.hidden_size)
        np.testing.assert_allclose(three, one, rtol=0, atol=1e-12)
