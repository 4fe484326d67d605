"""Keys and values: a sequence holds the blocks of its own length, and what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phi4r.configs.sections import ParallelConfig, TrainConfig
from phi4r.core.errors import UserError
from phi4r.models.kv_cache import BLOCK, KVCache
from phi4r.models.names import load_weights, random_weights
from phi4r.parallel.layout import init_layout
from phi4r.sampling import embedded
from phi4r.sampling.embedded import EmbeddedEngine
from phi4r.sampling.types import SampleRequest, SamplingOptions
from phi4r.train.engine import Engine
from tests.sampling.test_embedded import MODEL, STOP_IDS

K, H, SCALE = 2, 4, 0.5


def blocks(length: int) -> int:
    return -(-length // BLOCK)


def dense(q_NH: torch.Tensor, keys_SKH: torch.Tensor, values_SKH: torch.Tensor) -> torch.Tensor:
    """One query against its own keys and values, in float64."""
    heads = q_NH.size(0) // K
    keys, values = (x.double().repeat_interleave(heads, 1) for x in (keys_SKH, values_SKH))
    scores = torch.einsum("nh,snh->ns", q_NH.double(), keys) * SCALE
    return torch.einsum("ns,snh->nh", scores.softmax(-1), values)


def test_sequences_of_any_lengths_come_and_go_and_read_their_own_keys() -> None:
    random, generator = np.random.default_rng(3), torch.Generator().manual_seed(3)
    cache = KVCache(6, 200, torch.device("cpu"))
    live: list[list[torch.Tensor]] = []  # of every live sequence: its keys, its values
    most = 0

    def some(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, H, generator=generator)

    for _ in range(150):
        if len(live) < 6 and random.random() < 0.2:
            length = int(random.integers(1, 90))
            new = [some(length, K), some(length, K)]
            cache.plan(torch.full((length,), len(live)), torch.arange(length), decoding=False)
            cache.store(1, *new)
            live.append(new)
        elif live:
            queries, new = some(len(live), 2 * K), [some(len(live), K), some(len(live), K)]
            positions = torch.tensor([len(one[0]) for one in live])
            cache.plan(torch.arange(len(live)), positions, decoding=True)
            found = cache.attend(1, queries, *new, SCALE)
            for index, one in enumerate(live):
                one[:] = [torch.cat([old, x[index : index + 1]]) for old, x in zip(one, new, strict=True)]
                wanted = dense(queries[index], one[0], one[1])
                assert (found[index] - wanted).abs().max() < 1e-5
        for slot in reversed(range(len(live))):
            if random.random() < 0.03 or len(live[slot][0]) > 190:
                cache.release(slot)
                last = live.pop()
                if slot < len(live):
                    live[slot] = last
                    cache.move(len(live), slot)
        needed = sum(blocks(len(one[0])) for one in live)
        assert cache.num_used == needed
        most = max(most, needed)
    assert most <= cache.num_blocks <= 1.25 * most + 1, "the pool is as large as the lengths need"
    assert cache.num_blocks < 6 * blocks(200)


@pytest.fixture(scope="module")
def engine() -> Engine:
    found = Engine(MODEL, ParallelConfig(), init_layout(ParallelConfig()), TrainConfig())
    load_weights(found.models, MODEL, random_weights(MODEL, 7), 0, 1)
    return found


def test_what_does_not_fit_is_refused_before_a_token(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, options = [SampleRequest((5, 6), (number,)) for number in range(8)], SamplingOptions(30)
    # 2 tensors x 2 layers x 2 KV heads x 8 numbers of 4 bytes for each of 32 tokens
    one = 2 * 2 * 2 * 8 * 4 * 32
    monkeypatch.setattr(embedded, "free_bytes", lambda device: 5 * one + 7)
    sampler = EmbeddedEngine(engine, STOP_IDS, 8)
    with pytest.raises(
        UserError, match=r"sampling\.num_slots: keys and values of 8 sequences .*at most 5 fit"
    ):
        sampler.generate(requests, options)
    assert len(EmbeddedEngine(engine, STOP_IDS, 5).generate(requests, options)) == 8


def test_the_size_is_said_once_before_sampling(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedded, "SAID", 1)
    sampler = EmbeddedEngine(engine, STOP_IDS, 4)
    for _ in range(2):
        sampler.generate([SampleRequest((5,), (number,)) for number in range(9)], SamplingOptions(10))
    line = "sampling: keys and values of 4 sequences of at most 11 tokens take up to 0.00 GiB"
    assert capsys.readouterr().out.count(line) == 1


def test_this_machine_has_memory() -> None:
    assert 2**28 < embedded.free_bytes(torch.device("cpu")) < 2**45
