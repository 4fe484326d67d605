"""The keeper ends a server when phi4r ends, however that is, and with it all that the server started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from phi4r.sampling.vllm import keeper

# A server that starts a child of its own, says both ids, and waits.
SERVER = (
    "import subprocess, sys, time, os\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(os.getpid(), child.pid, flush=True)\n"
    "time.sleep(600)\n"
)
# What phi4r does: make the pipe, start the keeper in a group of its own, go on with other things.
OWNER = (
    "import os, subprocess, sys, time\n"
    "theirs, ours = os.pipe()\n"
    "subprocess.Popen([sys.executable, {keeper!r}, str(theirs), sys.executable, '-c', {server!r}],\n"
    "                 pass_fds=[theirs], process_group=0)\n"
    "os.close(theirs)\n"
    "time.sleep(600)\n"
)


def ended(processes: list[psutil.Process], seconds: float) -> bool:
    """Whether all processes end in time. Nobody may be there to reap them: a zombie has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("killed", ["owner", "server"])
def test_nothing_is_left_when_the_owner_or_the_server_is_killed(killed: str) -> None:
    code = OWNER.format(keeper=keeper.__file__, server=SERVER)
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    server, child = map(int, owner.stdout.readline().split())
    processes = [psutil.Process(server), psutil.Process(child), *psutil.Process(owner.pid).children()]
    time.sleep(0.2)
    assert all(process.is_running() for process in processes)
    os.kill(owner.pid if killed == "owner" else server, signal.SIGKILL)
    assert ended(processes, 20)
    owner.kill()
    owner.wait()
    owner.stdout.close()
