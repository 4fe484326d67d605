"""From trajectories to packed rows, and the objective as the loss the training engine takes.

Every per-token quantity rides in the rows as an extra aligned with its target token, so it is cut, packed and
dealt to ranks by the same code as the tokens:

    advantages, weights         A_i and w_t of `phi4r.objectives`
    counts                      what a token adds to the loss's whole-number denominator
    rollout_logprobs            the sampler's log-prob
    old_logprobs, ref_logprobs  of the policy before the step and of the frozen reference, where needed
    selected, top_entropy       1 for tokens chosen among all of the step, for objectives that choose some
    entropy_weights             weights of the entropy, where it is averaged over tokens and the loss is not
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from phi4r_kernels.linear_loss import LinearLossResult
from phi4r_kernels.linear_loss.tokens import MAX_LOG_RATIO
from torch import Tensor

from phi4r.configs.sections import ObjectiveConfig
from phi4r.data.packing import Document, PackedRow, pack
from phi4r.objectives.objective import PolicyObjective
from phi4r.objectives.selection import by_covariance, top_entropy
from phi4r.objectives.terms import bounded, kl_estimate, normalization_weights
from phi4r.sampling.types import Sample
from phi4r.train.engine import RowTensors, TokenLoss


def response_documents(
    samples: Sequence[Sample], advantages: Sequence[float], settings: ObjectiveConfig, constant: int
) -> list[Document]:
    """One document per sample: prompt and response tokens, the response as targets, with the extras of the
    loss.

    advantages: one per sample. constant: L_max of the "constant" normalisation, in tokens, where the settings
    give none. Truncated answers that are to be left out have no weights; where responses are counted, they
    are among them.
    """
    lengths = [sample.num_tokens for sample in samples]
    mode = settings.normalization
    weights, _ = normalization_weights(lengths, mode, settings.constant or constant)
    documents = []
    for sample, advantage, weight in zip(samples, advantages, weights, strict=True):
        prompt, length = len(sample.prompt_tokens), sample.num_tokens
        mask = np.arange(prompt + length) >= prompt
        trained = mask & (sample.finished or not settings.drop_truncated)
        counts = trained.astype(np.float32)
        if mode != "token":
            counts = (np.arange(prompt + length) == prompt).astype(np.float32)  # a response counts once
        rollout = np.zeros(prompt + length, dtype=np.float32)
        rollout[prompt:] = sample.logprobs
        extras = {
            "advantages": np.where(mask, advantage, 0.0).astype(np.float32),
            "weights": np.where(trained, weight, 0.0).astype(np.float32),
            "counts": counts,
            "rollout_logprobs": rollout,
        }
        tokens = np.concatenate([sample.prompt_tokens, sample.tokens]).astype(np.int32)
        documents.append(Document(tokens, mask, extras))
    return documents


def pack_updates(
    documents: Sequence[Document], parts: Sequence[npt.NDArray[np.int64]], length: int
) -> list[list[PackedRow]]:
    """The rows of each update, whose documents are `parts`. `doc_index` counts through all documents."""
    updates = []
    for part in parts:
        numbers = np.append(part, -1).astype(np.int32)  # padding, -1, finds the last
        rows = pack([documents[index] for index in part], length)
        updates.append([replace(row, doc_index=numbers[row.doc_index]) for row in rows])
    return updates


def with_extra(
    rows: Sequence[PackedRow], name: str, values: Sequence[npt.NDArray[Any]] | npt.NDArray[Any]
) -> list[PackedRow]:
    """The rows with one more extra; values: one array [T] a row, aligned with its labels."""
    return [
        replace(row, extras={**row.extras, name: value.astype(np.float32)})
        for row, value in zip(rows, values, strict=True)
    ]


def with_entropy_weights(rows: Sequence[PackedRow]) -> list[PackedRow]:
    """The rows of one update with weights of their entropies that make the loss's share of them a mean over
    tokens: count / tokens, which the division by the count takes back."""
    trained = [row.extras["weights"] != 0 for row in rows]
    count = sum(float(row.extras["counts"].sum()) for row in rows)
    weight = count / max(sum(int(each.sum()) for each in trained), 1)
    return with_extra(rows, "entropy_weights", [each * np.float32(weight) for each in trained])


def with_selected_tokens(
    rows: Sequence[PackedRow],
    entropies: Sequence[npt.NDArray[np.float32]],
    settings: ObjectiveConfig,
    random: np.random.Generator,
) -> list[PackedRow]:
    """The rows of a step, which have old_logprobs, with the tokens that the objective chooses among them all.
    entropies: one array [T] a row, before the first update."""
    trained = np.concatenate([row.extras["weights"] for row in rows]) != 0
    ends = np.cumsum([len(row.extras["weights"]) for row in rows])[:-1]

    def marked(chosen_N: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.float32]]:
        marks = np.zeros(len(trained), dtype=np.float32)
        marks[trained] = chosen_N
        return np.split(marks, ends)

    def of_trained(values: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return np.concatenate(list(values))[trained]

    result = list(rows)
    if not trained.any():
        nothing = marked(np.zeros(0, dtype=np.bool_))
        return with_extra(with_extra(result, "top_entropy", nothing), "selected", nothing)
    if settings.top_entropy < 1:
        chosen_N = top_entropy(of_trained(entropies), settings.top_entropy)
        result = with_extra(result, "top_entropy", marked(chosen_N))
    if settings.surrogate in ("clip_cov", "kl_cov"):
        old_N, advantages_N = (
            of_trained([row.extras[name] for row in rows]) for name in ("old_logprobs", "advantages")
        )
        chosen_N = by_covariance(old_N, advantages_N, settings, random)
        result = with_extra(result, "selected", marked(chosen_N))
    return result


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


def policy_loss(settings: ObjectiveConfig, *, on_policy: bool, gap_threshold: float = 0.1) -> TokenLoss:
    """The objective of `settings` over a row that carries the extras above.

    on_policy: the weights have not moved since the step began, so the ratio is 1 by definition and no old
    log-probs are needed. Reported, each summed over tokens: the objective's metrics, `num_tokens`, `entropy`,
    `kl_old` and `kl_ref` (both k3, the last where the row has it), and how far the sampler is from the
    trainer at the weights before the step: `rollout_gap_sums`. Raises ConfigError for a surrogate that cannot
    be found.
    """
    objective = PolicyObjective.make(settings)
    wanted = {
        "advantages": True,
        "rollout_logprobs": True,
        "old_logprobs": not on_policy,
        "ref_logprobs": settings.needs_ref,
        "selected": settings.surrogate in ("clip_cov", "kl_cov"),
        "top_entropy": settings.top_entropy < 1,
        "entropy_weights": settings.entropy_mean == "token",
    }

    def report(result: LinearLossResult, row: RowTensors) -> tuple[Tensor, dict[str, Tensor]]:
        active_T = row["weights"] != 0
        policy_T = result.logprobs_T
        old_T = policy_T if on_policy else row["old_logprobs"]

        def kl(other_T: Tensor) -> Tensor:
            difference_T = torch.where(active_T, policy_T - other_T, torch.zeros_like(policy_T))
            return kl_estimate(bounded(difference_T), "k3").sum()

        sums = {name: values_T.sum() for name, values_T in result.metrics.items()}
        sums |= {"num_tokens": active_T.sum(), "entropy": result.entropy_T.sum(), "kl_old": kl(old_T)}
        if "ref_logprobs" in row:
            sums["kl_ref"] = kl(row["ref_logprobs"])
        gaps = rollout_gap_sums(old_T[active_T], row["rollout_logprobs"][active_T], gap_threshold)
        return row["counts"].sum(), {**sums, **gaps}

    return TokenLoss(
        objective=objective,
        weights="weights",
        report=report,
        terms=tuple(name for name, is_wanted in wanted.items() if is_wanted),
        reads_sequences=settings.reads_sequences,
        fused=objective.fused,
    )
