"""A heterogeneous job on a real SLURM: the trainer on one node, a real vLLM server (on CPU) on another."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from phi4r.core import optional
from phi4r.core.errors import UserError
from phi4r.sampling.vllm.registry import Announcement, Registry
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Site, history, rank_pid, story, wait_in_run

pytestmark = [pytest.mark.slurm, pytest.mark.vllm, pytest.mark.timeout(1500)]

WAIT_S = 600.0
STEPS = 20
RL = [
    "tiny", "--model.num_layers", "2", "--problems.num_generated", "16", "--rollout.prompts_per_step", "4",
    "--rollout.group_size", "4", "--sampling.max_new_tokens", "8", "--vllm.start_timeout_s", "400",
    "--parallel.threads", "1",
]  # fmt: skip
# What the trainer asks of a server besides answers; vLLM's own check of the key leaves most of them open.
ENDPOINTS = (
    "/inference/v1/generate", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version",
    "/weight_checker", "/v1/models", "/metrics", "/version",
)  # fmt: skip


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Site:
    try:
        python = optional.vllm_python()
    except UserError as error:
        pytest.skip(str(error))
    made = Site(cluster, tmp_path / "site")
    with open(made.folder / "site.sh", "a", encoding="utf-8") as file:
        file.write(f"export {optional.VLLM_PYTHON}={python}\n")
    return made


def servers_of(
    site: Site, run: Path, number: int = 1, other_than: str = ""
) -> tuple[list[Announcement], str]:
    """The `number` servers that the trainer of a run uses, and their key, which is not `other_than`."""
    registry, found = Registry(run / "servers"), list[Announcement]()

    def are_there() -> bool:
        order = registry.order()
        found[:] = registry.announcements(order.session) if order else []
        return len(found) == number and registry.key() != other_than

    wait_in_run(site, run, f"{number} vLLM server(s)", are_there, WAIT_S)
    return found, registry.key()


def statuses(url: str, key: str) -> dict[str, int]:
    """HTTP status of each endpoint to who says `key`."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(headers=headers, trust_env=False, timeout=60) as http:
        return {path: http.get(url + path).status_code for path in ENDPOINTS}


def command_lines() -> str:
    """What `ps` shows of every process."""
    lines = []
    for process in psutil.process_iter():
        try:
            lines.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return "\n".join(lines)


def is_served(run: Path) -> bool:
    """Whether a vLLM server with weights of the run is there."""
    return str(run / "weights") in command_lines()


def test_trainer_and_vllm_nodes_in_one_job_save_requeue_and_go_on(site: Site) -> None:
    run, cluster = site.folder / "run", site.cluster
    steps = ("--train.num_steps", STEPS, "--checkpoint.every", 10)
    job = site.launch("rl", *RL, *steps, "--rollout-nodes", 1, "--run-dir", run)
    (server,), key = servers_of(site, run)
    seen = command_lines()
    assert "phi4r_guard.Guard" in seen, story(run)  # the server's command line is among them
    shown = cluster.run("scontrol", "show", "job", job) + cluster.run("squeue", "-o", "%all")
    assert key not in seen + shown
    assert server.node == "127.0.0.2"
    assert set(statuses(server.url, "").values()) == {401}
    assert set(statuses(server.url, "wrong").values()) == {401}
    assert 401 not in statuses(server.url, key).values()
    assert [entry["job"] for entry in json.loads(site.phi4r("status", "--json"))] == [str(job)]

    wait_in_run(site, run, "a step", lambda: list((run / "rollouts").glob("step_000001*")), WAIT_S)
    cluster.run("scancel", "--batch", "--signal=USR2", job)  # what --signal sends before the time limit
    wait_in_run(site, run, "the requeue", lambda: "requeued" in dict(history(run)), WAIT_S)
    cluster.wait_for("the end of the server", lambda: not is_served(run))
    _, new_key = servers_of(site, run, other_than=key)
    cluster.wait(job, seconds=WAIT_S)
    for component in (job, job + 1):
        ended = cluster.job(component)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), story(run)
    assert [how for how, _ in history(run)] == ["stopped", "requeued", "finished"]

    for step in range(1, STEPS + 1):
        (path,) = (run / "rollouts").glob(f"step_{step:06d}*")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(samples) == 16
        assert {sample["policy_version"] for sample in samples} == {step - 1}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["rollout_servers"], row["rollout_failures"]) for row in metrics] == [
        (step, 1, 0) for step in range(1, STEPS + 1)
    ]
    assert not list((run / "servers").glob("server_*.json"))
    assert not is_served(run)
    logs = [path for path in run.rglob("*") if path.is_file() and path.name != "key"]
    contents = {path: path.read_bytes() for path in logs}
    assert not [path for path, text in contents.items() if key.encode() in text or new_key.encode() in text]


def test_a_killed_rank_restarts_with_new_servers_and_scancel_ends_them(site: Site) -> None:
    run, cluster = site.folder / "run", site.cluster
    steps = ("--train.num_steps", 4000, "--checkpoint.every", 1)
    job = site.launch("rl", *RL, *steps, "--vllm.transfer", "gloo", "--rollout-nodes", 2, "--run-dir", run)
    servers, key = servers_of(site, run, 2)
    assert sorted(server.node for server in servers) == ["127.0.0.2", "127.0.0.3"]
    wait_in_run(site, run, "a checkpoint", lambda: list((run / "checkpoints").glob("step_*")), WAIT_S)
    os.kill(rank_pid(run, 0), signal.SIGKILL)
    servers_of(site, run, 2, other_than=key)
    again = f"logs/{job}.0.1/rank_00000.log"
    wait_in_run(site, run, "a step", lambda: re.search(r"^rl \d+/", (run / again).read_text(), re.M), WAIT_S)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["rollout_servers"], last["rollout_failures"]) == (2, 0)
    ((how, why),) = history(run)
    assert (how, "task 0: Killed" in why) == ("lost", True), why
    cluster.run("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED", story(run)
    cluster.wait_for("the end of the servers", lambda: not is_served(run), 60)
