"""From samples to the gradient: what rows carry, and the whole GRPO step against autograd in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from phi4r.configs.sections import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig, TrainConfig
from phi4r.data.packing import Document, pack, unpack
from phi4r.models.names import from_mcore, load_weights, local_weights, random_weights
from phi4r.objectives.terms import Normalization
from phi4r.parallel.layout import init_layout
from phi4r.rl.batch import pack_updates, policy_loss, response_documents
from phi4r.sampling.types import Sample
from phi4r.train.engine import Engine, StepResult

VOCAB, ROW, CONSTANT = 48, 40, 25
MODEL = ModelConfig(
    num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, head_dim=4,
    vocab_size=VOCAB, max_position_embeddings=ROW,
)  # fmt: skip
NORMALIZATIONS: list[Normalization] = ["token", "sequence", "constant"]
# prompt and response lengths; the last fills a row by itself, several share one
LENGTHS = [(3, 5), (1, 12), (6, 1), (2, 2), (5, 9), (4, 7), (1, 1), (10, 30)]
ADVANTAGES = [1.2, -0.7, 0.4, -1.5, 0.0, 0.9, -0.3, 0.6]


def samples() -> list[Sample]:
    random = np.random.default_rng(4)
    return [
        Sample(
            prompt_index=index // 2,
            sample_index=index % 2,
            prompt_tokens=random.integers(0, VOCAB, prompt).astype(np.int32),
            tokens=random.integers(0, VOCAB, length).astype(np.int32),
            logprobs=random.normal(-3.5, 0.3, length).astype(np.float32),
            finished=True,
            text="",
        )
        for index, (prompt, length) in enumerate(LENGTHS)
    ]


def documents(normalization: Normalization) -> list[Document]:
    settings = ObjectiveConfig(normalization=normalization)
    return response_documents(samples(), ADVANTAGES, settings, CONSTANT)


# --- what rows carry


@pytest.mark.parametrize(
    ("normalization", "count", "weight"),
    [
        ("token", sum(n for _, n in LENGTHS), lambda n: 1.0),
        ("sequence", len(LENGTHS), lambda n: 1.0 / n),
        ("constant", len(LENGTHS), lambda n: 1.0 / CONSTANT),
    ],
)
def test_packed_rows_carry_each_normalisations_weights_and_count(
    normalization: Normalization, count: int, weight: Any
) -> None:
    made = documents(normalization)
    rows = pack(made, ROW)
    assert len(rows) < len(made), "several documents share a row"
    assert sum(float(row.extras["counts"].sum()) for row in rows) == count
    for name in ("weights", "advantages", "rollout_logprobs"):
        found = unpack(rows, [row.extras[name] for row in rows], made)
        for sample, advantage, values in zip(samples(), ADVANTAGES, found, strict=True):
            prompt, length = len(sample.prompt_tokens), sample.num_tokens
            wanted = {
                "weights": np.full(length, weight(length)),
                "advantages": np.full(length, advantage),
                "rollout_logprobs": sample.logprobs,
            }[name]
            assert not values[:prompt].any(), f"{name} of a prompt"
            assert values[prompt:] == pytest.approx(wanted, rel=1e-6)
    for row in rows:
        assert np.array_equal(row.extras["weights"] != 0, row.loss_mask == 1), "weights stand on the targets"
        assert not row.extras["counts"][row.loss_mask == 0].any()


def test_documents_are_prompt_and_response_with_the_response_as_targets() -> None:
    for sample, document in zip(samples(), documents("token"), strict=True):
        assert document.tokens.tolist() == [*sample.prompt_tokens.tolist(), *sample.tokens.tolist()]
        assert document.loss_mask.tolist() == [False] * len(sample.prompt_tokens) + [True] * sample.num_tokens


# --- the same in float64, one sequence at a time


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + MODEL.rms_norm_eps).sqrt() * weight


def rotate(x_NTH: Tensor) -> Tensor:
    """RoPE: the pair (i, i + H/2) turned by position x theta^(-2i/H)."""
    half = MODEL.head_dim // 2
    rates = MODEL.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x_NTH.size(1), dtype=torch.float64)[:, None] * rates
    a, b = x_NTH[..., :half], x_NTH[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def logits(w: dict[str, Tensor], ids_T: Tensor) -> Tensor:
    """Phi-4's forward of one sequence, written out: float64 [T, vocabulary]."""
    N, K, H, F = MODEL.num_attention_heads, MODEL.num_query_groups, MODEL.head_dim, MODEL.ffn_hidden_size
    T = len(ids_T)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    x = w["model.embed_tokens.weight"][ids_T]
    for layer in range(MODEL.num_layers):
        p = f"model.layers.{layer}."
        qkv = rms_norm(x, w[p + "input_layernorm.weight"]) @ w[p + "self_attn.qkv_proj.weight"].T
        q, k, v = (part.view(T, -1, H).transpose(0, 1) for part in qkv.split([N * H, K * H, K * H], -1))
        k, v = (part.repeat_interleave(N // K, 0) for part in (rotate(k), v))
        scores = (rotate(q) @ k.transpose(1, 2) / math.sqrt(H)).masked_fill(future, -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1) @ w[p + "self_attn.o_proj.weight"].T
        gate_up = rms_norm(x, w[p + "post_attention_layernorm.weight"]) @ w[p + "mlp.gate_up_proj.weight"].T
        gate, up = gate_up.split(F, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def weights(name: str) -> Tensor:
    """Random weights, the head enlarged so that the policy is not nearly uniform."""
    return random_weights(MODEL, 9)(name) * (12.0 if name == "lm_head.weight" else 1.0)


def shifted(seed: int, spread: float) -> list[np.ndarray]:
    """Log-probs of other policies: those of the policy, moved at random so that ratios get clipped."""
    random = np.random.default_rng(seed)
    return [random.normal(0, spread, n).astype(np.float32) for _, n in LENGTHS]


def reference(
    w: dict[str, Tensor],
    objective: ObjectiveConfig,
    temperature: float,
    old: list[np.ndarray] | None,
    ref: list[np.ndarray],
) -> Tensor:
    """The objective as the report prints it, sequence by sequence. old None: this policy itself."""
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for index, sample in enumerate(samples()):
        prompt, length, advantage = len(sample.prompt_tokens), sample.num_tokens, ADVANTAGES[index]
        ids = torch.from_numpy(np.concatenate([sample.prompt_tokens, sample.tokens])).long()
        logprobs_LV = (logits(w, ids)[prompt - 1 : -1] / temperature).log_softmax(-1)
        policy_L = logprobs_LV.gather(1, ids[prompt:, None])[:, 0]
        entropy_L = -(logprobs_LV.exp() * logprobs_LV).sum(-1)
        old_L = policy_L.detach() if old is None else torch.from_numpy(old[index]).double()
        log_ratio_L = policy_L - old_L
        if objective.ratio == "sequence":
            log_ratio_L = log_ratio_L.mean().expand(length)
        ratio_L = log_ratio_L.exp()
        surrogate_L = torch.minimum(
            ratio_L * advantage, ratio_L.clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantage
        )
        if advantage < 0 and objective.dual_clip:
            surrogate_L = surrogate_L.clamp(min=objective.dual_clip * advantage)
        if objective.importance_cap:
            gap_L = old_L.detach() - torch.from_numpy(sample.logprobs).double()
            surrogate_L = surrogate_L * gap_L.exp().clamp(max=objective.importance_cap)
        other_L = old_L if objective.kl_reference == "old" else torch.from_numpy(ref[index]).double()
        kl_L = (other_L - policy_L).exp() - 1 - (other_L - policy_L)
        loss_L = -surrogate_L + objective.kl_coef * kl_L - objective.entropy_coef * entropy_L
        if objective.normalization == "token":
            total, count = total + loss_L.sum(), count + length
        elif objective.normalization == "sequence":
            total, count = total + loss_L.mean(), count + 1
        else:
            total, count = total + loss_L.sum() / CONSTANT, count + 1
    return total / count


def test_rows_of_all_updates_hold_every_document_once() -> None:
    made = documents("token")
    parts = [np.array([4, 0, 2]), np.array([1, 3, *range(5, len(made))])]
    updates = pack_updates(made, parts, ROW)
    for part, rows in zip(parts, updates, strict=True):
        assert sorted({int(i) for row in rows for i in row.doc_index if i >= 0}) == sorted(part.tolist())
    found = [row for rows in updates for row in rows]
    for index, document in enumerate(made):
        (tokens,) = (row.input_ids[row.doc_index == index] for row in found if index in row.doc_index)
        assert tokens.tolist() == document.tokens.tolist()


def make_engine() -> Engine:
    settings, optimizer = TrainConfig(logit_chunk_size=11), OptimizerConfig(clip_grad=0.0)
    engine = Engine(MODEL, ParallelConfig(), init_layout(ParallelConfig()), settings, optimizer)
    load_weights(engine.models, MODEL, weights, 0, 1)
    engine.sync_optimizer()
    return engine


def add(made: list[Document], name: str, values: list[np.ndarray]) -> list[Document]:
    """`values` [response length] as extra `name` of documents, and on prompts what must not count."""
    full = []
    for document, value in zip(made, values, strict=True):
        array = np.full(len(document.tokens), 77.0, dtype=np.float32)
        array[len(array) - len(value) :] = value
        full.append(array)
    return [
        replace(document, extras={**document.extras, name: value})
        for document, value in zip(made, full, strict=True)
    ]


def policy_logprobs(engine: Engine, temperature: float) -> list[np.ndarray]:
    """The engine's own log-probs of the responses."""
    made = documents("token")
    rows = pack(made, ROW)
    values = unpack(rows, list(engine.forward(rows, temperature=temperature)[0]), made)
    return [value[prompt:] for value, (prompt, _) in zip(values, LENGTHS, strict=True)]


def step(
    engine: Engine,
    objective: ObjectiveConfig,
    temperature: float,
    old: list[np.ndarray] | None,
    ref: list[np.ndarray],
) -> tuple[StepResult, dict[str, Tensor]]:
    """One training step on packed rows at learning rate 0: its result, and every gradient by its HF name."""
    made = add(documents(objective.normalization), "ref_logprobs", ref)
    made = add(made, "rollout_logprobs", [sample.logprobs for sample in samples()])
    if old is not None:
        made = add(made, "old_logprobs", old)
    loss = policy_loss(objective, on_policy=old is None)
    result = engine.train_step(pack(made, ROW), loss, 0.0, temperature=temperature, with_entropy=True)
    gradients = {
        weight.hf: from_mcore(weight, parameter.main_grad).double().clone()
        for weight, parameter in local_weights(engine.models, MODEL)
    }
    return result, gradients


@pytest.mark.parametrize("on_policy", [True, False], ids=["on_policy", "off_policy"])
@pytest.mark.parametrize(
    ("normalization", "ratio", "importance_cap"),
    [
        *((each, "token", 0.0) for each in NORMALIZATIONS),
        ("sequence", "sequence", 0.0),
        ("token", "token", 1.5),
    ],
)
@pytest.mark.proves(
    "GRPO on packed rows equals GRPO on one sequence at a time", how="loss and every gradient, autograd"
)
def test_loss_and_every_gradient_equal_autograd_on_unpacked_sequences(
    normalization: Normalization, ratio: Any, importance_cap: float, on_policy: bool
) -> None:
    temperature = 0.8
    objective = ObjectiveConfig(
        normalization=normalization, clip_low=0.2, clip_high=0.28, dual_clip=1.5, kl_coef=0.3,
        kl_reference="ref", entropy_coef=0.1, ratio=ratio, importance_cap=importance_cap,
    )  # fmt: skip
    engine = make_engine()
    policy = policy_logprobs(engine, temperature)
    old = None if on_policy else [p + d for p, d in zip(policy, shifted(1, 0.9), strict=True)]
    ref = [p + d for p, d in zip(policy, shifted(2, 0.5), strict=True)]

    result, gradients = step(engine, objective, temperature, old, ref)

    double = {name: weights(name).double().requires_grad_() for name in gradients}
    wanted = reference(double, objective, temperature, old, ref)
    wanted.backward()
    # fp32 rounding of sums over some dozen tokens, relative to the loss and to a gradient's largest entry
    assert result.loss == pytest.approx(float(wanted), rel=2e-5, abs=2e-6)
    for name, gradient in gradients.items():
        expected = double[name].grad
        assert expected is not None
        assert (gradient - expected).abs().max() <= 5e-5 * expected.abs().max(), name
    if not on_policy and ratio == "token":
        assert all(result.sums[bound] > 0 for bound in ("clipped_low", "clipped_high", "dual_clipped"))


@pytest.mark.parametrize("kl_reference", ["old", "ref"])
def test_on_and_off_policy_are_one_where_the_old_policy_is_the_policy(kl_reference: Any) -> None:
    objective = ObjectiveConfig(kl_coef=0.2, kl_reference=kl_reference, entropy_coef=0.05)
    engine = make_engine()
    policy = policy_logprobs(engine, 1.0)
    ref = [p + d for p, d in zip(policy, shifted(2, 0.5), strict=True)]
    on_result, on = step(engine, objective, 1.0, None, ref)
    off_result, off = step(engine, objective, 1.0, policy, ref)
    # Both passes add up the same numbers, so the ratio is 1 to the last bit or next to it.
    assert off_result.loss == pytest.approx(on_result.loss, rel=1e-6)
    assert off_result.sums["ratio"] == pytest.approx(off_result.sums["num_tokens"], rel=1e-6)
    assert max(gradient.abs().max() for gradient in on.values()) > 1e-2
    for name, gradient in on.items():
        assert (gradient - off[name]).abs().max() <= 1e-6 * gradient.abs().max(), name


def test_the_gap_between_rollout_and_policy_is_measured_on_responses_only() -> None:
    engine = make_engine()
    policy = policy_logprobs(engine, 1.0)
    result, _ = step(engine, ObjectiveConfig(), 1.0, None, policy)
    gaps = [np.abs(p - s.logprobs) for p, s in zip(policy, samples(), strict=True)]
    assert result.sums["logprob_gap"] == pytest.approx(sum(float(gap.sum()) for gap in gaps), rel=1e-5)
    assert result.sums["max_logprob_gap"] == pytest.approx(max(float(gap.max()) for gap in gaps), rel=1e-5)
