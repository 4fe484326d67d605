"""From trajectories to packed rows, and the GRPO objective as the loss the training engine takes.

Every per-token quantity rides in the rows as an extra aligned with its target token, so it is cut, packed and
dealt to ranks by the same code as the tokens:

    advantages, weights         A_i and w_t of `rl.objective`
    counts                      what a token adds to the loss's whole-number denominator
    rollout_logprobs            the sampler's log-prob
    old_logprobs, ref_logprobs  of the policy that sampled (only off-policy) and of the frozen reference
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from phi4r_kernels.linear_loss import LinearLossResult, LossSpec
from torch import Tensor

from phi4r.data.packing import Document
from phi4r.objectives.grpo import (
    MAX_LOG_RATIO,
    Normalization,
    ObjectiveSettings,
    normalization_weights,
    token_loss,
)
from phi4r.sampling.types import Sample
from phi4r.train.engine import RowTensors, TokenLoss


def response_documents(
    samples: Sequence[Sample],
    advantages: Sequence[float],
    normalization: Normalization,
    constant: int,
) -> list[Document]:
    """One document per sample: prompt and response tokens, the response as targets, with the extras of the
    loss.

    advantages: one per sample. constant: L_max of the "constant" normalisation, in tokens.
    """
    lengths = [sample.num_tokens for sample in samples]
    weights, _ = normalization_weights(lengths, normalization, constant)
    documents = []
    for sample, advantage, weight in zip(samples, advantages, weights, strict=True):
        prompt, length = len(sample.prompt_tokens), sample.num_tokens
        mask = np.arange(prompt + length) >= prompt
        counts = mask.astype(np.float32)
        if normalization != "token":
            counts[prompt + 1 :] = 0  # a response counts once, at its first token
        rollout = np.zeros(prompt + length, dtype=np.float32)
        rollout[prompt:] = sample.logprobs
        extras = {
            "advantages": np.where(mask, advantage, 0.0).astype(np.float32),
            "weights": np.where(mask, weight, 0.0).astype(np.float32),
            "counts": counts,
            "rollout_logprobs": rollout,
        }
        tokens = np.concatenate([sample.prompt_tokens, sample.tokens]).astype(np.int32)
        documents.append(Document(tokens, mask, extras))
    return documents


def with_extra(
    documents: Sequence[Document], name: str, values: Sequence[npt.NDArray[np.float32]]
) -> list[Document]:
    """The documents with one more extra, float32 per token each (`packing.unpack` gives them so)."""
    return [
        Document(document.tokens, document.loss_mask, {**document.extras, name: value.astype(np.float32)})
        for document, value in zip(documents, values, strict=True)
    ]


def loss_spec(settings: ObjectiveSettings) -> LossSpec:
    """The objective as the head takes it; normalisation is in the rows' weights."""
    return LossSpec(
        kind="policy",
        surrogate=settings.surrogate,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
        kl_coef=settings.kl_coef,
        kl_reference=settings.kl_reference,
        kl_estimator=settings.kl_estimator,
        entropy_coef=settings.entropy_coef,
        importance_cap=settings.importance_cap,
        ratio=settings.ratio,
    )


def rollout_gap_sums(
    trainer_logprobs_T: Tensor, rollout_logprobs_T: Tensor, threshold: float
) -> dict[str, Tensor]:
    """Sums over sampled tokens of how the trainer's and the sampler's log-probs differ, d_t = log pi_trainer
    - log pi_rollout, w_t = exp(d_t):

    `logprob_gap` sum |d_t|, `max_logprob_gap` max |d_t|, `logprob_far` tokens with |d_t| > threshold,
    `rollout_weight` sum w_t and `rollout_weight_squared` sum w_t^2, for the effective sample size.
    """
    log_ratio_T = (trainer_logprobs_T - rollout_logprobs_T).double()
    gap_T = log_ratio_T.abs()
    weight_T = log_ratio_T.clamp(max=MAX_LOG_RATIO).exp()
    return {
        "logprob_gap": gap_T.sum(),
        "max_logprob_gap": gap_T.max() if len(gap_T) else gap_T.sum(),
        "logprob_far": (gap_T > threshold).sum(),
        "rollout_weight": weight_T.sum(),
        "rollout_weight_squared": weight_T.square().sum(),
    }


def grpo_loss(settings: ObjectiveSettings, *, on_policy: bool, gap_threshold: float = 0.1) -> TokenLoss:
    """The objective of `rl.objective` over a row that carries the extras above.

    on_policy: the weights have not moved since sampling, so the ratio is 1 by definition and no old log-probs
    are needed. Beside the objective's sums it reports how far the sampler is from the trainer at the weights
    that sampled: `rollout_gap_sums`.
    """

    def terms(row: RowTensors) -> dict[str, Tensor]:
        found = {f"{name}_T": row[name] for name in ("weights", "advantages", "rollout_logprobs")}
        if "ref_logprobs" in row:
            found["ref_logprobs_T"] = row["ref_logprobs"]
        if not on_policy:
            found["old_logprobs_T"] = row["old_logprobs"]
        return found

    def report(result: LinearLossResult, row: RowTensors) -> tuple[Tensor, dict[str, Tensor]]:
        _, sums = token_loss(
            result.logprobs_T,
            result.entropy_T,
            None if on_policy else row["old_logprobs"],
            row.get("ref_logprobs"),
            row["advantages"],
            row["weights"],
            settings,
            rollout_logprobs_T=row["rollout_logprobs"],
            sequence_log_ratio_T=result.log_ratio_T,
        )
        sampled_by_T = result.logprobs_T if on_policy else row["old_logprobs"]
        active_T = row["weights"] != 0
        gaps = rollout_gap_sums(sampled_by_T[active_T], row["rollout_logprobs"][active_T], gap_threshold)
        return row["counts"].sum(), {**sums, **gaps}

    return TokenLoss(loss_spec(settings), terms, report)
