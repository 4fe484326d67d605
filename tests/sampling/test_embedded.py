"""The embedded sampler: its draws depend on weights and counters alone, its log-probs are the trainer's."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from phi4r.configs.sections import ModelConfig, ParallelConfig, TrainConfig
from phi4r.data.packing import Document, pack, unpack
from phi4r.models.names import load_weights, random_weights
from phi4r.parallel.layout import init_layout
from phi4r.sampling import embedded as rollout
from phi4r.sampling.embedded import PREFILL_TOKENS, EmbeddedEngine, draw_tokens, uniforms
from phi4r.sampling.types import Completion, SampleRequest, SamplingOptions
from phi4r.train.engine import Engine

VOCAB, STOP_IDS = 64, (3, 4)
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, head_dim=8,
    vocab_size=VOCAB, max_position_embeddings=64,
)  # fmt: skip
ALMOST_ONE = float(np.nextafter(1.0, 0.0))


def peaked_weights(name: str) -> Tensor:
    """Random weights with a head so large that some tokens are much likelier than others."""
    return random_weights(MODEL, 7)(name) * (20.0 if name == "lm_head.weight" else 1.0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    made = Engine(MODEL, ParallelConfig(), init_layout(ParallelConfig()), TrainConfig(logit_chunk_size=24))
    load_weights(made.models, MODEL, peaked_weights, 0, 1)
    return made


def requests(count: int = 24) -> list[SampleRequest]:
    """Prompts of 1 to 8 tokens, each with a stream of its own."""
    random = np.random.default_rng(5)
    return [
        SampleRequest(tuple(random.integers(0, VOCAB, int(random.integers(1, 9))).tolist()), (0, number))
        for number in range(count)
    ]


def sample(engine: Engine, made: list[SampleRequest], num_slots: int, **options: float) -> list[Completion]:
    settings = SamplingOptions(**{"max_new_tokens": 20, **options})  # type: ignore[arg-type]
    return EmbeddedEngine(engine, STOP_IDS, num_slots).generate(made, settings)


def trainers_logprobs(
    engine: Engine, made: list[SampleRequest], completions: list[Completion], temperature: float
) -> list[np.ndarray]:
    """Log-probs of the sampled tokens by the trainer's own pass."""
    documents = []
    for request, completion in zip(made, completions, strict=True):
        tokens = np.array([*request.prompt_tokens, *completion.tokens], dtype=np.int32)
        documents.append(Document(tokens, np.arange(len(tokens)) >= len(request.prompt_tokens)))
    rows = pack(documents, 64)
    forward = unpack(rows, list(engine.forward(rows, temperature=temperature)[0]), documents)
    return [values[len(r.prompt_tokens) :] for values, r in zip(forward, made, strict=True)]


def rounding(trainer: np.ndarray, temperature: float) -> float:
    """How far apart two computations of these log-probs may be.

    Both compute the same sums in another order. One path through the network adds up D, H, n, N H, D and F
    terms in a layer and D in the head; roundings of 2^-24 each add up like a random walk, and eight
    deviations cover the largest of some hundred log-probs in two computations.
    """
    per_layer = 32 + 8 + 28 + 32 + 32 + 64
    walk = math.sqrt(MODEL.num_layers * per_layer + 32) * 2.0**-24
    return float(8 * walk * np.abs(trainer).max() / temperature)


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


# --- counters


@pytest.mark.parametrize("num_slots", [1, 3, 7, 500])
@pytest.mark.proves(
    "A sample does not depend on how many are drawn at once",
    how="token by token, other numbers of cache slots",
)
def test_samples_do_not_depend_on_the_number_of_slots(engine: Engine, num_slots: int) -> None:
    reference = tokens_of(sample(engine, requests(), 24))
    assert len({len(tokens) for tokens in reference}) > 4, "sequences should end at different times"
    assert tokens_of(sample(engine, requests(), num_slots)) == reference


def test_the_last_prompts_do_not_wait_for_the_others_to_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 44)  # 24 prompts of 4 tokens come in turns of 11, 11 and 2
    sampler, steps = EmbeddedEngine(engine, (), 24), []
    decode = sampler._decode
    monkeypatch.setattr(sampler, "_decode", lambda *args: (steps.append(len(args[1])), decode(*args)))
    sampler.generate([SampleRequest((5, 6, 7, 8), (0, i)) for i in range(24)], SamplingOptions(20))
    assert steps == [24] * 19


def test_samples_do_not_depend_on_order_or_neighbours(engine: Engine) -> None:
    reference = tokens_of(sample(engine, requests(), 4))
    assert tokens_of(sample(engine, requests()[::-1], 4)) == reference[::-1]
    assert tokens_of(sample(engine, requests()[9:12], 4)) == reference[9:12]
    assert sample(engine, [], 4) == []


def test_prompts_beyond_one_prefill_wait_their_turn(engine: Engine) -> None:
    many = requests(600)
    assert sum(len(request.prompt_tokens) for request in many) > PREFILL_TOKENS
    together = tokens_of(sample(engine, many, 600, max_new_tokens=3))
    assert together == tokens_of(sample(engine, many, 50, max_new_tokens=3))


def test_the_key_of_a_request_changes_its_sample(engine: Engine) -> None:
    same, other = requests()[0], dataclasses.replace(requests()[0], key=(0, 999))
    first, second, third = tokens_of(sample(engine, [same, same, other], 3, max_new_tokens=20))
    assert first == second
    assert first != third


def test_uniforms_depend_on_the_key_only() -> None:
    long = uniforms((1, 2, 3), 1000)
    assert np.array_equal(uniforms([1, 2, 3], 10), long[:10])
    assert long.dtype == np.float64
    assert long.min() >= 0
    assert long.max() < 1
    others = [uniforms(key, 10) for key in ((1, 2, 4), (3, 2, 1), (1, 2), (1, 2, 3, 1), (0, 1, 2, 3))]
    for other in others:
        assert not np.isin(other, long).any()
    # Numbers that a saved run relies on: another version must not draw others.
    assert uniforms((0, 22, 5, 1), 3).tolist() == [
        0.34672152447699944,
        0.28546160623504924,
        0.5979702044663253,
    ]


# --- log-probs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.proves(
    "Log-probs of rollouts are the trainer's", how="the trainer's forward pass over what was sampled"
)
def test_rollout_logprobs_are_those_of_the_trainers_forward(engine: Engine, temperature: float) -> None:
    made = requests()
    completions = sample(engine, made, 5, temperature=temperature)
    trainer = np.concatenate(trainers_logprobs(engine, made, completions, temperature))
    rollout = np.concatenate([completion.logprobs for completion in completions])
    assert np.abs(trainer).max() > 5
    assert np.abs(rollout - trainer).max() <= rounding(trainer, temperature)


def test_logprobs_are_of_the_sampling_temperature_before_any_filter(engine: Engine) -> None:
    made = requests()[:6]
    plain = sample(engine, made, 6, temperature=0.7, max_new_tokens=1)
    filtered = sample(engine, made, 6, temperature=0.7, max_new_tokens=1, top_k=1)
    greedy = sample(engine, made, 6, temperature=0.0, max_new_tokens=1)
    assert tokens_of(filtered) == tokens_of(greedy)
    for one, other in zip(plain, filtered, strict=True):
        if one.tokens == other.tokens:
            assert one.logprobs == other.logprobs
    assert all(f.logprobs[0] < -1e-3 for f in filtered), "a log-prob after the filter would be 0"


# --- ends


def test_a_stop_id_ends_a_sequence_and_counts_as_finished(engine: Engine) -> None:
    completions = sample(engine, requests(), 5)
    for completion in completions:
        assert completion.finished == (completion.tokens[-1] in STOP_IDS)
        assert not set(completion.tokens[:-1]) & set(STOP_IDS)
        assert completion.finished or len(completion.tokens) == 20
        assert len(completion.logprobs) == len(completion.tokens)
    assert {completion.finished for completion in completions} == {True, False}
    assert {completion.tokens[-1] for completion in completions if completion.finished} == set(STOP_IDS)


@pytest.mark.parametrize("limit", [1, 2, 9])
def test_max_new_tokens_cuts_and_changes_nothing_before(engine: Engine, limit: int) -> None:
    whole = sample(engine, requests(), 5)
    cut = sample(engine, requests(), 5, max_new_tokens=limit)
    assert tokens_of(cut) == [completion.tokens[:limit] for completion in whole]
    assert [c.finished for c in cut] == [w.finished and len(w.tokens) <= limit for w in whole]


@pytest.mark.parametrize("num_slots", [1, 24])
def test_on_token_streams_the_first_requests_tokens_in_order(engine: Engine, num_slots: int) -> None:
    made = requests()[1:]
    streamed: list[int] = []
    completions = EmbeddedEngine(engine, STOP_IDS, num_slots).generate(
        made, SamplingOptions(20), on_token=streamed.append
    )
    assert len(streamed) > 5
    assert streamed == completions[0].tokens


# --- drawing


def draw(logits_V: Tensor, uniforms_B: list[float], **options: float) -> tuple[list[int], Tensor]:
    """Tokens and log-probs of as many draws as there are uniform numbers, from one distribution."""
    settings = SamplingOptions(1, **options)  # type: ignore[arg-type]
    logits_BV = logits_V.float().expand(len(uniforms_B), -1)
    tokens_B, logprobs_B = draw_tokens(logits_BV, torch.tensor(uniforms_B, dtype=torch.float64), settings)
    return tokens_B.tolist(), logprobs_B


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(3))
    expected = (logits_V.double() / temperature).softmax(-1).numpy()
    streams = [float(uniforms((17, i), 1)[0]) for i in range(3000)], uniforms((18,), 3000).tolist()
    for numbers in streams:
        tokens, logprobs = draw(logits_V, numbers, temperature=temperature)
        counts = np.bincount(tokens, minlength=12)
        assert stats.chisquare(counts, expected * 3000).pvalue > 1e-3
        assert torch.allclose(logprobs.double().exp(), torch.from_numpy(expected[tokens]), rtol=1e-5)


def test_temperature_zero_takes_the_likeliest_token_whatever_the_uniform() -> None:
    logits_V = torch.tensor([0.5, -1.0, 2.5, 2.4, -3.0])
    tokens, logprobs = draw(logits_V, [0.0, 0.3, 0.9, ALMOST_ONE], temperature=0.0)
    assert tokens == [2, 2, 2, 2]
    assert torch.equal(logprobs, logits_V.log_softmax(-1)[2].expand(4))


PROBS = torch.tensor([0.05, 0.3, 0.02, 0.25, 0.08, 0.2, 0.1], dtype=torch.float64)
BY_PROB = [1, 3, 5, 6, 4, 0, 2]
SWEEP = (np.arange(2000) / 2000).tolist()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, BY_PROB),
        *[({"top_k": k}, BY_PROB[:k]) for k in (1, 2, 4, 6)],
        ({"top_k": 7}, BY_PROB),
        ({"top_k": 100}, BY_PROB),
        ({"top_p": 0.01}, BY_PROB[:1]),
        ({"top_p": 0.29}, BY_PROB[:1]),
        ({"top_p": 0.31}, BY_PROB[:2]),
        ({"top_p": 0.74}, BY_PROB[:3]),
        ({"top_p": 0.76}, BY_PROB[:4]),
        ({"top_p": 0.97}, BY_PROB[:6]),
        ({"top_p": 0.99}, BY_PROB),
        # The nucleus is one of what top_k left over: 0.3, 0.25, 0.2 of 0.75.
        ({"top_k": 3, "top_p": 0.72}, BY_PROB[:2]),
        ({"top_k": 3, "top_p": 0.74}, BY_PROB[:3]),
    ],
)
def test_filters_keep_exactly_the_likeliest_tokens_in_proportion(
    options: dict[str, float], kept: list[int]
) -> None:
    tokens, logprobs = draw(PROBS.log(), SWEEP, **options)
    assert set(tokens) == set(kept)
    shares = np.bincount(tokens, minlength=7) / len(SWEEP)
    renormalised = np.zeros(7)
    renormalised[kept] = PROBS.numpy()[kept] / PROBS.numpy()[kept].sum()
    # A sweep of n even steps over [0, 1) meets an interval of width w in between n w - 1 and n w + 1 of them.
    assert np.abs(shares - renormalised).max() <= 1 / len(SWEEP) + 1e-9
    assert torch.allclose(logprobs.double().exp(), PROBS[tokens], rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}])
@pytest.mark.parametrize("seed", range(5))
def test_a_token_without_probability_is_never_drawn(options: dict[str, float], seed: int) -> None:
    logits_V = torch.randn(300, generator=torch.Generator().manual_seed(seed)) * 3
    impossible = torch.arange(300) % 3 == 0
    impossible[:5] = impossible[-50:] = True
    logits_V[impossible] = float("-inf")
    # 1.0 itself stands for a number that was rounded up on its way.
    edges = [0.0, 5e-324, 2.0**-60, 1 - 2.0**-24, ALMOST_ONE, 1.0]
    tokens, logprobs = draw(logits_V, edges, **options)
    assert not impossible[tokens].any()
    assert torch.isfinite(logprobs).all()
    if options == {}:
        possible = torch.arange(300)[~impossible]
        assert tokens[0] == possible[0]
        assert tokens[-1] == possible[-1]
