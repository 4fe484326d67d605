"""The policy of a job, verdict by verdict, on folders as ranks leave them."""

from __future__ import annotations

import ast
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi4r.slurm import supervise
from phi4r.slurm.supervise import Verdict, count_restart, describe_hang, job_words, judge, next_move

COLLECTIVE = (
    '  File "/env/torch/distributed/distributed_c10d.py", line 9 in all_reduce\n  File "/x.py", line 1 in f\n'
)
PIPELINE = '  File "/env/megatron/core/pipeline_parallel/p2p_communication.py", line 3 in recv\n'
LOADER = '  File "/home/data.py", line 7 in read\n  File "/env/torch/distributed/x.py", line 9 in outer\n'
OTHER_THREAD = 'Thread 0x2 (most recent call first):\n  File "/env/threading.py", line 5 in wait\n\n'


def rank(folder: Path, number: int, stack: str | None, silent_s: float = 100, limit_s: int = 60) -> None:
    """A rank's heartbeat, last touched `silent_s` ago, and its stack (None: it has left none)."""
    beat = folder / f"heartbeat_{number:05d}"
    beat.write_text(f"{limit_s} {1000 + number} 3 n{number}\n")
    (folder / "now").touch()
    then = (folder / "now").stat().st_mtime - silent_s
    os.utime(beat, (then, then))
    text = f"Timeout!\n{OTHER_THREAD}Thread 0x1 (most recent call first):\n{stack}" if stack else ""
    (folder / f"stack_{number:05d}").write_text(text)


def error(folder: Path, number: int, kind: str, when: float, text: str) -> None:
    (folder / f"error_{number:05d}").write_text(f"{kind} {when} {number} n{number}\n{text}\nTraceback ...\n")


# --- why an attempt ended


def test_finished_and_stopped_are_what_rank_0_says(tmp_path: Path) -> None:
    (tmp_path / "stopped").touch()
    error(tmp_path, 1, "peer", 1.0, "connection closed")
    assert judge(tmp_path, 1).how == "stopped"
    (tmp_path / "finished").touch()
    assert judge(tmp_path, 143) == Verdict("finished", "all steps are done")


def test_the_first_error_of_a_ranks_own_is_the_reason(tmp_path: Path) -> None:
    error(tmp_path, 0, "peer", 1.0, "DistBackendError: gone")
    error(tmp_path, 2, "error", 3.0, "ValueError: later")
    error(tmp_path, 3, "user", 2.0, "data.path: no such file")
    error(tmp_path, 4, "error", 4.0, "ValueError: last")
    (tmp_path / "error_00001").write_text("error 1.5")  # cut off
    assert judge(tmp_path, 1) == Verdict("failed", "rank 3 on n3: data.path: no such file")


def test_a_rank_that_srun_reports_dead_is_lost(tmp_path: Path) -> None:
    (tmp_path / "srun.err").write_text(
        "srun: error: n0: task 0: Exited with exit code 1\nsrun: error: n1: task 1: Killed\n"
        "srun: launch/slurm: _step_signal: Terminating StepId=7.0\n"
    )
    error(tmp_path, 0, "peer", 1.0, "Connection closed by peer")
    assert judge(tmp_path, 143) == Verdict("lost", "n1: task 1: Killed")


def test_an_error_about_another_rank_alone_is_a_loss(tmp_path: Path) -> None:
    error(tmp_path, 4, "peer", 1.0, "Connection reset by peer")
    assert judge(tmp_path, 1) == Verdict("lost", "Connection reset by peer (error_00004)")


def test_without_any_report_the_last_words_printed_are_the_reason(tmp_path: Path) -> None:
    (tmp_path / "srun.err").write_text("srun: a\nsrun: error: node failure\n")
    why = f"srun: error: node failure (exit code 1; logs in {tmp_path})"
    assert judge(tmp_path, 1) == Verdict("lost", why)
    (tmp_path / "rank_00000.log").write_text("Traceback\nImportError: no phi4r\n")
    assert judge(tmp_path, 1).why == f"ImportError: no phi4r (exit code 1; logs in {tmp_path})"
    for name in ("srun.err", "rank_00000.log"):
        (tmp_path / name).unlink()
    assert judge(tmp_path, 9).why == f"(exit code 9; logs in {tmp_path})"


@pytest.fixture
def no_room() -> Iterator[None]:
    """No file may grow beyond 64 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("no_room")
def test_a_full_disk_fails_unless_a_rank_could_say_why(tmp_path: Path) -> None:
    (tmp_path / "hung").write_text("rank 1 hangs")
    verdict = judge(tmp_path, 1)
    assert verdict.how == "failed"
    assert "is full: " in verdict.why
    error(tmp_path, 1, "error", 1.0, "OSError: no space")
    assert judge(tmp_path, 1).why == "rank 1 on n1: OSError: no space"


def test_what_the_watch_found_is_the_reason_of_a_hang(tmp_path: Path) -> None:
    (tmp_path / "hung").write_text("rank 1 hangs\n")
    (tmp_path / "srun.err").write_text("srun: error: n1: task 1: Killed\n")
    assert judge(tmp_path, 137) == Verdict("hung", "rank 1 hangs")


def test_stacks_without_a_death_are_a_hang(tmp_path: Path) -> None:
    rank(tmp_path, 0, LOADER)
    assert judge(tmp_path, 1).how == "hung"


# --- which rank hangs


def test_ranks_that_wait_in_a_collective_are_not_the_hung_one(tmp_path: Path) -> None:
    rank(tmp_path, 0, COLLECTIVE)
    rank(tmp_path, 1, LOADER)
    rank(tmp_path, 2, PIPELINE)
    assert describe_hang(tmp_path) == (
        'rank 1 on n1 is at File "/home/data.py", line 7 in read'
        f" (no sign of life for 60 s; waiting for it: rank 0 2; stacks in {tmp_path})"
    )


def test_a_rank_that_waits_since_later_is_not_the_hung_one(tmp_path: Path) -> None:
    rank(tmp_path, 0, None, silent_s=55)  # its watchdog writes the stack in 5 s
    rank(tmp_path, 1, LOADER)
    assert "rank 0" not in describe_hang(tmp_path)


def test_a_silent_rank_without_a_stack_is_named(tmp_path: Path) -> None:
    rank(tmp_path, 0, COLLECTIVE)
    rank(tmp_path, 1, None)
    assert describe_hang(tmp_path).startswith("rank 1 on n1 left no stack (stopped, or in the kernel)")


def test_ranks_that_all_wait_are_said_to(tmp_path: Path) -> None:
    for number in range(2):
        rank(tmp_path, number, COLLECTIVE)
    assert describe_hang(tmp_path).startswith("all ranks wait for each other (no sign of life for 60 s")


@pytest.mark.parametrize(
    ("silent_s", "limit_s", "hangs"), [(59, 60, False), (61, 60, False), (63, 60, True), (9999, 0, False)]
)
def test_a_rank_is_silent_beyond_its_own_limit(
    tmp_path: Path, silent_s: float, limit_s: int, hangs: bool
) -> None:
    rank(tmp_path, 5, None, silent_s, limit_s)
    (beat,) = supervise.read_heartbeats(tmp_path)
    assert (beat.rank, beat.step_id, beat.node) == (5, "3", "n5")
    assert supervise.is_silent(beat) is hangs


# --- what is done about it


@pytest.mark.parametrize(
    ("how", "state", "signalled", "move"),
    [
        ("finished", "RUNNING", True, "done"),
        ("finished", "COMPLETING", False, "done"),
        ("failed", "RUNNING", True, "fail"),
        ("hung", "RUNNING", False, "restart"),
        ("lost", "RUNNING", False, "restart"),
        ("lost", "RUNNING", True, "requeue"),
        ("hung", "RUNNING", True, "requeue"),
        ("stopped", "RUNNING", False, "requeue"),
        ("stopped", "COMPLETING", True, "leave"),
        ("lost", "CANCELLED", False, "leave"),
        ("lost", "gone", False, "leave"),
    ],
)
def test_the_next_move_follows_from_verdict_state_and_signals(
    how: str, state: str, signalled: bool, move: str
) -> None:
    assert next_move(how, state, signalled) == move


def test_restarts_count_while_no_new_checkpoint_appears(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    assert [count_restart(tmp_path) for _ in range(3)] == [0, 1, 2]
    (tmp_path / "checkpoints" / "step_000010").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_000009.partial").mkdir()
    assert supervise.progress(tmp_path) == 10
    assert [count_restart(tmp_path) for _ in range(2)] == [0, 1]
    (tmp_path / "slurm" / "restarts").write_text("1")  # cut off
    assert count_restart(tmp_path) == 0


# --- what the ranks are started with


def test_the_last_run_dir_counts() -> None:
    words = ["sft", "tiny", "--run-dir", "/a", "--seed", "1", "--run-dir=/b"]
    assert supervise.run_dir_of(words) == Path("/b")
    assert supervise.run_dir_of(["sft", "tiny", "--run-dir"]) is None


def test_an_array_task_evaluates_its_own_part() -> None:
    words, run = job_words(["eval", "c", "--run-dir", "/r"], Path("/r"), {"SLURM_ARRAY_TASK_ID": "7"})
    assert run == Path("/r/part_0007")
    assert words[-4:] == ["--run-dir", "/r/part_0007", "--eval.part", "7"]


def test_the_trainer_of_two_components_is_told_of_its_servers() -> None:
    env = {"SLURM_HET_SIZE": "2", "SLURM_NTASKS_HET_GROUP_1": "16"}
    words, run = job_words(["rl", "phi4_grpo", "--run-dir", "/r"], Path("/r"), env)
    assert run == Path("/r")
    assert words[4:] == [
        "--sampling.engine",
        "vllm",
        "--vllm.num_servers",
        "16",
        "--vllm.registry",
        "/r/servers",
    ]
    assert job_words(["rl", "x"], run, {})[0] == ["rl", "x"]


def test_a_job_without_run_dir_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        supervise.main(["--mem=0", "--", "sft", "tiny"])
    assert ended.value.code == 2
    assert "--run-dir D is missing" in capsys.readouterr().err


def test_the_supervisor_needs_only_an_old_python_and_its_library() -> None:
    source = Path(supervise.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 9))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert imported <= set(sys.stdlib_module_names)
