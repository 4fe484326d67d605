"""Weights broadcast to two real vLLM servers over gloo: the same weights as through files, proved in the same
way, whatever happens to a server. The tests share the servers and run in the order they stand in."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from torch import Tensor

from phi4r.models.names import load_weights
from phi4r.sampling.embedded import EmbeddedEngine
from phi4r.sampling.types import SamplingOptions
from phi4r.sampling.vllm.client import Client
from phi4r.sampling.vllm.engine import VLLMEngine
from phi4r.sampling.vllm.transfer import Snapshot
from phi4r.train.engine import Engine
from tests.vllm.conftest import MODEL, STOP_IDS, TEMPERATURE, open_engine, peaked_weights
from tests.vllm.test_servers import gaps, requests, server_processes

QKV = "model.layers.0.self_attn.qkv_proj.weight"

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def servers(
    vllm_python: str, trainer: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VLLMEngine]:
    """Two servers that start without weights and are sent the trainer's as version 0."""
    load_weights(trainer.models, MODEL, peaked_weights(7), 0, 1)  # type: ignore[arg-type]
    run_dir = Path(tmp_path_factory.mktemp("broadcast"))
    engine = open_engine(trainer, run_dir, num_servers=2, python=vllm_python, transfer="gloo")
    try:
        engine.sync(0)
        yield engine
    finally:
        engine.close()


@pytest.fixture
def at_addresses(trainer: Engine, servers: VLLMEngine, tmp_path: Path) -> Iterator[VLLMEngine]:
    """Another trainer's engine, for which the same servers are given by address. A sync may take 20 s."""
    addresses = ",".join(member.url for member in servers.fleet.members)
    engine = open_engine(trainer, tmp_path, addresses=addresses, transfer="gloo", sync_timeout_s=20)
    yield engine
    engine.close()


def digests(engine: VLLMEngine) -> list[dict[str, str]]:
    """SHA-256 of every parameter, of each server."""

    async def ask() -> list[dict[str, str]]:
        async with httpx.AsyncClient() as http:
            members = engine.fleet.members
            return [await Client(http, member.url, engine.config, 60.0).digests() for member in members]

    return asyncio.run(ask())


def change_once(patch: pytest.MonkeyPatch, changed: str, change: Callable[[Tensor], Tensor]) -> None:
    """Have `change(tensor)` take the place of what rank 0 sends as `changed`, the first time."""
    asked: list[str] = []
    get_tensor = Snapshot.get_tensor

    def get_changed(self: Snapshot, name: str, timeout_s: float = 0.0) -> Tensor:
        asked.append(name)
        tensor = get_tensor(self, name, timeout_s)
        return change(tensor) if name == changed and asked.count(name) == 1 else tensor

    patch.setattr(Snapshot, "get_tensor", get_changed)


def test_servers_start_without_weights_and_are_sent_the_trainers(
    trainer: Engine, servers: VLLMEngine
) -> None:
    assert [path.name for path in servers.root.rglob("*") if path.is_file()] == ["config.json"]
    assert servers.comparison.num_equal > 0
    assert not servers.comparison.differing
    made, options = requests(24), SamplingOptions(20, temperature=0)
    expected = EmbeddedEngine(trainer, STOP_IDS, 24).generate(made, options)
    assert [c.tokens for c in servers.generate(made, options)] == [c.tokens for c in expected]


def test_broadcast_weights_are_those_of_files(trainer: Engine, servers: VLLMEngine, tmp_path: Path) -> None:
    load_weights(trainer.models, MODEL, peaked_weights(8), 0, 1)  # type: ignore[arg-type]
    metrics = servers.sync(1)
    assert metrics["rollout_servers"] == 2
    assert metrics["policy_version"] == 1
    made, options = requests(32, stream=3), SamplingOptions(20, TEMPERATURE)
    by_broadcast, digests_by_broadcast = servers.generate(made, options), digests(servers)
    assert {c.version for c in by_broadcast} == {1}
    assert gaps(trainer, made, by_broadcast).max() < 1e-4

    addresses = ",".join(member.url for member in servers.fleet.members)
    files = open_engine(trainer, tmp_path, addresses=addresses)
    load_weights(trainer.models, MODEL, peaked_weights(9), 0, 1)  # type: ignore[arg-type]
    files.sync(0)  # other weights in between
    assert digests(servers) != digests_by_broadcast
    load_weights(trainer.models, MODEL, peaked_weights(8), 0, 1)  # type: ignore[arg-type]
    by_files_metrics = files.sync(1)
    by_files = files.generate(made, options)
    files.close()
    assert digests(servers) == digests_by_broadcast
    assert [(c.tokens, c.logprobs) for c in by_files] == [(c.tokens, c.logprobs) for c in by_broadcast]
    assert by_files_metrics["probe_gap"] == metrics["probe_gap"]
    assert by_files_metrics["weights_equal"] == metrics["weights_equal"]


def test_a_tensor_that_was_changed_on_its_way_is_noticed(
    at_addresses: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        change_once(patch, "model.embed_tokens.weight", lambda tensor: tensor + 1)
        metrics = at_addresses.sync(5)  # noticed by its digest, and sent again
    assert metrics["rollout_failures"] == 1
    assert metrics["rollout_servers"] == 2
    assert metrics["max_probe_gap"] < 1e-4
    # A matrix that the server has repacked has no digest: the log-probs give it away.
    with monkeypatch.context() as patch:
        change_once(patch, QKV, lambda tensor: tensor.flip(0))
        with pytest.raises(RuntimeError, match="does not hold the weights of step 6"):
            at_addresses.sync(6)
    assert at_addresses.sync(7)["max_probe_gap"] < 1e-4


def test_a_server_that_hangs_in_mid_transfer_gets_its_weights_later(
    at_addresses: VLLMEngine, servers: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert at_addresses.sync(10)["rollout_servers"] == 2
    processes = server_processes(servers.fleet.members[1])
    awake = threading.Timer(30, lambda: [process.send_signal(signal.SIGCONT) for process in processes])

    def freeze(tensor: Tensor) -> Tensor:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        awake.start()
        return tensor

    change_once(monkeypatch, QKV, freeze)
    began = time.monotonic()
    metrics = at_addresses.sync(11)
    assert metrics["rollout_failures"] == 1
    assert metrics["rollout_servers"] == 2
    assert time.monotonic() - began >= 19, "the frozen server was waited for"
    assert metrics["max_probe_gap"] < 1e-4


def test_a_server_killed_in_mid_transfer_is_replaced(
    trainer: Engine, servers: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    victims = server_processes(servers.fleet.members[0])

    def kill(tensor: Tensor) -> Tensor:
        for process in victims:
            process.kill()
        return tensor

    load_weights(trainer.models, MODEL, peaked_weights(10), 0, 1)  # type: ignore[arg-type]
    servers.fleet.take_events()
    change_once(monkeypatch, QKV, kill)
    metrics = servers.sync(20)
    assert metrics["rollout_failures"] == 1
    assert metrics["rollout_servers"] == 2
    assert servers.fleet.members[0].process.num_starts == 2  # type: ignore[union-attr]
    completions = servers.generate(requests(16), SamplingOptions(20, TEMPERATURE))
    assert {c.version for c in completions} == {20}
    assert gaps(trainer, requests(16), completions).max() < 1e-4


def test_a_dead_server_does_not_hold_up_a_sync(trainer: Engine, servers: VLLMEngine) -> None:
    for process in server_processes(servers.fleet.members[1]):
        process.kill()
    servers.fleet.members[1].process._process.wait(20)  # type: ignore[union-attr]
    load_weights(trainer.models, MODEL, peaked_weights(11), 0, 1)  # type: ignore[arg-type]
    assert servers.sync(21)["rollout_servers"] == 1, "the one that is starting again was not waited for"
    options, until = SamplingOptions(100, TEMPERATURE), time.monotonic() + 150
    while servers.fleet.members[1].version != 21 and time.monotonic() < until:
        completions = servers.generate(requests(48, stream=4), options)
        assert {c.version for c in completions} == {21}
    assert servers.fleet.members[1].version == 21
    assert servers.sync(22)["rollout_servers"] == 2
