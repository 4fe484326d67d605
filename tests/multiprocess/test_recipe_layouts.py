"""The quick start's own recipe under other layouts: the same losses in every step of SFT and of GRPO."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess

SFT = ["sft", "tiny", "--train.num_steps", "10", "--data.num_generated", "400", "--data.heldout", "8"]
RL = [
    "rl",
    "tiny",
    "--train.num_steps",
    "3",
    "--rollout.prompts_per_step",
    "8",
    "--sampling.max_new_tokens",
    "24",
    "--objective.min_informative",
    "0",
]


def run(words: list[str], run_dir: Path, *more: str) -> list[dict[str, float]]:
    """The metrics of a finished run."""
    command = [sys.executable, "-m", "phi4r", *words, "--run-dir", str(run_dir), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[dict[str, float]], list[dict[str, float]]]:
    """SFT and GRPO on one rank; the folder of the SFT run."""
    folder = tmp_path_factory.mktemp("tp1")
    sft = run(SFT, folder / "sft")
    return folder / "sft", sft, run(RL, folder / "rl", "--init.checkpoint", str(folder / "sft"))


@pytest.mark.parametrize("layout", ["tp", "pp"])
@pytest.mark.proves(
    "The quick start's recipe gives the same losses on two ranks",
    how="10 steps of SFT, 3 of GRPO, 1e-4",
    layouts="tp 2, pp 2",
)
def test_two_ranks_give_the_losses_of_one(
    layout: str, reference: tuple[Path, list[dict[str, float]], list[dict[str, float]]], tmp_path: Path
) -> None:
    checkpoint, sft, rl = reference
    ranks = [f"--parallel.{layout}", "2"]
    for found, expected in (
        (run(SFT, tmp_path / "sft", *ranks), sft),
        (run(RL, tmp_path / "rl", "--init.checkpoint", str(checkpoint), *ranks), rl),
    ):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
            assert ours.get("response_length") == theirs.get("response_length")
