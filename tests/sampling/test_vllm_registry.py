"""Trainer and servers on other nodes find each other by files; what an earlier start left is never used."""

from __future__ import annotations

import asyncio
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from phi4r.configs.sections import VLLMConfig
from phi4r.core.errors import ConfigError, UserError
from phi4r.parallel.attempt import FOLDER
from phi4r.sampling.vllm.inside import phi4r_guard
from phi4r.sampling.vllm.registry import Announcement, Order, Registry
from phi4r.sampling.vllm.serve import listening_address, own_devices
from phi4r.sampling.vllm.server import ServerProcess


def begun(folder: Path) -> tuple[Registry, str, str]:
    registry = Registry(folder / "servers")
    session, key = registry.begin()
    registry.publish(Order(session, "/weights", "bfloat16", 64, False))
    return registry, session, key


def test_only_servers_of_this_session_count(tmp_path: Path) -> None:
    old, old_session, old_key = begun(tmp_path)
    left = Announcement(old_session, 0, "http://a:1", "a")
    registry, session, key = begun(tmp_path)
    assert (session == old_session, key == old_key) == (False, False)
    old.announce(left)  # an old server that has not heard of the new session
    assert registry.announcements(session) == []
    with pytest.raises(RuntimeError, match=r"waited 0 s \(vllm\.start_timeout_s\) for 2 .* 0 did \(none\)"):
        asyncio.run(registry.wait_for_servers(session, 2, 0))
    new = [Announcement(session, number, f"http://b:{number}", "b") for number in (1, 0)]
    for announcement in new:
        registry.announce(announcement)
    assert asyncio.run(registry.wait_for_servers(session, 2, 0)) == new[::-1]
    registry.withdraw(1)
    with pytest.raises(RuntimeError, match=r"and 1 did \(http://b:0 on b\)"):
        asyncio.run(registry.wait_for_servers(session, 2, 0))


def test_a_new_session_removes_what_an_older_one_left(tmp_path: Path) -> None:
    registry, session, _ = begun(tmp_path)
    registry.announce(Announcement(session, 0, "http://a:1", "a"))
    registry.begin()
    assert [path.name for path in registry.folder.iterdir()] == ["key"]
    assert registry.order() is None


def test_a_server_that_was_given_up_is_not_waited_for(tmp_path: Path) -> None:
    registry, session, _ = begun(tmp_path)
    registry.announce(Announcement(session, 3, "", "node7", "no Python interpreter with vLLM here"))
    with pytest.raises(RuntimeError, match="vLLM server 3 on node7: no Python interpreter"):
        asyncio.run(registry.wait_for_servers(session, 1, 60))


def test_a_server_takes_orders_of_its_own_attempt_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, "/run/logs/17.0.0")
    registry, session, _ = begun(tmp_path)
    assert session == "17.0.0"
    assert registry.order() == Order(session, "/weights", "bfloat16", 64, False)
    monkeypatch.setenv(FOLDER, "/run/logs/17.0.1")
    assert registry.order() is None


def test_the_key_is_its_owners_alone_and_goes_by_environment(tmp_path: Path) -> None:
    registry, _, key = begun(tmp_path)
    assert stat.S_IMODE((registry.folder / "key").stat().st_mode) == 0o600
    assert registry.key() == key
    assert len(key) == 64
    config = VLLMConfig(python=sys.executable)
    process = ServerProcess(
        0, config, "float32", 64, True, tmp_path / "log", host="127.0.0.3", port=7, key=key
    )
    command, environment = process.command(Path("/w"), 7), process.environment()
    assert key not in " ".join(command)
    assert command[command.index("--host") + 1] == "127.0.0.3"
    assert environment["VLLM_API_KEY"] == key
    assert (Path(environment["PYTHONPATH"].split(":")[0]) / "phi4r_guard.py").is_file()
    assert "--middleware" not in ServerProcess(0, config, "float32", 64, True, tmp_path / "log").command(
        Path("/w"), 7
    )


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/health", b"", 200),
        ("/health/x", b"", 401),
        ("/collective_rpc", b"", 401),
        ("/collective_rpc", b"Bearer wrong", 401),
        ("/collective_rpc", b"secret", 401),
        ("/collective_rpc", b"Bearer secret", 200),
        ("/v1/models", b"Bearer secret", 200),
    ],
)
def test_the_guard_lets_in_who_has_the_key(
    path: str, header: bytes, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    scope = {"type": "http", "path": path, "headers": [(b"authorization", header)] if header else []}
    asyncio.run(phi4r_guard.Guard(app)(scope, None, send))
    assert sent[0]["status"] == status


def test_a_server_listens_where_the_trainer_is_reached_from() -> None:
    assert listening_address("") == "127.0.0.1"
    assert listening_address("127.0.0.1") == "127.0.0.1"


def test_servers_of_a_node_share_its_gpus_evenly() -> None:
    assert [own_devices("0,1,2,3", 2, local) for local in range(2)] == ["0,1", "2,3"]
    assert own_devices("0,1", 1, 0) == "0,1"
    with pytest.raises(UserError, match="3 servers cannot share 4 GPUs of this node"):
        own_devices("0,1,2,3", 3, 0)
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES is ''"):
        own_devices("", 1, 0)


def test_a_registry_and_addresses_are_not_both_given() -> None:
    with pytest.raises(ConfigError, match="both say where the servers are"):
        VLLMConfig(registry="/servers", addresses="http://a:1")
