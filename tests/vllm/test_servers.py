"""Rollouts from real vLLM servers: the embedded engine's distribution, weights that are proved, nothing lost
when a server dies. The tests share two servers and run in the order they stand in: the last one ends them."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from scipy import stats

from phi4r.core.errors import UserError
from phi4r.data.packing import Document, pack, unpack
from phi4r.models.huggingface import HFWeights
from phi4r.models.names import load_weights
from phi4r.sampling.embedded import EmbeddedEngine
from phi4r.sampling.types import Completion, SampleRequest, SamplingOptions
from phi4r.sampling.vllm.client import Client
from phi4r.sampling.vllm.engine import VLLMEngine
from phi4r.sampling.vllm.fleet import Member, weights_folder
from phi4r.train.engine import Engine
from tests.sampling.test_vllm_keeper import ended
from tests.vllm.conftest import MODEL, STOP_IDS, TEMPERATURE, VOCAB, open_engine, peaked_weights

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def requests(count: int, stream: int = 0) -> list[SampleRequest]:
    """Prompts of 1 to 8 tokens, each with a stream of its own."""
    random = np.random.default_rng(5)
    return [
        SampleRequest(tuple(random.integers(5, VOCAB, int(random.integers(1, 9))).tolist()), (stream, number))
        for number in range(count)
    ]


def gaps(trainer: Engine, made: list[SampleRequest], completions: list[Completion]) -> np.ndarray:
    """|log-prob of the server - of the trainer's own pass| of every sampled token."""
    documents = []
    for request, completion in zip(made, completions, strict=True):
        tokens = np.array([*request.prompt_tokens, *completion.tokens], dtype=np.int32)
        documents.append(Document(tokens, np.arange(len(tokens)) >= len(request.prompt_tokens), {}))
    rows = pack(documents, 256)
    ours = unpack(rows, list(trainer.forward(rows, temperature=TEMPERATURE)[0]), documents)
    return np.concatenate(
        [
            np.abs(own[len(request.prompt_tokens) :] - np.array(completion.logprobs))
            for own, request, completion in zip(ours, made, completions, strict=True)
        ]
    )


def server_processes(member: Member) -> list[psutil.Process]:
    """The server under its keeper, and all it started."""
    assert member.process is not None
    return psutil.Process(member.process.pid).children(recursive=True)


def kill_in_mid_run(victim: Member) -> tuple[threading.Thread, list[float]]:
    """A thread that kills a server while it samples, and how many requests it had then, at three looks."""
    server, in_flight = server_processes(victim)[0], list[float]()

    def kill() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and len(in_flight) < 3:
            text = httpx.get(victim.url + "/metrics").text
            waiting = [line for line in text.splitlines() if line.startswith("vllm:num_requests_")]
            values = [float(line.split()[-1]) for line in waiting if "_by_" not in line]
            if sum(values) > 0:
                in_flight.append(sum(values))
        server.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    return thread, in_flight


def test_greedy_answers_are_the_embedded_engines(trainer: Engine, servers: VLLMEngine) -> None:
    made, options = requests(24), SamplingOptions(20, temperature=0)
    expected = EmbeddedEngine(trainer, STOP_IDS, 24).generate(made, options)
    found = servers.generate(made, options)
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    assert [c.finished for c in found] == [c.finished for c in expected]
    assert {c.finished for c in found} == {True, False}
    for ours, theirs in zip(expected, found, strict=True):
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-4)


def test_log_probs_are_the_trainers_at_the_sampling_temperature(trainer: Engine, servers: VLLMEngine) -> None:
    made = requests(48, stream=1)
    completions = servers.generate(made, SamplingOptions(20, TEMPERATURE))
    found = gaps(trainer, made, completions)
    # fp32 rounding of logits of size 20 or so, in another order of summation
    assert found.max() < 1e-4
    assert found.mean() < 1e-5
    assert {c.version for c in completions} == {0}
    assert all(c.finished == (c.tokens[-1] in STOP_IDS) for c in completions)
    assert all(not set(c.tokens[:-1]) & set(STOP_IDS) for c in completions)


def test_samples_are_distributed_as_the_embedded_engine_s_and_repeat(
    trainer: Engine, servers: VLLMEngine
) -> None:
    made = [SampleRequest((11, 12), (2, number)) for number in range(400)]
    options = SamplingOptions(2, TEMPERATURE)
    theirs = servers.generate(made, options)
    again = servers.generate(made[:40], options)
    assert [c.tokens for c in again] == [c.tokens for c in theirs[:40]]
    ours = EmbeddedEngine(trainer, STOP_IDS, 400).generate(made, options)
    for position in (0, -1):
        counts = [np.bincount([c.tokens[position] for c in cs], minlength=VOCAB) for cs in (ours, theirs)]
        common = counts[0] + counts[1] >= 10
        table = np.array([[*count[common], count[~common].sum()] for count in counts])
        assert table.shape[1] > 5, "the test needs several tokens that are sampled often"
        assert stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-3


def test_the_trainer_is_free_while_servers_sample(trainer: Engine, servers: VLLMEngine) -> None:
    made, options = requests(48, stream=9), SamplingOptions(20, TEMPERATURE)
    expected = servers.generate(made, options)
    servers.open(0, made, options, [Completion()] * len(made))
    assert len(EmbeddedEngine(trainer, STOP_IDS, 24).generate(requests(8), options)) == 8
    assert [c.tokens for c in servers.finish(0)] == [c.tokens for c in expected]


def test_requests_that_one_server_could_take_are_shared_out(servers: VLLMEngine) -> None:
    def answered() -> list[float]:
        texts = [httpx.get(member.url + "/metrics").text for member in servers.fleet.members]
        counts = [
            re.findall(r"^vllm:request_success_total\{.*\} (.*)$", text, re.MULTILINE) for text in texts
        ]
        return [sum(map(float, found)) for found in counts]

    before = answered()
    servers.generate(
        requests(servers.fleet.sampling.max_in_flight, stream=12), SamplingOptions(100, TEMPERATURE)
    )
    shares = [after - first for after, first in zip(answered(), before, strict=True)]
    assert sum(shares) == servers.fleet.sampling.max_in_flight
    assert min(shares) >= 2


def test_filters_are_refused(servers: VLLMEngine) -> None:
    for options in (SamplingOptions(4, top_p=0.9), SamplingOptions(4, top_k=5)):
        with pytest.raises(UserError, match=r"sampling\.top_p and sampling\.top_k must be off"):
            servers.generate(requests(1), options)


def test_servers_that_were_not_started_for_a_broadcast_are_refused(
    trainer: Engine, servers: VLLMEngine, tmp_path: Path
) -> None:
    addresses = ",".join(member.url for member in servers.fleet.members)
    engine = open_engine(trainer, tmp_path, addresses=addresses, transfer="gloo")
    with pytest.raises(UserError, match=r"cannot be sent weights .* --worker-extension-cls phi4r_transfer"):
        engine.sync(0)
    engine.close()
    assert {c.version for c in servers.generate(requests(4), SamplingOptions(4))} == {0}


def test_a_sync_moves_new_weights_and_what_was_not_sent_is_noticed(
    trainer: Engine, servers: VLLMEngine
) -> None:
    assert servers.comparison.num_equal > 0
    assert not servers.comparison.differing
    # Longer than a block of the prefix cache: the keys and values of old weights are there to be used.
    prompt = tuple(5 + number % 50 for number in range(200))
    long = [SampleRequest(prompt, (5, number)) for number in range(8)]
    for _ in range(2):
        old = servers.generate(long, SamplingOptions(20, TEMPERATURE))
        assert gaps(trainer, long, old).max() < 1e-4
    load_weights(trainer.models, MODEL, peaked_weights(8), 0, 1)  # type: ignore[arg-type]
    metrics = servers.sync(1)
    assert metrics["rollout_servers"] == 2
    assert metrics["policy_version"] == 1
    assert metrics["max_probe_gap"] < 1e-4
    made = requests(16, stream=3) + long
    completions = servers.generate(made, SamplingOptions(20, TEMPERATURE))
    assert {c.version for c in completions} == {1}
    assert gaps(trainer, made, completions).max() < 1e-4

    member = servers.fleet.members[1]

    async def put_back_old_weights_under_the_new_label() -> dict[str, str]:
        async with httpx.AsyncClient() as http:
            client = Client(http, member.url, servers.config, 60.0)
            await client.load(weights_folder(servers.root, 0), 1)
            return await client.digests()

    digests = asyncio.run(put_back_old_weights_under_the_new_label())
    assert servers._verify(HFWeights(weights_folder(servers.root, 1)).get_tensor, digests).differing
    with pytest.raises(RuntimeError, match="vLLM server 1 does not hold the weights of step 1"):
        servers._probe([member], 1)
    assert servers.sync(2)["rollout_servers"] == 2  # the next weights mend it


def test_a_killed_server_loses_and_repeats_nothing_and_comes_back(
    trainer: Engine, servers: VLLMEngine
) -> None:
    made, options = requests(96, stream=4), SamplingOptions(100, TEMPERATURE)
    undisturbed = servers.generate(made, options)
    servers.fleet.take_events()
    victim = servers.fleet.members[0]
    others = server_processes(victim)
    killer, in_flight = kill_in_mid_run(victim)
    completions = servers.generate(made, options)
    killer.join()

    assert in_flight
    assert max(in_flight) <= servers.fleet.sampling.max_in_flight
    # Seeds are counters: whichever server answered, and whether asked once or twice, the answer is the same.
    assert [c.tokens for c in completions] == [c.tokens for c in undisturbed]
    assert gaps(trainer, made, completions).max() < 1e-4
    events = servers.fleet.events
    assert events.failures == 1
    assert 0 < events.requeued <= servers.fleet.sampling.max_in_flight
    # The engine's processes went with the server that was killed.
    assert ended(others, 30)

    # Steps go on with one server while the other starts; then it takes part with the weights of the day.
    metrics, until = servers.sync(3), time.monotonic() + 150
    while metrics["rollout_servers"] < 2 and time.monotonic() < until:
        version = int(metrics["policy_version"])
        assert {c.version for c in servers.generate(requests(16), options)} == {version}
        metrics = servers.sync(version + 1)
    assert metrics["rollout_servers"] == 2
    assert {c.version for c in servers.generate(requests(16), options)} == {metrics["policy_version"]}
    assert servers.fleet.members[0].process.num_starts == 2  # type: ignore[union-attr]


def move_on(trainer: Engine, servers: VLLMEngine, version: int) -> dict[str, float]:
    """Other weights in trainer and servers; the sync's metrics."""
    load_weights(trainer.models, MODEL, peaked_weights(version), 0, 1)  # type: ignore[arg-type]
    return servers.sync(version)


def assert_every_token_is_of_its_version(
    trainer: Engine, made: list[SampleRequest], completions: list[Completion], versions: list[int]
) -> None:
    """Each span's log-probs are those of the trainer with the weights of its version."""
    sampled_by = np.concatenate([np.repeat(*np.array(c.spans).T) for c in completions])
    assert set(sampled_by) == set(versions)
    for version in versions:
        load_weights(trainer.models, MODEL, peaked_weights(version), 0, 1)  # type: ignore[arg-type]
        found, here = gaps(trainer, made, completions), sampled_by == version
        assert found[here].max() < 1e-4
        assert np.median(found[~here]) > 1e-2


@pytest.mark.proves(
    "An update in the middle of vLLM's answers: every token has the log-prob of the weights of its version",
    how="two real servers, the trainer's forward pass with both weights, 1e-4 in fp32",
)
def test_an_update_in_mid_answer_goes_on_with_the_new_weights(trainer: Engine, servers: VLLMEngine) -> None:
    options, first = SamplingOptions(200, TEMPERATURE), int(servers.version or 0) + 1
    draws = {number: requests(24, stream=20 + number) for number in range(2)}
    move_on(trainer, servers, first)
    servers.fleet.take_events()
    for number, made in draws.items():
        servers.open(number, made, options, [Completion()] * len(made))
    until = time.monotonic() + 60
    while not any(c.tokens for c in servers.unfinished()[0]):  # the first answer has ended, others go on
        assert time.monotonic() < until
        time.sleep(0.01)
    assert move_on(trainer, servers, first + 1)["rollout_interrupted"] > 0
    partial = [c for answers in servers.unfinished().values() for c in answers if not c.is_complete(options)]
    assert partial
    found = {number: servers.finish(number) for number in draws}
    assert servers.unfinished() == {}
    completions = [c for answers in found.values() for c in answers]
    assert all(c.is_complete(options) for c in completions)
    assert any([version for version, _ in c.spans] == [first, first + 1] for c in completions)
    made = [request for number in draws for request in draws[number]]
    assert_every_token_is_of_its_version(trainer, made, completions, [first, first + 1])
    assert servers.fleet.take_events().requeued == 0

    # What had begun on one server, or before a restart of the trainer, goes on from its tokens.
    begun = [Completion(c.tokens[:5], c.logprobs[:5], False, [(first, 5)]) for c in completions[:8]]
    begun = [one for one, c in zip(begun, completions, strict=False) if len(c.tokens) > 5]
    longer = [r for r, c in zip(made[:8], completions, strict=False) if len(c.tokens) > 5]
    servers.open(9, longer, options, begun)
    for one, whole in zip(begun, servers.finish(9), strict=True):
        assert whole.tokens[:5] == one.tokens
        assert whole.spans == [(first, 5), (first + 1, len(whole.tokens) - 5)]


def test_a_server_killed_while_draws_are_open_loses_and_repeats_nothing(
    trainer: Engine, servers: VLLMEngine
) -> None:
    options, first = SamplingOptions(200, TEMPERATURE), int(servers.version or 0) + 1
    draws = {number: requests(40, stream=30 + number) for number in range(2)}
    move_on(trainer, servers, first)
    servers.fleet.take_events()
    killer, in_flight = kill_in_mid_run(servers.fleet.members[0])
    for number, made in draws.items():
        servers.open(number, made, options, [Completion()] * len(made))
    killer.join()
    assert in_flight
    metrics = move_on(trainer, servers, first + 1)
    assert metrics["rollout_servers"] == 1
    assert metrics["rollout_failures"] == 1
    assert metrics["rollout_requeued"] > 0
    completions = [c for number in draws for c in servers.finish(number)]
    assert all(c.is_complete(options) for c in completions)
    made = [request for number in draws for request in draws[number]]
    assert_every_token_is_of_its_version(trainer, made, completions, [first, first + 1])


def test_closing_ends_every_process_also_while_servers_sample(servers: VLLMEngine) -> None:
    made = requests(400, stream=10)
    servers.open(50, made, SamplingOptions(20, TEMPERATURE), [Completion()] * len(made))
    processes = [process for member in servers.fleet.members for process in server_processes(member)]
    assert len(processes) >= 3  # one of the servers is starting again
    servers.close()
    assert ended(processes, 30)
