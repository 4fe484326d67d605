"""Objectives of other libraries, from their published definitions in float64: values and gradients.

The definitions stand here as papers, TRL and verl give them, one response at a time on whole logits; they
share no code with phi4r. Ours go the whole way: rows' extras by `phi4r.rl.batch`, then the head, in chunks
that cut responses. Numbers that pass through fp32 rows are exact in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from phi4r_kernels.linear_loss import linear_loss
from torch import Tensor

from phi4r.configs.sections import ObjectiveConfig
from phi4r.rl.batch import (
    policy_loss,
    response_documents,
    with_entropy_weights,
    with_extra,
    with_selected_tokens,
)
from phi4r.sampling.types import Sample

LENGTHS = [4, 8, 2, 8, 2, 8]  # with their sum powers of two or exact in fp32 as weights
ADVANTAGES = [1.25, -0.75, 0.0, -1.5, 0.5, 2.0]
FINISHED = [True, True, True, True, True, False]
VOCABULARY, HIDDEN = 11, 6


@dataclass(frozen=True)
class Response:
    """One response: the policy's log-probs and entropies, those of other policies, its advantage."""

    lp: Tensor
    H: Tensor
    old: Tensor
    ref: Tensor
    roll: Tensor
    A: float
    finished: bool

    @property
    def n(self) -> int:
        return len(self.lp)

    def per_token(self, value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64).expand(self.n)


class Data:
    """Hidden states and head with gradients, targets and log-probs of other policies, of all responses."""

    def __init__(self, spread: float) -> None:
        random = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        total = sum(LENGTHS)
        self.hidden = normal(total, HIDDEN).requires_grad_()
        self.head = normal(VOCABULARY, HIDDEN).requires_grad_()
        self.targets = torch.randint(VOCABULARY, (total,), generator=random)
        policy = self.logprobs_and_entropy()[0].detach()
        self.old, self.ref, self.roll = (
            (policy + spread * normal(total)).to(torch.float32) for _ in range(3)
        )

    def logprobs_and_entropy(self) -> tuple[Tensor, Tensor]:
        logp = (self.hidden @ self.head.T).log_softmax(-1)
        return logp.gather(1, self.targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def responses(self) -> list[Response]:
        vectors = (*self.logprobs_and_entropy(), *(x.double() for x in (self.old, self.ref, self.roll)))
        parts = zip(*(vector.split(LENGTHS) for vector in vectors), ADVANTAGES, FINISHED, strict=True)
        return [Response(*part) for part in parts]

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, (self.hidden, self.head)))


def ours(data: Data, settings: ObjectiveConfig) -> Tensor:
    """The loss as training computes it, on the responses' tokens one after another."""
    samples = [
        Sample(
            prompt_index=0, sample_index=i, prompt_tokens=np.zeros(1, np.int32),
            tokens=np.zeros(n, np.int32), logprobs=roll.numpy(), finished=finished, text="",
        )
        for i, (n, roll, finished) in enumerate(zip(LENGTHS, data.roll.split(LENGTHS), FINISHED, strict=True))
    ]  # fmt: skip
    documents = response_documents(samples, ADVANTAGES, settings, constant=16)

    def behind_prompt(vector: Tensor) -> list[np.ndarray]:
        return [np.concatenate([[0.0], part.numpy()]) for part in vector.detach().split(LENGTHS)]

    for name, vector in (("old_logprobs", data.old), ("ref_logprobs", data.ref)):
        documents = with_extra(documents, name, behind_prompt(vector))
    if settings.selects_tokens:
        entropies = behind_prompt(data.logprobs_and_entropy()[1])
        documents = with_selected_tokens(documents, entropies, settings, np.random.default_rng(0))
    if settings.entropy_mean == "token":
        documents = with_entropy_weights(documents)
    extras = {
        name: torch.from_numpy(np.concatenate([d.extras[name][1:] for d in documents]))
        for name in documents[0].extras
    }
    loss = policy_loss(settings, on_policy=False)
    sequences = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    result = linear_loss(
        data.hidden, data.head, data.targets, extras["weights"], objective=loss.objective,
        terms={name: extras[name] for name in loss.terms}, chunk_size=7, with_entropy=True,
        sequences_T=sequences if loss.reads_sequences else None,
    )  # fmt: skip
    return result.loss / extras["counts"].sum()


# --- the published definitions


def token_mean(losses: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(losses)).mean()


def sequence_mean(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack([loss.mean() for loss in losses]).mean()


def ratio(r: Response, level: str = "token") -> Tensor:
    difference = r.lp - r.old
    return (difference if level == "token" else r.per_token(difference.mean())).exp()


def clipped(r: Response, level: str = "token", low: float = 0.2, high: float = 0.2) -> Tensor:
    pi = ratio(r, level)
    return -torch.minimum(pi * r.A, pi.clamp(1 - low, 1 + high) * r.A)


def k3(r: Response) -> Tensor:
    return (r.ref - r.lp).exp() - (r.ref - r.lp) - 1


def trl_bias_corrected_kl(responses: list[Response], level: str) -> Tensor:
    return token_mean([clipped(r, level) + 0.1 * k3(r) * ratio(r, level) for r in responses])


def trl_correction(responses: list[Response], level: str, mode: str, low: float, high: float) -> Tensor:
    """token_truncate, token_mask, sequence_truncate and sequence_mask of TRL; "geometric" is verl's."""

    def weight(r: Response) -> Tensor:
        difference = r.old - r.roll
        total = {"token": difference, "sequence": difference.sum(), "geometric": difference.mean()}[level]
        i = r.per_token(total).exp()
        return i.clamp(low, high) if mode == "truncate" else i.masked_fill((i < low) | (i > high), 0.0)

    return token_mean([clipped(r) * weight(r) for r in responses])


def off_policy_sequence_mask(responses: list[Response]) -> Tensor:
    """DeepSeek-V3.2, as TRL: the KL is that of the sampler's log-probs."""
    kept = [float(r.A >= 0 or (r.roll - r.lp.detach()).mean() <= 0.05) for r in responses]
    assert sum(kept) < len(kept) or all(torch.allclose(r.roll, r.lp) for r in responses)
    return token_mean([clipped(r) * keep for r, keep in zip(responses, kept, strict=True)])


def top_entropy_tokens(responses: list[Response]) -> Tensor:
    """arXiv 2506.01939, as TRL: policy loss and entropy bonus of tokens at or above the quantile, the KL of
    all, over the count of all."""
    threshold = torch.quantile(torch.cat([r.H.detach() for r in responses]), 0.75)
    parts = [(clipped(r) - 0.1 * r.H) * (r.H.detach() >= threshold) + 0.1 * k3(r) for r in responses]
    return token_mean(parts)


def entropy_over_tokens(responses: list[Response]) -> Tensor:
    """TRL's bonus: the mean of the entropy over tokens, however the loss is normalised."""
    return sequence_mean([clipped(r) for r in responses]) - 0.1 * torch.cat([r.H for r in responses]).mean()


def gmpo(responses: list[Response]) -> Tensor:
    """arXiv 2507.20673, verl's geo_mean."""
    losses = []
    for r in responses:
        sign, difference = np.sign(r.A), r.lp - r.old
        least = sign * torch.minimum(sign * difference, sign * difference.clamp(-0.4, 0.4))
        losses.append(-r.A * least.mean().exp())
    return torch.stack(losses).mean()


def sapo(responses: list[Response], level: str) -> Tensor:
    """arXiv 2511.20347."""

    def loss(r: Response) -> Tensor:
        tau = 1.0 if r.A > 0 else 1.05
        return -r.A * torch.sigmoid(tau * (ratio(r, level) - 1)) * 4 / tau

    return sequence_mean([loss(r) for r in responses])


def covariances(responses: list[Response]) -> Tensor:
    """Of the policy before the update, which here is the old one."""
    advantages, old = (torch.cat([r.per_token(x) for r, x in zip(responses, values, strict=True)])
                       for values in ([r.A for r in responses], [r.old for r in responses]))  # fmt: skip
    return (advantages - advantages.mean()) * (old - old.mean())


def kl_cov(responses: list[Response]) -> Tensor:
    """arXiv 2505.22617, verl: the top share by covariance gets |log ratio| added."""
    values = covariances(responses)
    top = torch.zeros_like(values)
    top[values.topk(int(0.25 * len(values))).indices] = 1.0
    losses = [
        -ratio(r) * r.A + 1.5 * (r.lp - r.old).abs() * mark
        for r, mark in zip(responses, top.split(LENGTHS), strict=True)
    ]
    return token_mean(losses)


def clip_cov(responses: list[Response]) -> Tensor:
    """The same paper: tokens between the bounds are dropped at random; the share here takes all of them."""
    values = covariances(responses)
    inside = (values > 0.2) & (values < 2.0)
    assert 0 < inside.sum() < len(values)
    kept = (~inside).double().split(LENGTHS)
    return token_mean([clipped(r) * keep for r, keep in zip(responses, kept, strict=True)])


def luspo(responses: list[Response]) -> Tensor:
    """TRL: the sequence's loss times its length, averaged over sequences."""
    return torch.stack([clipped(r, "sequence").sum() for r in responses]).mean()


def cispo_of_sequences(responses: list[Response]) -> Tensor:
    """TRL's cispo with importance_sampling_level = "sequence"."""
    return token_mean([-ratio(r, "sequence").clamp(max=1.2).detach() * r.A * r.lp for r in responses])


def without_truncated(responses: list[Response], average: str) -> Tensor:
    """TRL's mask_truncated_completions: no tokens in the loss; sequences still count."""
    losses = [clipped(r) * r.finished for r in responses]
    if average == "sequence":
        return sequence_mean(losses)
    return sum(loss.sum() for loss in losses) / sum(r.n for r in responses if r.finished)


PLAIN: dict[str, Any] = dict(kl_coef=0.0, entropy_coef=0.0)
REF: dict[str, Any] = dict(kl_coef=0.1, kl_reference="ref", entropy_coef=0.0)
Published = Callable[[list[Response]], Tensor]
CASES: dict[str, tuple[dict[str, Any], Published]] = {
    "KL times ratio": (REF | dict(kl_ratio=True), lambda r: trl_bias_corrected_kl(r, "token")),
    "KL times sequence ratio": (
        REF | dict(kl_ratio=True, ratio="sequence"), lambda r: trl_bias_corrected_kl(r, "sequence"),
    ),
    **{
        f"importance {mode} {level}": (
            PLAIN | dict(importance_cap=1.5, importance_floor=0.5, importance_mode=mode, importance_level=of),
            lambda r, level=level, mode=mode: trl_correction(r, level, mode, 0.5, 1.5),
        )
        for mode in ("truncate", "mask")
        for level, of in (("token", "token"), ("sequence", "sequence"), ("geometric", "mean"))
    },
    "off-policy sequence mask": (PLAIN | dict(off_policy_limit=0.05), off_policy_sequence_mask),
    "top entropy": (REF | dict(top_entropy=0.25, entropy_coef=0.1), top_entropy_tokens),
    "entropy over tokens": (
        PLAIN | dict(entropy_coef=0.1, entropy_mean="token", normalization="sequence"), entropy_over_tokens,
    ),
    "gmpo": (PLAIN | dict(surrogate="gmpo", clip_low=0.4, clip_high=0.4, normalization="sequence"), gmpo),
    "sapo": (PLAIN | dict(surrogate="sapo", normalization="sequence"), lambda r: sapo(r, "token")),
    "sapo of sequences": (
        PLAIN | dict(surrogate="sapo", ratio="sequence", normalization="sequence"),
        lambda r: sapo(r, "sequence"),
    ),
    "kl_cov": (PLAIN | dict(surrogate="kl_cov", cov_share=0.25, cov_kl_coef=1.5), kl_cov),
    "clip_cov": (PLAIN | dict(surrogate="clip_cov", cov_share=1.0, cov_low=0.2, cov_high=2.0), clip_cov),
    "luspo": (PLAIN | dict(ratio="sequence", normalization="constant", constant=1), luspo),
    "cispo of sequences": (
        PLAIN | dict(surrogate="cispo", ratio="sequence", clip_low=1.0, clip_high=0.2), cispo_of_sequences,
    ),
    "truncated left out": (PLAIN | dict(drop_truncated=True), lambda r: without_truncated(r, "token")),
    "truncated left out, by sequence": (
        PLAIN | dict(drop_truncated=True, normalization="sequence"),
        lambda r: without_truncated(r, "sequence"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("spread", [0.0, 0.4])
@pytest.mark.proves(
    "Objectives of TRL and verl: values and both gradients", how="their published definitions, float64"
)
def test_an_objective_is_its_published_definition(name: str, spread: float) -> None:
    settings, published = CASES[name]
    data = Data(spread)
    found = ours(data, ObjectiveConfig(**settings))
    expected = published(data.responses())
    # Sums of some hundred terms of size up to about ten, in float64.
    close = dict(rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.detach(), expected.detach(), **close)
    for a, b in zip(data.gradients(found), data.gradients(expected), strict=True):
        torch.testing.assert_close(a, b, **close)


def test_clip_cov_drops_its_share_and_no_more() -> None:
    data = Data(0.4)
    settings = ObjectiveConfig(surrogate="clip_cov", cov_share=0.1, cov_low=0.2, cov_high=2.0)
    plain = ObjectiveConfig(clip_low=0.2)
    a, b = (data.gradients(ours(data, s))[0] for s in (settings, plain))
    inside = covariances(data.responses())
    changed = (a != b).any(1)
    assert changed.sum() <= int(0.1 * sum(LENGTHS))
    assert ((inside > 0.2) & (inside < 2.0))[changed].all()
