"""What `phi4r launch`, `status`, `logs` and the check of the nodes do before and beside SLURM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rows import read_rows
from phi4r.core.errors import UserError
from phi4r.slurm import logs, status
from phi4r.slurm.check import judge, wait_for_reports
from phi4r.slurm.submit import LaunchRequest, prepare, rendered, seconds_of

ROOT = Path(__file__).resolve().parents[2]


def request(stage: str, *words: str, **changes: Any) -> LaunchRequest:
    return LaunchRequest(stage, list(words), **{"overrides": [], "run_dir": "/shared/run", **changes})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 600), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("1-00:00:01", 86401)],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


def test_a_time_limit_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="got 'tomorrow'"):
        seconds_of("tomorrow")


def test_the_command_has_the_recipes_layout_and_passes_settings_through() -> None:
    submission = prepare(
        request(
            "sft", "phi4_sft", nodes=4, time="1-00:00:00", overrides=["optimizer.lr=1e-6"], sbatch="-p 'a b'"
        )
    )
    head, tail = submission.command[:-5], submission.command[-5:]
    assert {"--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--signal=B:USR2@900"} <= set(head)
    assert head[-2:] == ["-p", "a b"]
    assert tail[0].endswith("launch/sft.sbatch")
    assert tail[1:] == ["phi4_sft", "--optimizer.lr=1e-6", "--run-dir", "/shared/run"]
    assert "fits" in submission.notes[0]
    assert rendered(submission.command).count("\n") >= len(head) - 1


def test_rollout_nodes_are_a_second_component_with_a_server_for_each_gpu() -> None:
    submission = prepare(request("rl", "phi4_grpo", nodes=4, rollout_nodes=2, time="60", sbatch="--qos=high"))
    colon = submission.command.index(":")
    assert {"--nodes=4", "--ntasks-per-node=8", "--time=60", "--qos=high"} <= set(submission.command[:colon])
    assert submission.command[colon + 1 : colon + 5] == [
        "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--qos=high"
    ]  # fmt: skip
    assert submission.command[colon + 5].endswith("launch/rl_vllm.sbatch")
    shared = prepare(request("rl", "phi4_grpo", nodes=4, rollout_nodes=2, servers_per_node=4)).command
    assert shared[shared.index(":") + 2] == "--ntasks-per-node=4"
    assert "\n  : \\\n  --nodes=2 " in rendered(submission.command)


def test_a_short_job_is_told_to_save_in_its_last_quarter() -> None:
    assert "--signal=B:USR2@150" in prepare(request("sft", "tiny", time="10")).command


@pytest.mark.parametrize(
    ("launched", "message"),
    [
        (request("train", "tiny"), "expected one of sft, rl, curate, eval or bench, got 'train'"),
        (request("sft"), "launch sft: expected RECIPE"),
        (request("sft", "phi4_sft", nodes=3), "32 ranks, which do not spread evenly over --nodes 3"),
        (request("sft", "phi4_sft", nodes=2, gpus_per_node=8), "--nodes 2 with 8 GPUs have 16"),
        (request("sft", "tiny", array=3), "--array: is for eval"),
        (request("bench", "native", run_dir="x"), "has no run folder"),
        (request("sft", "tiny", rollout_nodes=1), "--rollout-nodes: is for rl"),
        (
            request("rl", "phi4_grpo", nodes=4, rollout_nodes=1, servers_per_node=3),
            "3 servers cannot share 8 GPUs evenly",
        ),
        (
            request("rl", "tiny", rollout_nodes=1, overrides=["vllm.addresses=http://a:1"]),
            "both say where the servers are",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(launched: LaunchRequest, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(launched)


def test_a_folder_without_job_scripts_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHI4R_HOME", str(tmp_path))
    with pytest.raises(UserError, match="set PHI4R_HOME to a clone"):
        prepare(request("sft", "tiny"))


def make_run(folder: Path) -> Path:
    config = {"stage": "sft", "config": {"train": {"num_steps": 100}}}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"step": n, "step_seconds": 2.0, "tokens_per_second": 50.0} for n in range(1, 41)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4')
    for step in (9, 10, 100):
        (folder / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    (folder / "slurm").mkdir()
    (folder / "slurm" / "history.tsv").write_text(
        "t\t1.0.0\t10\tlost\told\nt2\t1.0.1\t10\tfailed\trank 1: no\n"
    )
    return folder


def test_status_tells_step_time_left_checkpoint_and_why_it_ended(tmp_path: Path) -> None:
    known = status.facts(make_run(tmp_path))
    assert (known["step"], known["num_steps"], known["tokens_per_second"]) == (40, 100, 50.0)
    assert known["eta_s"] == 120.0
    assert known["checkpoint"].endswith("step_000100")
    assert (known["last_end"], known["last_end_why"]) == ("failed", "rank 1: no")
    shown = dict(status.lines_of(known))
    assert shown["time left"] == "2:00"
    with pytest.raises(UserError, match="no such run folder"):
        status.facts(tmp_path / "other")


def test_logs_are_those_of_the_newest_attempt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("1.0.0", "1.1.0"):
        (tmp_path / "logs" / name).mkdir(parents=True)
        (tmp_path / "logs" / name / "rank_00001.log").write_text(f"from {name}\n")
    (tmp_path / "logs" / "latest").symlink_to("1.1.0")
    logs.main(tmp_path, 1, follow=False)
    assert capsys.readouterr().out == "from 1.1.0\n"
    with pytest.raises(UserError, match="no log of rank 7; ranks 0 to 0 have logs"):
        logs.main(tmp_path, 7, follow=False)


def report(node: str, **changes: Any) -> dict[str, Any]:
    versions = {"Python": "3", "phi4r": "1", "torch": "2", "megatron-core": "1", "numpy": "2"}
    return {"node": node, "skew_s": 0.0, "free_gib": 9.0, "versions": versions, "gpu_problem": "", **changes}


def test_nodes_are_judged_one_by_one_and_the_run_as_a_whole() -> None:
    assert judge([report("a"), report("b")], free_gib=5) == ([], {})
    general, bad = judge(
        [report("a"), report("b", skew_s=100.0), report("c", gpu_problem="3 GPUs of 4 are there")],
        free_gib=10,
    )
    assert bad == {"b": "its clock is +100 s off the other nodes'", "c": "3 GPUs of 4 are there"}
    assert general == ["the run folder has 9 GiB free, and 10 are asked for (PHI4R_FREE_GIB)"]
    other = {**report("b")["versions"], "torch": "9"}
    general, _ = judge([report("a"), report("b", versions=other)], free_gib=1)
    assert general == ["the nodes have different versions of torch: 2 on a, 9 on b"]


def test_reports_that_do_not_come_are_not_waited_for_beyond_the_deadline(tmp_path: Path) -> None:
    (tmp_path / "check_a.json").write_text(json.dumps(report("a")))
    assert [entry["node"] for entry in wait_for_reports(tmp_path, 2, 0.3)] == ["a"]


def faults_table(path: Path) -> str:
    """The table of docs/slurm.md: the newest row of each fault in benchmarks/results/slurm_faults.csv."""
    newest = {row["fault"]: row for row in read_rows(path)}
    lines = [
        f"| {row['fault']} | {row['outcome']} | {float(row['seconds']):.0f} s |" for row in newest.values()
    ]
    return "\n".join(["| fault | what happened | after |", "|---|---|---|", *lines])


def test_the_table_of_faults_is_what_the_rows_say() -> None:
    page = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    table = page.split("<!-- faults -->\n")[1].split("\n<!-- /faults -->")[0]
    assert table == faults_table(ROOT / "benchmarks" / "results" / "slurm_faults.csv")
