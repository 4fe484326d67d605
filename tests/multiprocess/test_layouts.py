"""Every layout computes what one process computes: the claim on which all CPU proofs rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi4r.parallel.launch import run_ranks
from tests.multiprocess import layouts

pytestmark = pytest.mark.multiprocess

Results = dict[str, dict[str, list[float]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All cases, one launch per number of ranks."""
    folder: Path = tmp_path_factory.mktemp("layouts")
    found: Results = {}
    for world_size in (1, 2, 3, 4):
        out = folder / f"{world_size}.json"
        payload = {"world_size": world_size, "out": str(out)}
        run_ranks(
            "tests.multiprocess.layouts:run",
            payload,
            world_size,
            folder / str(world_size),
            timeout_s=600,
            threads=1,
        )
        found |= json.loads(out.read_text())
    return found


def deviation(results: Results, case: layouts.Case, key: str) -> float:
    """Largest relative difference over the steps between `case` and the same case on one process, without its
    bug."""
    reference = layouts.Case(
        "tp1", packed=case.packed, loss=case.loss, dtype=case.dtype, num_layers=case.num_layers
    )
    pairs = zip(results[case.name][key], results[reference.name][key], strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


CASES = [case for case in layouts.cases() if not case.bug]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.proves(
    "Losses and gradient norms of SFT, GRPO and GSPO do not depend on the layout",
    how="5 optimizer steps against one process: 1e-5 and 1e-4 relative in fp32, 1e-12 in fp64",
)
def test_layout_gives_the_losses_and_gradient_norms_of_one_process(
    results: Results, case: layouts.Case
) -> None:
    # bf16 stages pass activations on exactly, so only sums over ranks may differ. In fp64 what is left after
    # five steps is a few thousand roundings of 1e-16.
    tolerances = {"fp64": (1e-12, 1e-12), "fp32": (1e-5, 1e-4), "bf16": (1e-4, 1e-3)}
    loss_tolerance, norm_tolerance = tolerances[case.dtype]
    assert deviation(results, case, "loss") <= loss_tolerance
    assert deviation(results, case, "grad_norm") <= norm_tolerance


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.layout.startswith("pp")],
    ids=lambda case: case.name,
)
@pytest.mark.proves("Pipeline stages equal one process to the last bit", how="the same steps, difference 0")
def test_pipeline_stages_equal_one_process_to_the_last_bit(results: Results, case: layouts.Case) -> None:
    # Stages split no sum but the gradient norm's, which is taken in fp64.
    assert deviation(results, case, "loss") == 0
    assert deviation(results, case, "grad_norm") <= 1e-15


def test_the_training_moves_the_loss_so_that_equality_says_something(results: Results) -> None:
    for case in CASES:
        losses = results[case.name]["loss"]
        assert max(losses) - min(losses) > 1e-3, case.name


@pytest.mark.parametrize("layout", layouts.SAMPLING_LAYOUTS[1:])
@pytest.mark.proves(
    "The same tokens are sampled in every layout",
    how="token by token against one process, fewer cache slots than requests",
)
def test_layout_samples_the_tokens_of_one_process(results: dict[str, list[list[int]]], layout: str) -> None:
    reference = results["tp1-samples"]
    assert len({len(tokens) for tokens in reference}) > 2, "sequences should end at different times"
    assert results[f"{layout}-samples"] == reference
    assert reference[: len(reference) // 2] == reference[len(reference) // 2 :], "the second is continuous"


@pytest.mark.parametrize("layout", layouts.SAMPLING_LAYOUTS[1:])
def test_live_weights_are_exported_as_those_of_one_process(
    results: dict[str, dict[str, str]], layout: str
) -> None:
    reference = results["tp1-export"]
    assert len([name for name in reference if name.endswith(".safetensors")]) > 2
    assert results[f"{layout}-export"] == reference


@pytest.mark.parametrize("case", [c for c in layouts.cases() if c.bug], ids=lambda c: c.name)
@pytest.mark.proves(
    "The layout matrix sees planted bugs",
    how="stages that lose cu_seqlens, losses averaged per microbatch: the gradient norm moves",
)
def test_the_matrix_sees_planted_bugs(results: Results, case: layouts.Case) -> None:
    assert deviation(results, case, "grad_norm") > 1e-3
