"""`phi4r serve` keeps a server up. What it starts here answers /health and nothing else; tests/slurm has
vLLM."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from phi4r.parallel.attempt import FOLDER
from phi4r.sampling.vllm.registry import Order, Registry

WAIT_S = 60.0
# Notes its start in RUN/started, is not healthy while RUN/sick is there, and ends where weights are "broken".
SERVER = """\
#!{python}
import http.server, os, sys
words = dict(zip(sys.argv, sys.argv[1:]))
weights = words["--model"]
with open("{folder}/started", "a") as file:
    file.write(f"{{os.getpid()}} {{weights}} {{os.environ['VLLM_API_KEY']}}\\n")
if weights == "broken":
    sys.exit("ValueError: broken weights")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(500 if os.path.exists("{folder}/sick") else 200)
        self.end_headers()
http.server.HTTPServer((words["--host"], int(words["--port"])), Handler).serve_forever()
"""
SERVE = """\
import sys
from pathlib import Path
from phi4r.configs.sections import VLLMConfig
from phi4r.sampling.vllm import serve
serve.HEALTH_EVERY_S = 0.1
config = VLLMConfig(python=sys.argv[1], max_restarts=int(sys.argv[2]), start_timeout_s=40)
serve.main(config, Path(sys.argv[3]), 0, "")
"""
Serve = Callable[[int], subprocess.Popen[bytes]]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts `phi4r serve` for the run folder `tmp_path`, with `max_restarts`."""
    for name in (FOLDER, "MASTER_ADDR", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    program = tmp_path / "python"
    program.write_text(SERVER.format(python=sys.executable, folder=tmp_path))
    program.chmod(0o755)
    made = []

    def start(max_restarts: int) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", SERVE, str(program), str(max_restarts), str(tmp_path)]
        with open(tmp_path / "said", "w") as log:
            made.append(subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT))
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.wait()


def ask(registry: Registry, session: str, weights: str) -> None:
    registry.publish(Order(session, weights, "float32", 64, True))


def starts(folder: Path) -> list[tuple[int, str, str]]:
    """(process id, weights, key) of every start."""
    path = folder / "started"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(line.split()[0]), line.split()[1], line.split()[2]) for line in lines]


def wait_for(what: str, condition: Callable[[], object]) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until, f"waited for {what}"
        time.sleep(0.05)


def test_a_server_is_kept_up_at_its_address_until_its_session_is_over(serve: Serve, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "servers")
    session, key = registry.begin()
    ask(registry, session, "v_0")
    service = serve(2)
    (found,) = asyncio.run(registry.wait_for_servers(session, 1, WAIT_S))
    assert starts(tmp_path) == [(starts(tmp_path)[0][0], "v_0", key)]

    ask(registry, session, "v_1")
    os.kill(starts(tmp_path)[0][0], signal.SIGKILL)
    wait_for("a start after its death", lambda: (tmp_path / "said").read_text().count(": healthy") == 2)
    (tmp_path / "sick").touch()
    ask(registry, session, "v_2")
    wait_for("a start after a sickness", lambda: len(starts(tmp_path)) == 3)
    (tmp_path / "sick").unlink()
    assert [start[1:] for start in starts(tmp_path)] == [("v_0", key), ("v_1", key), ("v_2", key)]
    port = found.url.rpartition(":")[2]
    wait_for("the server", lambda: psutil.pid_exists(starts(tmp_path)[-1][0]))
    assert port in psutil.Process(starts(tmp_path)[-1][0]).cmdline()
    assert registry.announcements(session) == [found]

    session, key = registry.begin()
    ask(registry, session, "w_0")
    asyncio.run(registry.wait_for_servers(session, 1, WAIT_S))
    assert starts(tmp_path)[3][1:] == ("w_0", key)
    assert not any(psutil.pid_exists(start[0]) for start in starts(tmp_path)[:3])
    service.terminate()
    assert service.wait(WAIT_S) == 0, (tmp_path / "said").read_text()
    assert not psutil.pid_exists(starts(tmp_path)[3][0])
    assert registry.announcements(session) == []


def test_a_server_that_always_fails_is_given_up_and_the_trainer_told(serve: Serve, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "servers")
    session, _ = registry.begin()
    ask(registry, session, "broken")
    service = serve(1)
    why = r"server 0 on .*: ended while it started: ValueError: broken weights .* given up after 2 failures"
    with pytest.raises(RuntimeError, match=why):
        asyncio.run(registry.wait_for_servers(session, 1, WAIT_S))
    assert service.wait(WAIT_S) == 1, (tmp_path / "said").read_text()
    assert len(starts(tmp_path)) == 2
