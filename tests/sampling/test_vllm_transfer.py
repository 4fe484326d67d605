"""Weights broadcast from rank 0's memory, without a server: the workers here are threads at the other end of
the wire (tests/vllm has vLLM's)."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from phi4r.configs.sections import ModelConfig, ParallelConfig, SamplingConfig, TrainConfig, VLLMConfig
from phi4r.core.errors import UserError
from phi4r.models.names import hf_tensors, random_weights
from phi4r.parallel.layout import init_layout
from phi4r.sampling.vllm import transfer
from phi4r.sampling.vllm.client import ServerError
from phi4r.sampling.vllm.engine import VLLMEngine
from phi4r.sampling.vllm.inside.phi4r_wire import Wire, are_here, open_store, reach_store
from phi4r.sampling.vllm.server import RECEIVES, ServerProcess
from phi4r.sampling.vllm.transfer import Snapshot
from phi4r.train.engine import Engine

MODEL = ModelConfig.from_preset("tiny", vocab_size=64, num_layers=2)
CPU = torch.device("cpu")
LIMIT_S = 120.0


def weights(seed: int = 7) -> Iterator[tuple[str, Tensor]]:
    """All weights of the model, in table order."""
    get_tensor = random_weights(MODEL, seed)
    for name in hf_tensors(MODEL):
        yield name, get_tensor(name)


def wires(num_workers: int) -> list[Wire]:
    """A group of a trainer (the first) and workers."""
    store, size = open_store(), 1 + num_workers
    with ThreadPoolExecutor(num_workers) as pool:
        workers = [
            pool.submit(
                lambda rank: Wire(
                    reach_store("127.0.0.1", store.port, rank), rank, size, "gloo", "127.0.0.1", CPU, LIMIT_S
                ),
                rank,
            )
            for rank in range(1, size)
        ]
        until = time.monotonic() + LIMIT_S
        while not are_here(store, range(1, size)):
            assert time.monotonic() < until
            time.sleep(0.01)
        trainer = Wire(store, 0, size, "gloo", "127.0.0.1", CPU, LIMIT_S)
        return [trainer, *(worker.result() for worker in workers)]


def receive(wire: Wire, snapshot: Snapshot, which: slice) -> dict[str, Tensor]:
    """What a worker receives of `which` tensors."""
    found = {}
    for name, shape in list(snapshot.shapes.items())[which]:
        found[name] = torch.empty(shape, dtype=snapshot.dtype)
        wire.broadcast(found[name], LIMIT_S)
    return found


def test_workers_receive_what_comes_in_while_it_comes_in() -> None:
    snapshot, (trainer, *workers), gate = Snapshot(MODEL), wires(2), threading.Event()

    def held_up() -> Iterator[tuple[str, Tensor]]:
        for number, item in enumerate(weights()):
            if number == 3:
                assert gate.wait(LIMIT_S)
            yield item

    with ThreadPoolExecutor(4) as pool:
        sending = pool.submit(transfer._broadcast, snapshot, trainer, time.monotonic() + LIMIT_S)
        filling = pool.submit(snapshot.fill, held_up())
        first = [pool.submit(receive, worker, snapshot, slice(3)) for worker in workers]
        assert [len(part.result()) for part in first] == [3, 3]
        rest = [pool.submit(receive, worker, snapshot, slice(3, None)) for worker in workers]
        time.sleep(0.1)
        assert not any(future.done() for future in (sending, *rest))
        gate.set()
        sending.result()
        filling.result()
    for found, others in zip(first, rest, strict=True):
        received = found.result() | others.result()
        for name, tensor in weights():
            assert torch.equal(received[name], tensor), name


def test_a_snapshot_does_not_change_with_the_weights_in_training() -> None:
    snapshot = Snapshot(MODEL)
    live = {name: tensor.clone() for name, tensor in weights()}
    snapshot.fill(live.items())
    for tensor in live.values():
        tensor.zero_()
    for name, tensor in weights():
        assert torch.equal(snapshot.get_tensor(name), tensor), name


def test_a_worker_that_is_gone_is_noticed_at_once() -> None:
    snapshot, (trainer, worker) = Snapshot(MODEL), wires(1)
    snapshot.fill(weights())
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(transfer._broadcast, snapshot, trainer, time.monotonic() + LIMIT_S)
        receive(worker, snapshot, slice(2))
        worker.close()
        with pytest.raises(ServerError, match=r"did not take model\.layers\.\d+") as noticed:
            sending.result()
    assert "imed out" not in str(noticed.value)


def test_a_trainer_that_is_gone_is_noticed_at_once() -> None:
    snapshot, (trainer, worker) = Snapshot(MODEL), wires(1)
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receive, worker, snapshot, slice(None))
        trainer.broadcast(next(weights())[1], LIMIT_S)
        trainer.close()
        with pytest.raises(RuntimeError, match=r"Connection (closed|reset) by peer"):  # not: timed out
            receiving.result()


def test_a_worker_that_hangs_is_waited_for_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, (trainer, worker) = Snapshot(MODEL), wires(1)
    beyond_socket_buffers = torch.ones(2**24)
    monkeypatch.setattr(snapshot, "get_tensor", lambda name, timeout_s: beyond_socket_buffers)
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"did not take model\.embed_tokens\.weight: .*[Tt]imed out"):
        transfer._broadcast(snapshot, trainer, began + 0.5)
    assert time.monotonic() - began >= 0.45
    worker.close()


def test_who_reads_a_snapshot_is_told_when_it_ends_early_or_does_not_come() -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield next(weights())
        raise ValueError("a rank is gone")

    snapshot = Snapshot(MODEL)
    with pytest.raises(RuntimeError, match=r"waited 0 s for the trainer's ranks to hand over model\.norm"):
        snapshot.get_tensor("model.norm.weight", 0.01)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(snapshot.get_tensor, "model.norm.weight", LIMIT_S)
        with pytest.raises(ValueError, match="a rank is gone"):
            snapshot.fill(broken())
        with pytest.raises(RuntimeError, match=r"could not hand over model\.norm\.weight"):
            reading.result()


def test_the_servers_own_error_comes_first() -> None:
    async def fails_at(seconds: float, error: Exception | None) -> None:
        await asyncio.sleep(seconds)
        if error is not None:
            raise error

    ours, theirs = ServerError("connection closed"), ServerError("HTTP 500")
    for first, second in ((0.0, 0.1), (0.1, 0.0)):
        with pytest.raises(ServerError, match="HTTP 500"):
            asyncio.run(transfer._together(fails_at(first, theirs), fails_at(second, ours)))
    with pytest.raises(ServerError, match="connection closed"):
        asyncio.run(transfer._together(fails_at(0.05, None), fails_at(0, ours)))
    asyncio.run(transfer._together(fails_at(0.05, None), fails_at(0, None)))


def test_a_server_that_is_sent_its_weights_starts_without() -> None:
    config = VLLMConfig(python=sys.executable, transfer="gloo", options="--load-format auto")
    process = ServerProcess(0, config, "float32", 64, True, Path("log"))
    words = process.command(Path("form"), 8000)
    assert words[words.index("--load-format") :][: len(RECEIVES)] == list(RECEIVES)
    assert words[-1] == "auto"  # what the user says comes last
    assert Path(process.environment()["PYTHONPATH"].split(":")[0], "phi4r_transfer.py").is_file()


def test_nccl_is_refused_without_gpus() -> None:
    engine = Engine(MODEL, ParallelConfig(), init_layout(ParallelConfig()), TrainConfig())
    with pytest.raises(UserError, match=r'vllm\.transfer "nccl" is for a trainer on GPUs'):
        VLLMEngine(
            engine, (3,), VLLMConfig(transfer="nccl", addresses="http://127.0.0.1:1"), SamplingConfig(),
            Path("run"), max_model_len=64, probe_prompts=[(5,)],
        )  # fmt: skip
