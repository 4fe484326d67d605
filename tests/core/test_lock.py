"""One run folder, one writer: what real processes leave behind, and what the next one makes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phi4r.core import lock
from phi4r.core.errors import UserError
from phi4r.core.lock import run_lock

HOLD = """
import sys, time
from phi4r.core import lock
lock.REFRESH_S = 0.1
with lock.run_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
DEADLINE_S = 60


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "PHI4R_"))]:
        monkeypatch.delenv(name)


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def rewrite(path: Path, **changes: object) -> None:
    """Change the owner's record in place."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_second_process_is_told_who_writes_there(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        with (
            pytest.raises(UserError, match=f"process {process.pid} on .* is writing there"),
            run_lock(tmp_path),
        ):
            pass
    finally:
        process.kill()
        process.communicate()


def test_a_killed_owner_is_replaced_with_a_word_about_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with run_lock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert f"process {process.pid}" in capfd.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_process_id_that_was_given_out_again_is_not_the_owner(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.kill()
    process.communicate()
    rewrite(tmp_path / "lock.json", pid=os.getpid())
    with run_lock(tmp_path):
        pass


def test_an_owner_on_another_machine_lives_while_it_refreshes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "LEASE_S", 3.0)
    process = holder(tmp_path)
    rewrite(tmp_path / "lock.json", machine="another")
    with pytest.raises(UserError, match="is writing there"), run_lock(tmp_path):
        pass
    process.kill()
    process.communicate()
    with run_lock(tmp_path):
        pass


def test_a_later_start_takes_over_and_the_earlier_ends_without_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    process = holder(tmp_path)
    with pytest.raises(UserError, match="SLURM job 17"), run_lock(tmp_path):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with run_lock(tmp_path):
        _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == lock.EXIT_CODE
    assert "ending without saving" in said


def test_an_empty_lock_of_a_writer_that_died_at_once_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "LEASE_S", 1.0)
    (tmp_path / "lock.json").touch()
    began = time.monotonic()
    with run_lock(tmp_path):
        assert time.monotonic() - began > 1.0


def test_ranks_that_are_not_the_writer_hold_nothing(tmp_path: Path) -> None:
    with run_lock(tmp_path / "run", is_writer=False):
        assert not (tmp_path / "run").exists()
