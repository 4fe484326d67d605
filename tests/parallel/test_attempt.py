"""What a rank tells its job script: beats, its end, its error, and the stacks of a hang."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phi4r.core.errors import UserError
from phi4r.parallel import attempt as module
from phi4r.parallel.attempt import attempt, mark_stopped
from phi4r.parallel.heartbeat import beat


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHI4R_ATTEMPT_DIR", str(tmp_path))
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_rank_says_that_it_lives_and_nothing_after_its_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.0)
    began = time.time() - 1  # a file system's clock may be coarser
    with attempt(30):
        heartbeat = folder / "heartbeat_00003"
        assert heartbeat.read_text() == f"600 {os.getpid()} 7 n1\n"  # until the work begins
        beat()
        assert heartbeat.read_text() == f"30 {os.getpid()} 7 n1\n"
        os.utime(heartbeat, (0, 0))
        beat()
        assert heartbeat.stat().st_mtime >= began
        assert mark_stopped()
    beat()
    assert names(folder) == ["stack_00003"]  # rank 3 says neither stopped nor finished
    assert not mark_stopped()


def test_rank_0_says_that_the_command_is_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    with attempt(30):
        mark_stopped()
    assert names(folder) == ["finished", "stack_00000", "stopped"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("recipe.toml, line 3: no"), "user"),
        (ValueError("planted"), "error"),
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:5"), "peer"),
    ],
)
def test_an_error_is_reported_with_what_it_says_about_this_rank(
    folder: Path, error: Exception, kind: str
) -> None:
    with pytest.raises(type(error)), attempt(30):
        raise error
    head, what, *trace = (folder / "error_00003").read_text().splitlines()
    assert head.split()[0] == kind
    assert head.split()[2:] == ["3", "n1"]
    assert str(error) in what
    assert "Traceback" in trace[0]


def test_without_a_job_script_nothing_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PHI4R_ATTEMPT_DIR")
    with attempt(30):
        beat()
        assert not mark_stopped()
    assert names(folder) == []


def test_a_lost_folder_ends_the_rank_with_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.0)

    def lose_the_folder() -> None:
        with attempt(30):
            beat()
            (folder / "heartbeat_00003").unlink()
            beat()

    with pytest.raises(RuntimeError, match="the run folder is lost"):
        lose_the_folder()


def test_a_rank_that_hangs_leaves_its_stack(folder: Path) -> None:
    code = (
        "import time\nfrom phi4r.parallel.attempt import attempt\nfrom phi4r.parallel.heartbeat import beat\n"
        "def planted_hang():\n    time.sleep(600)\nwith attempt(1):\n    beat()\n    planted_hang()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        stack = folder / "stack_00003"
        until = time.monotonic() + 240
        while not (stack.exists() and "planted_hang" in stack.read_text()):
            assert time.monotonic() < until, "no stack was written"
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
