"""The quick start, whole, through the real command line, on a model that needs a minute on two cores."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# Arithmetic modulo 5 by two narrow layers: the story of the real quick start, told faster. SFT must
# last until worked answers are mostly right, or GRPO finds nothing to reward in them.
SIZE = [
    "--data.task", "modchain5", "--problems.task", "modchain5",
    "--model.num_layers", "2", "--model.hidden_size", "96", "--model.ffn_hidden_size", "320",
    "--model.num_attention_heads", "8", "--model.num_query_groups", "4", "--model.head_dim", "16",
    "--data.num_generated", "12800", "--data.heldout", "64",
    "--sft.train.num_steps", "420", "--sft.train.global_batch_size", "4", "--sft.optimizer.lr", "2e-3",
    "--sft.train.eval_every", "210", "--sft.checkpoint.every", "420",
    "--curate.problems.num_generated", "256", "--curate.problems.difficulty_min", "3",
    "--curate.problems.difficulty_max", "5",
    "--rl.train.num_steps", "24", "--rl.rollout.prompts_per_step", "16", "--rl.optimizer.lr", "3e-4",
    "--rl.optimizer.warmup_steps", "4", "--rl.checkpoint.every", "24",
    "--eval.num_problems", "96", "--eval.bootstrap", "500",
]  # fmt: skip
STAGES = {"curate_sft", "sft", "eval_sft", "curate_rl", "rl", "eval_rl", "report"}


def quickstart(folder: Path) -> str:
    """Run `phi4r quickstart`; its output."""
    ended = subprocess.run(
        [sys.executable, "-m", "phi4r", "quickstart", "--run-dir", str(folder), "--seed", "0", *SIZE],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    return ended.stdout


def digests(folder: Path) -> dict[str, str]:
    """Every file of the stages; the report beside them is made anew, with the seconds spent so far."""
    files = [path for path in folder.rglob("*") if path.is_file() and len(path.relative_to(folder).parts) > 1]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_quick_start_teaches_thinking_and_a_second_start_is_a_no_op(tmp_path: Path) -> None:
    folder = tmp_path / "quick"
    shown = quickstart(folder)
    summary = json.loads((folder / "summary.json").read_text())

    assert set(summary) == {"sft", "grpo", "gain", "seconds", "report"}
    for stage in ("sft", "grpo"):
        assert set(summary[stage]) == {"avg_at_8", "ci95", "mean_length"}
        low, high = summary[stage]["ci95"]
        assert 0 <= low <= summary[stage]["avg_at_8"] <= high <= 1
    assert set(summary["gain"]) == {"mean", "ci95"}
    assert set(summary["seconds"]) == {*STAGES, "total"}

    # The story: GRPO finds out that thinking pays, so accuracy and length rise together.
    difference = summary["grpo"]["avg_at_8"] - summary["sft"]["avg_at_8"]
    assert summary["gain"]["mean"] == pytest.approx(difference, abs=1e-9)
    assert summary["gain"]["mean"] > 0.05
    assert summary["gain"]["ci95"][0] > 0
    assert summary["grpo"]["mean_length"] > summary["sft"]["mean_length"]
    assert summary["sft"]["avg_at_8"] > 0.22, "better than the one in five of a guess"

    report = Path(summary["report"])
    assert report == folder / "report.html"
    page = report.read_text()
    assert "phi4r quick start" in page
    assert page.count("data:image/png;base64,") >= 4
    assert 'src="http' not in page, "the page is complete in itself"
    assert "SFT" in shown
    assert "gain" in shown

    before = digests(folder)
    shown = quickstart(folder)
    assert shown.count("done already") == 4
    assert shown.count(": already done") == 4 + 5, "every stage of both curations"
    assert digests(folder) == before
    again = json.loads((folder / "summary.json").read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in summary.items() if k != "seconds"
    }
