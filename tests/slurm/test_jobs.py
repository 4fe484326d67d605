"""The job scripts on a real SLURM with the real trainer: what goes wrong ends in a resumed run or a clear
error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT, SFT, Fault, Site, history, rank_pid, rows, step, story, wait_in_run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

WAIT_S = 420.0
STEPS = 100
TWO = [*SFT, "--train.num_steps", STEPS, "--parallel.dp", "2"]
FOUR = [*TWO, "--parallel.tp", "2"]


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Site:
    return Site(cluster, tmp_path / "site")


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two-rank run, done without SLURM."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    Site(cluster, folder / "site").run("sft", *TWO, "--run-dir", folder / "run")
    return folder / "run"


def wait_for_step(site: Site, run: Path, number: int) -> None:
    wait_in_run(site, run, f"step {number}", lambda: step(run) >= number, WAIT_S)


def test_two_nodes_save_before_the_limit_requeue_and_resume_bit_for_bit(site: Site) -> None:
    run, whole = site.folder / "run", site.folder / "whole"
    job = site.launch("sft", *FOUR, "--nodes", 2, "--run-dir", run)
    wait_for_step(site, run, 13)
    fault = Fault(run, "signal before the time limit")
    site.cluster.run("scancel", "--batch", "--signal=USR2", job)  # what --signal sends before the time limit
    fault.wait_for_steps(site, WAIT_S)
    ended = site.cluster.wait(job, seconds=WAIT_S)
    assert (ended["JobState"], ended["Restarts"], ended["NumNodes"]) == ("COMPLETED", "1", "2"), story(run)
    assert [how for how, _ in history(run)] == ["stopped", "requeued", "finished"], story(run)
    site.run("sft", *FOUR, "--run-dir", whole)
    assert rows(run) == rows(whole)
    restarts = [
        json.loads(line)["slurm_restarts"] for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert set(restarts) == {0, 1}
    assert restarts == sorted(restarts)
    known = json.loads(site.phi4r("status", run, "--json"))
    assert known["state"] == "COMPLETED"
    assert (known["step"], known["num_steps"], known["restarts"]) == (STEPS, STEPS, 1)
    assert known["last_end"] == "finished"
    assert f"{STEPS}/{STEPS}" in site.phi4r("logs", run, "-f")
    assert "Traceback" not in site.phi4r("logs", run, "--rank", 3)
    assert "requeued" in site.phi4r("logs", run, "--job")


def test_a_requeue_in_mid_step_resumes_bit_for_bit(site: Site, uninterrupted: Path) -> None:
    run = site.folder / "run"
    job = site.launch("sft", *TWO, "--nodes", 2, "--run-dir", run)
    wait_for_step(site, run, 13)
    fault = Fault(run, "scontrol requeue in mid-step")
    site.cluster.run("scontrol", "requeue", job)
    fault.wait_for_steps(site, WAIT_S)
    ended = site.cluster.wait(job, seconds=WAIT_S)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), story(run)
    assert rows(run) == rows(uninterrupted)


def test_a_preempted_job_saves_requeues_and_resumes_bit_for_bit(site: Site, uninterrupted: Path) -> None:
    run, cluster = site.folder / "run", site.cluster
    job = site.launch("sft", *TWO, "--nodes", 2, "--run-dir", run)
    wait_for_step(site, run, 13)
    fault = Fault(run, "preempted by a job of higher priority")
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null",
        "--wrap=sleep 1",
    )  # fmt: skip
    fault.wait_for_steps(site, WAIT_S)
    assert cluster.wait(int(urgent))["JobState"] == "COMPLETED"
    ended = cluster.wait(job, seconds=WAIT_S)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), story(run)
    assert history(run)[0] == ("stopped", "saved after a signal (time limit or preemption)"), story(run)
    assert rows(run) == rows(uninterrupted)


def test_a_killed_rank_is_named_and_the_run_goes_on_in_the_same_allocation(
    site: Site, uninterrupted: Path
) -> None:
    run = site.folder / "run"
    job = site.launch("sft", *TWO, "--nodes", 2, "--run-dir", run)
    wait_for_step(site, run, 13)
    fault = Fault(run, "a rank killed")
    os.kill(rank_pid(run, 1), signal.SIGKILL)
    fault.wait_for_steps(site, WAIT_S)
    ended = site.cluster.wait(job, seconds=WAIT_S)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), story(run)
    (how, why), *_ = history(run)
    assert how == "lost"
    assert "task 1: Killed" in why
    assert rows(run) == rows(uninterrupted)


def test_a_node_that_dies_is_replaced(site: Site, uninterrupted: Path) -> None:
    run, cluster = site.folder / "run", site.cluster
    job = site.launch("sft", *TWO, "--nodes", 2, "--run-dir", run)
    wait_for_step(site, run, 13)
    node = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()[1]
    fault = Fault(run, "a node dead: slurmd, step daemon and rank killed")
    cluster.crash_node(node)
    try:
        fault.wait_for_steps(site, WAIT_S)
        ended = cluster.wait(job, seconds=WAIT_S)
        assert ended["JobState"] == "COMPLETED", story(run)
        assert int(ended["Restarts"]) >= 1
        nodes = cluster.run("scontrol", "show", "hostnames", ended["NodeList"]).split()
        assert node not in nodes
        assert rows(run) == rows(uninterrupted)
    finally:
        cluster.start_node(node)
        cluster.wait_for(f"{node} to be idle", lambda: cluster.states()[node] == "idle")


def test_a_hung_rank_and_a_failing_rank_end_their_jobs_with_their_names(site: Site) -> None:
    hung, failing = site.folder / "hung", site.folder / "failing"
    no_restarts = {"PHI4R_MAX_RESTARTS": "0"}
    words = [*SFT, "--train.num_steps", 2000, "--parallel.dp", "2", "--parallel.timeout_s", 60, "--nodes", 2]
    hung_job = site.launch("sft", *words, "--run-dir", hung, **no_restarts)
    failing_job = site.launch("sft", *words, "--run-dir", failing)
    wait_for_step(site, hung, 3)
    hang = Fault(hung, "a rank hangs (parallel.timeout_s = 60)")
    os.kill(rank_pid(hung, 1), signal.SIGALRM)
    wait_for_step(site, failing, 3)
    failure = Fault(failing, "a rank raises an exception")
    os.kill(rank_pid(failing, 1), signal.SIGUSR1)

    ended = site.cluster.wait(failing_job, seconds=WAIT_S)
    failure.note("job failed with that rank's error")
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), story(failing)
    ((how, why),) = history(failing)  # one attempt: an exception is not tried again
    assert how == "failed"
    assert why.startswith("rank 1 on 127.0.0.")
    assert why.endswith("RuntimeError: planted error")

    ended = site.cluster.wait(hung_job, seconds=WAIT_S)
    hang.note("job failed naming the rank (PHI4R_MAX_RESTARTS = 0)")
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), story(hung)
    (how, why), (end, _) = history(hung)
    assert (how, end) == ("hung", "gave up")
    assert why.startswith("rank 1 on 127.0.0.")
    assert "planted_hang" in why
    stacks = sorted((hung / "logs" / "latest").glob("stack_*"))
    assert "planted_hang" in stacks[1].read_text()
    assert site.phi4r("status", hung).count("planted_hang") == 1


def test_scancel_is_final_and_a_run_folder_has_one_job(site: Site) -> None:
    run, cluster = site.folder / "run", site.cluster
    job = site.launch("sft", *SFT, "--run-dir", run)
    wait_in_run(site, run, "the rank", lambda: list(run.glob("logs/latest/heartbeat_*")), WAIT_S)
    with pytest.raises(AssertionError, match=f"job {job} .* has this run folder"):
        site.launch("sft", *SFT, "--run-dir", run)
    listed = json.loads(site.phi4r("status", "--json"))
    assert [(entry["job"], entry["state"], entry["run"]) for entry in listed] == [
        (str(job), "RUNNING", str(run))
    ]
    assert "phi4r-sft" in site.phi4r("status")
    cluster.run("scancel", job)
    cluster.wait(job, {"CANCELLED"})
    time.sleep(8)  # longer than a requeued job waits
    ended = cluster.job(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), story(run)


def test_a_node_with_busy_gpus_is_left_out(site: Site) -> None:
    run, cluster = site.folder / "run", site.cluster
    (site.folder / "busy").write_text("127.0.0.1")
    job = site.launch("sft", *SFT, "--run-dir", run)
    again = f"logs/{job}.1.0/heartbeat_*"
    wait_in_run(site, run, "a rank on another node", lambda: list(run.glob(again)), WAIT_S)
    ended = cluster.job(job)
    cluster.run("scancel", job)
    assert ended["ExcNodeList"] == "127.0.0.1"
    assert ended["NodeList"] != "127.0.0.1"
    how, why = history(run)[0]
    assert how == "bad node"
    assert why.endswith("127.0.0.1: not idle: GPU 0 (70000 MiB in use)"), why


def test_a_lost_run_folder_ends_the_job_and_is_not_made_anew(site: Site) -> None:
    run = site.folder / "run"
    job = site.launch("sft", *SFT, "--train.num_steps", 5000, "--run-dir", run)
    wait_for_step(site, run, 3)
    fault = Fault(run, "the run folder is gone")
    run.rename(site.folder / "elsewhere")
    ended = site.cluster.wait(job, seconds=WAIT_S)
    fault.note("job failed saying so")
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), story(site.folder / "elsewhere")
    (log,) = (site.folder / "elsewhere" / "logs").glob("job-*.out")
    assert f"the run folder {run} is lost" in log.read_text()
    assert not run.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True, timeout=60)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=60)


def free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def test_a_full_disk_is_found_by_the_check_or_ends_the_job_with_its_reason(
    site: Site, small_disk: Path
) -> None:
    checked, trained = small_disk / "checked", small_disk / "trained"
    job = site.launch("sft", *SFT, "--run-dir", checked)
    assert site.cluster.wait(job, seconds=WAIT_S)["JobState"] == "FAILED", story(checked)
    ((how, why),) = history(checked)
    assert how == "failed"
    assert "GiB free, and 0.01 are asked for (PHI4R_FREE_GIB)" in why
    with open(site.folder / "site.sh", "a") as file:
        file.write("export PHI4R_FREE_GIB=0\n")
    job = site.launch("sft", *SFT, "--run-dir", trained)
    wait_in_run(site, trained, "the rank", lambda: list(trained.glob("logs/latest/heartbeat_*")), WAIT_S)
    fault = Fault(trained, "the disk of the run folder is full")
    (small_disk / "other").write_bytes(bytes(free_bytes(small_disk)))  # somebody else's file
    ended = site.cluster.wait(job, seconds=WAIT_S)
    fault.note("job failed saying so, and phi4r status shows it")
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), story(trained)
    known = json.loads(site.phi4r("status", trained, "--json"))
    assert known["last_end"] == "failed", known
    # A rank's own error where there was room for it, else what the job script found.
    assert "No space left on device" in known["last_end_why"] or "is full" in known["last_end_why"], known


def test_a_recipe_that_cannot_fit_is_refused_before_submission(site: Site) -> None:
    layout = [
        "--parallel.tp",
        1,
        "--parallel.pp",
        1,
        "--parallel.cp",
        1,
        "--parallel.dp",
        8,
        "--parallel.sp",
        "false",
    ]
    with pytest.raises(AssertionError, match=r"does not fit: .* GiB per GPU, .* GiB too much"):
        site.launch("sft", "phi4_sft", *layout, "--run-dir", site.folder / "run")
    with pytest.raises(AssertionError, match="32 ranks, which do not spread evenly over --nodes 5"):
        site.launch("sft", "phi4_sft", "--nodes", 5, "--run-dir", site.folder / "run")
    with pytest.raises(AssertionError, match=r"More processors requested|not available|CPU count"):
        site.launch(
            "sft", "phi4_sft", "--nodes", 4, "--run-dir", site.folder / "run"
        )  # 8 GPUs a node; we have 4
    assert not site.cluster.run("squeue", "-h")
    assert not (site.folder / "run").exists()


def test_sft_rl_and_evaluation_run_as_a_chain_and_a_job_array_merges(site: Site) -> None:
    pipeline, cluster = site.folder / "pipeline", site.cluster
    recipe = site.folder / "recipe.toml"
    recipe.write_text(RECIPE)
    text = cluster.run(
        ROOT / "launch" / "pipeline.sh", recipe, recipe, "modchain", pipeline, 1, "--time", 60,
        "--sbatch", "--cpus-per-task=1", cwd=site.folder, **site.variables(),
    )  # fmt: skip
    ids = [int(word) for word in text.splitlines()[0].split() if word.isdigit()]
    assert len(ids) == 3
    for job, name in zip(ids, ("sft", "rl", "eval"), strict=True):
        assert cluster.wait(job, seconds=WAIT_S)["JobState"] == "COMPLETED", story(pipeline / name)
    summary = json.loads((pipeline / "eval" / "summary.json").read_text())
    assert summary["compare"]["checkpoint"] == str(pipeline / "sft")

    words = [pipeline / "rl", "modchain", "--recipe", recipe]
    merge = site.launch("eval", *words, "--runs", 2, "--array", 2, "--run-dir", site.folder / "array")
    site.run("eval", *words, "--runs", 4, "--run-dir", site.folder / "one")
    assert cluster.wait(merge, seconds=WAIT_S)["JobState"] == "COMPLETED", story(
        site.folder / "array/part_0000"
    )
    for name in ("results.jsonl", "summary.json"):
        assert (site.folder / "array" / name).read_text() == (site.folder / "one" / name).read_text()


RECIPE = """
[model]
preset = "tiny"
hidden_size = 32
num_layers = 2
ffn_hidden_size = 64
head_dim = 8

[data]
num_generated = 200
heldout = 0
seq_length = 64

[sft.train]
num_steps = 20
eval_every = 0

[rl.train]
num_steps = 2

[rl.problems]
num_generated = 16

[rollout]
prompts_per_step = 4
group_size = 4

[sampling]
max_new_tokens = 8

[eval.eval]
runs = 2
num_problems = 8
bootstrap = 200
"""
