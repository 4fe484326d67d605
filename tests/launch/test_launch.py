"""The launcher with real processes: what every rank is given, who owns the error, and that nobody is left
behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi4r.configs.sections import OptimizerConfig, ParallelConfig
from phi4r.configs.stages import SFTConfig
from phi4r.core.errors import UserError
from phi4r.parallel import launch
from phi4r.parallel.launch import RankError, external_rank, run_handler, run_ranks

ROOT = Path(__file__).resolve().parents[2]
TARGETS = "tests.launch.targets"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a rank of anybody, and the children find the tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie that nobody has waited for does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for a condition, with a deadline."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def pids_in(folder: Path, *names: str) -> list[int]:
    return [int((folder / name).read_text()) for name in names]


def start_driver(target: str, folder: Path, *files: str) -> subprocess.Popen[str]:
    """A parent process with two ranks that have left `files`."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.launch.driver", target, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: all((folder / name).exists() and (folder / name).read_text() for name in files))
    return driver


def test_ranks_get_their_place_and_rank_0_has_the_console(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = run_ranks(f"{TARGETS}:report", {"folder": str(tmp_path)}, 3, tmp_path, threads=2)
    assert result == {"from": 0}
    seen = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(3)]
    assert [(s["RANK"], s["LOCAL_RANK"]) for s in seen] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert {(s["WORLD_SIZE"], s["MASTER_ADDR"], s["OMP_NUM_THREADS"]) for s in seen} == {
        ("3", "127.0.0.1", "2")
    }
    assert len({s["MASTER_PORT"] for s in seen}) == 1
    assert capfd.readouterr().out == "hello from rank 0\n"
    logs = [(tmp_path / "logs" / f"rank_{rank:05d}.log").read_text() for rank in (1, 2)]
    assert logs == ["hello from rank 1\n", "hello from rank 2\n"]


def test_one_rank_runs_in_this_process_and_leaves_the_environment(tmp_path: Path) -> None:
    before = dict(os.environ)
    assert run_ranks(f"{TARGETS}:report", {"folder": str(tmp_path)}, 1) == {"from": 0}
    assert {name for name in os.environ if name not in before} <= {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}


def test_a_crash_ends_the_others_and_is_the_jobs_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RankError, match="ZeroDivisionError") as caught:
        run_ranks(f"{TARGETS}:divide_on_rank_1", {"folder": str(tmp_path)}, 2, tmp_path)
    assert caught.value.rank == 1
    assert "rank_00001.log" in str(caught.value)
    assert "ZeroDivisionError" in (tmp_path / "logs" / "rank_00001.log").read_text()
    assert "Traceback" not in capfd.readouterr().err  # the caller prints it, once
    assert not any(map(is_alive, pids_in(tmp_path, "pid_0", "pid_1")))


def test_a_user_error_of_any_rank_is_the_jobs_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data.jsonl:7: expected a messages list$"):
        run_ranks(f"{TARGETS}:user_error_on_rank_1", {"folder": str(tmp_path)}, 2, tmp_path)


def test_a_rank_that_was_killed_is_blamed_and_not_the_one_that_noticed(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="killed by SIGKILL") as caught:
        run_ranks(f"{TARGETS}:killed_on_rank_1", {"folder": str(tmp_path)}, 2, tmp_path)
    assert caught.value.rank == 1


def test_the_cause_is_reported_and_not_its_consequence(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="the cause") as caught:
        run_ranks(f"{TARGETS}:consequence_on_rank_0", {"folder": str(tmp_path)}, 2, tmp_path)
    assert caught.value.rank == 1


def test_a_rank_that_does_not_end_when_asked_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.5)
    with pytest.raises(RankError, match="had enough"):
        run_ranks(f"{TARGETS}:ignore_sigterm", {"folder": str(tmp_path)}, 2, tmp_path)
    assert not is_alive(pids_in(tmp_path, "pid_0")[0])


def test_ranks_that_do_not_start_in_time_are_named(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank\(s\) 0, 1 did not start within 2 s"):
        run_ranks("tests.launch.slow_import:never", {}, 2, tmp_path, timeout_s=2)


def test_a_parent_killed_with_9_leaves_no_orphans(tmp_path: Path) -> None:
    names = ("pid_0", "pid_1", "child_0", "child_1")
    driver = start_driver("sleep_with_a_child", tmp_path, *names)
    pids = pids_in(tmp_path, *names)
    assert all(map(is_alive, pids))
    driver.kill()
    driver.wait()
    wait_until(lambda: not any(map(is_alive, pids)), 20)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_every_rank_and_they_may_save(tmp_path: Path, number: int, code: int) -> None:
    driver = start_driver("save_when_interrupted", tmp_path, "pid_0", "pid_1")
    driver.send_signal(number)
    assert driver.wait(60) == code
    assert [(tmp_path / f"saved_{rank}").read_text() for rank in (0, 1)] == [str(int(number))] * 2
    assert not any(map(is_alive, pids_in(tmp_path, "pid_0", "pid_1")))


def test_a_process_started_by_torchrun_is_a_rank_and_starts_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="MASTER_PORT is not set"):
        run_ranks(f"{TARGETS}:report", {"folder": str(tmp_path)}, 2)
    monkeypatch.setenv("MASTER_PORT", "1")
    assert run_ranks(f"{TARGETS}:report", {"folder": str(tmp_path)}, 2) == {"from": 1}
    with pytest.raises(UserError, match=r"needs 4 ranks .* but 2 were started"):
        run_ranks(f"{TARGETS}:report", {"folder": str(tmp_path)}, 4)


def test_only_a_task_of_a_slurm_step_is_a_rank() -> None:
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert external_rank(batch_script) is None
    task = {"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    assert external_rank(task) == launch.ExternalRank(3, 8, 1)
    interactive_shell = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert external_rank(interactive_shell) is None


def test_configurations_and_paths_reach_the_ranks(tmp_path: Path) -> None:
    config = SFTConfig(optimizer=OptimizerConfig(lr=0.125))
    for layout in (ParallelConfig(), ParallelConfig(dp=2)):
        result = run_handler(
            f"{TARGETS}:handler", [config, tmp_path, layout], layout, tmp_path, {"extra": "x"}
        )
        assert result == {
            "types": ["SFTConfig", "ParallelConfig"],
            "is_path": True,
            "lr": 0.125,
            "extra": "x",
        }


def test_a_held_port_is_free_for_its_rank_and_for_nobody_else() -> None:
    holder = launch._hold_free_port()
    port = holder.getsockname()[1]
    others = [launch._hold_free_port() for _ in range(50)]
    assert port not in [other.getsockname()[1] for other in others]
    server = socket.create_server(("127.0.0.1", port))  # what rank 0 does
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("127.0.0.1", port))
    for opened in (holder, server, *others):
        opened.close()


@pytest.mark.multiprocess
def test_jobs_that_start_at_the_same_moment_do_not_meet(tmp_path: Path) -> None:
    results: dict[int, Any] = {}

    def start(number: int) -> None:
        results[number] = run_ranks(f"{TARGETS}:all_reduce", {}, 2, tmp_path / str(number))

    jobs = [threading.Thread(target=start, args=(number,)) for number in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert results == {0: 3.0, 1: 3.0}
