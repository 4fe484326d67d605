"""The parts of the vLLM engine that can be tested without a server (tests/vllm has the servers)."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import httpx
import pytest
import torch

from phi4r.configs.sections import ModelConfig, ParallelConfig, RolloutConfig, VLLMConfig
from phi4r.convert.live import export_live
from phi4r.core import optional
from phi4r.core.errors import ConfigError, UserError
from phi4r.models.gpt import build_model
from phi4r.models.huggingface import HFWeights
from phi4r.models.names import load_weights, random_weights, weight_table
from phi4r.parallel.layout import init_layout
from phi4r.rl.batch import rollout_gap_sums
from phi4r.rl.train import check_gap
from phi4r.sampling.types import Completion, PromptBatch, SampleRequest, SamplingOptions
from phi4r.sampling.vllm.client import CONNECTIONS, Client, ServerError, seed_of
from phi4r.sampling.vllm.fleet import Board
from phi4r.sampling.vllm.persistent import PersistentBatches
from phi4r.sampling.vllm.server import EPHEMERAL_PORTS, ServerProcess, free_port
from phi4r.sampling.vllm.weights import EMPTY, compare, digest, served_part

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=8,
    vocab_size=72, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a model in training, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("export") / "v_000000"
    layout = init_layout(ParallelConfig())
    models = build_model(MODEL, ParallelConfig())
    load_weights(models, MODEL, random_weights(MODEL, 7), 0, 1)
    export_live(models, MODEL, layout, folder, (3,), None)
    return folder


def test_live_weights_reach_the_folder_unchanged(exported: Path) -> None:
    weights, wanted = HFWeights(exported), random_weights(MODEL, 7)
    weights.check({weight.hf: weight.shape for weight in weight_table(MODEL)})
    for weight in weight_table(MODEL):
        assert torch.equal(weights.get_tensor(weight.hf), wanted(weight.hf)), weight.hf


def test_served_parts_hold_every_row_in_the_order_of_the_kernels() -> None:
    N, K, H = 4, 2, 8
    qkv = next(weight for weight in weight_table(MODEL) if weight.kind == "qkv")
    rows = torch.arange(qkv.shape[0]).float()[:, None].expand(qkv.shape)
    q, k, v = (
        set(range(a, b)) for a, b in ((0, N * H), (N * H, (N + K) * H), ((N + K) * H, (N + 2 * K) * H))
    )
    parts = [served_part(qkv, rows, rank, 2)[:, 0].int().tolist() for rank in range(2)]
    assert parts[0] == [*range(0, 16), *range(32, 40), *range(48, 56)]
    assert set(parts[0]) | set(parts[1]) == q | k | v
    # four ranks share two KV heads
    quarters = [served_part(qkv, rows, rank, 4)[:, 0].int().tolist() for rank in range(4)]
    assert quarters[1] == [*range(8, 16), *range(32, 40), *range(48, 56)]
    assert quarters[2][8:] == [*range(40, 48), *range(56, 64)]
    gate_up = next(weight for weight in weight_table(MODEL) if weight.kind == "gate_up")
    rows = torch.arange(gate_up.shape[0]).float()[:, None].expand(gate_up.shape)
    assert served_part(gate_up, rows, 1, 2)[:, 0].int().tolist() == [*range(24, 48), *range(72, 96)]
    head = weight_table(MODEL)[-1]
    padded = [served_part(head, torch.ones(head.shape), rank, 2) for rank in range(2)]
    assert [len(part) for part in padded] == [64, 64]
    assert [int(part[:, 0].sum()) for part in padded] == [64, 8]


@pytest.mark.parametrize("tp", [1, 2])
def test_digests_tell_equal_repacked_wrong_and_missing_parameters_apart(exported: Path, tp: int) -> None:
    wanted = random_weights(MODEL, 7)
    found = {
        f"dp0:pp0:pcp0:tp{rank}:{weight.hf}": digest(served_part(weight, wanted(weight.hf), rank, tp))
        for weight in weight_table(MODEL)
        for rank in range(tp)
    }
    comparison = compare(HFWeights(exported).get_tensor, MODEL, found)
    assert (comparison.num_equal, comparison.num_unreadable, comparison.differing) == (len(found), 0, [])
    last = f"dp0:pp0:pcp0:tp{tp - 1}:"
    found[last + "model.norm.weight"] = EMPTY
    found[last + "lm_head.weight"] = digest(torch.zeros(3))
    del found[last + "model.layers.1.mlp.down_proj.weight"]
    comparison = compare(HFWeights(exported).get_tensor, MODEL, found)
    assert comparison.num_unreadable == 1
    assert comparison.differing == [last + "lm_head.weight", "model.layers.1.mlp.down_proj.weight"]


def test_every_request_is_answered_once_whoever_gives_it_back() -> None:
    async def run() -> tuple[Board, list[int]]:
        board, taken = Board([SampleRequest((5,), (i,)) for i in range(40)]), []

        async def lane(number: int) -> None:
            while (index := await board.take()) is not None:
                taken.append(index)
                await asyncio.sleep(0.001 * (number % 3))
                if number < 3 and len(taken) % 4 == 0:
                    board.give_back(index)
                else:
                    board.answer(index, Completion([index], [0.0], True))

        lanes = [asyncio.create_task(lane(number)) for number in range(6)]
        await asyncio.wait_for(asyncio.gather(*lanes), 30)
        return board, taken

    board, taken = asyncio.run(run())
    assert [answer.tokens for answer in board.answers if answer] == [[index] for index in range(40)]
    assert len(taken) > 40
    with pytest.raises(AssertionError, match="request 0 was answered twice"):
        board.answer(0, Completion([0], [0.0], True))


def test_a_persistent_queue_gives_the_oldest_first_and_resumes_partials() -> None:
    async def run() -> None:
        told: list[tuple[int, list[int]]] = []
        made = [SampleRequest((5,), (i,)) for i in range(5)]
        board = Board(
            made[:2], persists=True, tell=lambda index, found, _: told.append((index, found.tokens))
        )
        assert [await board.take(), await board.take()] == [0, 1]
        board.add(made[2:], [Completion(), Completion([7], [0.0], False, [(3, 1)]), Completion()])
        assert await board.take() == 2
        board.give_back(1, Completion([8], [0.0], False, [(3, 1)]))
        board.give_back(0)
        assert [await board.take(), await board.take()] == [0, 1]
        assert [begun.tokens for begun in board.begun] == [[], [8], [], [7], []]
        for index in (0, 1, 2):
            board.answer(index, Completion([index], [0.0], True, [(3, 1)]))
        assert (board.num_held, board.finished.is_set()) == (0, False)
        assert await board.take() == 3
        board.stop()
        assert [await board.take(), await board.take()] == [None, None]
        assert board.num_held == 1
        assert told == [(1, [8]), (0, [0]), (1, [1]), (2, [2])]

    asyncio.run(asyncio.wait_for(run(), 5))


def test_servers_are_busy_while_they_serve_and_an_open_draw_is_not_whole() -> None:
    batches, options = PersistentBatches(), SamplingOptions(1)
    whole = Completion([7], [-0.5], False, [(0, 1)])

    def opened(number: int) -> None:
        requests = [SampleRequest((5,), (number, i)) for i in range(2)]
        batches.open(number, PromptBatch(requests, options, [Completion()] * 2))

    def busy() -> list[bool]:
        """Whether they were, from one look to the next: a span is cut at each."""
        time.sleep(0.002)
        return [end > start for start, end in batches.busy.take()]

    opened(0)
    assert busy() == []  # nobody serves
    batches.serve(None, lambda make: Future())  # type: ignore[arg-type]
    assert busy() == [True]
    batches._tell(0, 0, whole)
    opened(1)
    batches._tell(0, 1, whole)
    busy()
    assert busy() == [True]  # the later draw is not whole
    batches._tell(1, 0, whole)
    batches._tell(1, 1, whole)
    assert busy() == [True]
    assert busy() == []
    opened(2)
    assert busy() == [True]
    batches.stop()  # for an update
    assert busy() == [True]
    assert busy() == []
    batches.serve(None, lambda make: Future())  # type: ignore[arg-type]
    assert busy() == [True]


@pytest.mark.parametrize("num_closed", [1, 2, 3])
def test_a_call_outlives_closed_connections_but_not_a_closing_server(num_closed: int) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        if connections > num_closed:
            writer.write(answer)
            await writer.drain()
        writer.close()

    async def call() -> int:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, httpx.AsyncClient(trust_env=False) as http:
            client = Client(http, f"http://127.0.0.1:{port}", VLLMConfig(), 10.0)
            return (await client._call("GET", "/weight_info", 10.0)).status_code

    if num_closed < CONNECTIONS:
        assert asyncio.run(call()) == 200
    else:
        with pytest.raises(ServerError, match="RemoteProtocolError"):
            asyncio.run(call())
    assert connections == min(num_closed + 1, CONNECTIONS)


def test_a_board_without_requests_is_finished() -> None:
    async def run() -> int | None:
        return await asyncio.wait_for(Board([]).take(), 5)

    assert asyncio.run(run()) is None


def test_seeds_are_functions_of_the_counters_and_fit_in_63_bits() -> None:
    seeds = {seed_of((0, step, prompt, 3)) for step in range(20) for prompt in range(20)}
    assert len(seeds) == 400
    assert seed_of((0, 1, 2, 3)) == seed_of((0, 1, 2, 3))
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed_of((0, 1, 2, 3), begun) for begun in range(50)} | seeds) == 449, (
        "what goes on has others"
    )


def test_gap_sums_are_those_of_the_formulas() -> None:
    trainer = torch.tensor([-1.0, -2.0, -0.5, -3.0])
    rollout = torch.tensor([-1.0, -1.5, -0.6, -3.3])
    sums = {name: float(value) for name, value in rollout_gap_sums(trainer, rollout, 0.2).items()}
    weights = [1.0, 2.718281828459045**-0.5, 2.718281828459045**0.1, 2.718281828459045**0.3]
    assert sums["logprob_gap"] == pytest.approx(0.9, rel=1e-6)
    assert sums["max_logprob_gap"] == pytest.approx(0.5, rel=1e-6)
    assert sums["logprob_far"] == 2
    assert sums["rollout_weight"] == pytest.approx(sum(weights), rel=1e-6)
    assert sums["rollout_weight_squared"] == pytest.approx(sum(w * w for w in weights), rel=1e-6)
    empty = torch.zeros(0)
    assert all(float(value) == 0 for value in rollout_gap_sums(empty, empty, 0.2).values())


@pytest.mark.parametrize("gap", [0.06, float("nan")])
def test_the_alarm_warns_or_stops(gap: float, capsys: pytest.CaptureFixture[str]) -> None:
    def metrics(value: float) -> dict[str, float]:
        return {"logprob_gap": value, "max_logprob_gap": 1.0, "logprob_far_share": 0.25}

    quiet, loud = metrics(0.04), metrics(gap)
    check_gap(RolloutConfig(), quiet, 7)
    assert quiet["gap_alarm"] == 0
    check_gap(RolloutConfig(), loud, 7)
    assert loud["gap_alarm"] == 1
    assert "step 7: the sampler's log-probs differ from the trainer's by" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"25\.0% of tokens by more than 0\.1"):
        check_gap(RolloutConfig(on_gap_alarm="stop"), metrics(gap), 7)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("vllm.num_servers", {"num_servers": 0}),
        ("vllm.addresses", {"addresses": "node7:8000"}),
        ("vllm.devices", {"num_servers": 2, "devices": "0;1;2"}),
        ("vllm.options", {"options": "--name 'half"}),
        ("vllm.start_timeout_s", {"start_timeout_s": 0.0}),
    ],
)
def test_a_wrong_setting_names_its_key(key: str, settings: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        VLLMConfig(**settings)
    assert caught.value.key == key


def test_a_missing_interpreter_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(optional.VLLM_PYTHON, "/nowhere/bin/python")
    with pytest.raises(UserError, match="/nowhere/bin/python: no Python interpreter with vLLM here; `make"):
        optional.vllm_python()


@pytest.mark.parametrize(
    ("cores", "num_servers", "threads"), [(2, 1, 1), (2, 2, 1), (1, 1, 1), (9, 1, 8), (9, 2, 4), (64, 4, 15)]
)
def test_servers_share_the_cores_and_leave_one_to_the_trainer(
    monkeypatch: pytest.MonkeyPatch, cores: int, num_servers: int, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the trainer's own
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    config = VLLMConfig(python=sys.executable, num_servers=num_servers)
    variables = {
        on_cpu: ServerProcess(0, config, "float32", 64, on_cpu, Path("log")).environment()
        for on_cpu in (True, False)
    }
    assert variables[True]["OMP_NUM_THREADS"] == str(threads)
    assert "OMP_NUM_THREADS" not in variables[False]


def test_a_servers_port_is_none_that_a_client_could_be_given() -> None:
    lowest = int(EPHEMERAL_PORTS.read_text(encoding="ascii").split()[0])
    assert all(free_port("127.0.0.1") < lowest for _ in range(20))
