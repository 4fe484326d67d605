"""`phi4r profile`, through the command line on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi4r.cli.main import main


@pytest.mark.multiprocess
def test_a_profile_has_a_trace_per_rank_and_a_summary(tmp_path: Path) -> None:
    settings = [
        "--parallel.tp", "2", "--data.num_generated", "200", "--data.heldout", "8",
        "--model.hidden_size", "32", "--model.num_layers", "2", "--model.ffn_hidden_size", "64",
        "--model.head_dim", "8",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(["profile", "tiny", "--run-dir", str(tmp_path), "--steps", "2", "--warmup", "1", *settings])
    assert not ended.value.code
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["step_seconds"]) == 2
    operators = {operator["name"]: operator for operator in summary["operators"]}
    assert operators["phi4r: train_step"]["calls"] == 2, "the step that warms up is not recorded"
    assert operators["aten::mm"]["self_ms"] > 0
    own = [operator["self_ms"] for operator in summary["operators"]]
    assert own == sorted(own, reverse=True)
    # Some threads work beside the main one, so their own times may add up to more than the wall clock's.
    assert own[0] <= 1e3 * sum(summary["step_seconds"])
    for rank in range(2):
        events = json.loads((tmp_path / f"trace_rank_{rank:05d}.json").read_text())["traceEvents"]
        assert sum(event.get("name") == "phi4r: train_step" for event in events) >= 2
        assert any("all_reduce" in event.get("name", "") for event in events), "the ranks talk to each other"
