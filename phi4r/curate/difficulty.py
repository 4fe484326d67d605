"""How hard a problem is for the model that will be trained, and which problems can teach it something.

Difficulty is the pass rate over k samples: the share of sampled answers that agree with the gold answer or,
where there is none, with the plurality answer. Problems always or never solved give groups without
variance, so GRPO learns nothing from them; the paper keeps seeds "at the edge of the base model's ability"
(section 2; the thresholds are open, and so settings). The mixture then decides how often each cluster is
seen.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from phi4r.core.errors import ConfigError
from phi4r.core.problem import Problem
from phi4r.curate.stage import Removed, StageResult, split
from phi4r.verify.strict import classes, same_answer

SamplePassRate = Callable[[Sequence[Problem], int], np.ndarray]
"""(problems, k) -> pass rates float64[P] in [0, 1]: k samples each, from the model that measures
difficulty."""


def teachable_band(
    problems: Sequence[Problem], pass_rates: np.ndarray, low: float, high: float
) -> StageResult:
    """Keep problems with low <= pass rate <= high; reasons `too_hard`, `too_easy`, `not_measured`.

    `pass_rates` is float[P]; NaN means that no sample could be judged. The rate is stored in
    `meta["pass_rate"]` of every item. Notes hold the mean rate, the share of problems that are never or
    always solved (the share of rollouts that GRPO would waste), and a histogram over ten equal bins of [0,
    1].
    """
    rates = np.asarray(pass_rates, np.float64)
    if rates.shape != (len(problems),):
        raise ValueError(f"{len(problems)} problems but pass rates of shape {rates.shape}")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"expected 0 <= low <= high <= 1, got low={low}, high={high}")
    known = rates[~np.isnan(rates)]
    if known.size and (known.min() < 0 or known.max() > 1):
        raise ValueError(f"pass rates must lie in [0, 1], found {known.min()} to {known.max()}")
    measured = [
        replace(problem, meta={**problem.meta, "pass_rate": None if np.isnan(rate) else float(rate)})
        for problem, rate in zip(problems, rates, strict=True)
    ]
    removed: dict[int, Removed] = {}
    for index, rate in enumerate(rates):
        reason = (
            "not_measured"
            if np.isnan(rate)
            else "too_hard"
            if rate < low
            else "too_easy"
            if rate > high
            else ""
        )
        if reason:
            detail = {} if np.isnan(rate) else {"pass_rate": round(float(rate), 4)}
            removed[index] = Removed(problem=measured[index], reason=reason, detail=detail)
    notes: dict[str, Any] = {"low": low, "high": high}
    if known.size:
        notes |= {
            "mean_pass_rate": round(float(known.mean()), 4),
            "share_without_variance": round(float(((known == 0) | (known == 1)).mean()), 4),
            "histogram": np.histogram(known, bins=10, range=(0, 1))[0].tolist(),
        }
    return split("difficulty", measured, removed, notes)


def plurality(
    answers: Sequence[str | None], same: Callable[[str, str], bool | None] | None = None
) -> tuple[str, float]:
    """The most frequent answer among the samples of one problem, and the share of all samples that agree
    with it.

    None is a sample without an answer: it never wins, but counts among the samples. `same` decides equality
    (default: the reward's; where only algebra can tell, answers are different); ties go to the answer that
    came first. No answer at all: ("", 0.0).
    """
    given = [answer for answer in answers if answer is not None]
    if not given:
        return "", 0.0
    places = Counter(classes(given, same or same_answer))
    winner, votes = max(places.items(), key=lambda place: place[1])
    return given[winner], votes / len(answers)


def fill_by_plurality(
    problems: Sequence[Problem], answers: Sequence[Sequence[str | None]], min_agreement: float = 0.5
) -> StageResult:
    """Give problems without a gold answer the plurality answer of a strong model's samples (paper, section
    2).

    `answers[i]` are the samples of problem i. Problems that have a gold answer pass unchanged; the others
    are kept with `meta["answer_source"] = "plurality"` and `meta["agreement"]`, or removed (`no_agreement`)
    below `min_agreement`.
    """
    if len(problems) != len(answers):
        raise ValueError(f"{len(problems)} problems but samples for {len(answers)}")
    filled: list[Problem] = []
    removed: dict[int, Removed] = {}
    for index, (problem, samples) in enumerate(zip(problems, answers, strict=True)):
        if problem.answer.strip():
            filled.append(problem)
            continue
        winner, agreement = plurality(samples)
        source = {"answer_source": "plurality", "agreement": agreement}
        filled.append(replace(problem, answer=winner, meta={**problem.meta, **source}))
        if not winner.strip() or agreement < min_agreement:
            detail = {"agreement": round(agreement, 4), "plurality": winner}
            removed[index] = Removed(problem=problem, reason="no_agreement", detail=detail)
    return split("plurality", filled, removed, {"min_agreement": min_agreement})


def cluster_of(problem: Problem) -> str:
    """The mixture cluster of a problem: `meta["cluster"]`, else its task with its difficulty, as in
    "modchain/4"."""
    if "cluster" in problem.meta:
        return str(problem.meta["cluster"])
    task = problem.task or "math"
    return task if problem.difficulty is None else f"{task}/{problem.difficulty:g}"


def mixture_counts(
    problems: Sequence[Problem],
    epochs: Mapping[str, float],
    seed: int = 0,
    cluster: Callable[[Problem], str] = cluster_of,
) -> np.ndarray:
    """How often each problem is seen: int64[P] with mean `epochs[cluster]` in expectation over a cluster's
    problems.

    A cluster is looked up by its whole name, then by the part before "/", then as "*"; clusters in none of
    them are seen once. The whole part of the epochs goes to every problem; the fraction to those whose own
    hash (of seed and id) falls below it, so the choice depends neither on order nor on the other problems.
    """
    for name, value in epochs.items():
        if not value >= 0:
            raise ValueError(f"epochs of cluster {name!r} must be at least 0, got {value}")
    counts = np.ones(len(problems), np.int64)
    for index, problem in enumerate(problems):
        name = cluster(problem)
        wanted = epochs.get(name, epochs.get(name.partition("/")[0], epochs.get("*", 1.0)))
        counts[index] = int(wanted) + (_uniform(seed, problem.id) < wanted - int(wanted))
    return counts


def _uniform(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on (seed, name) only."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def apply_mixture(problems: Sequence[Problem], epochs: Mapping[str, float], seed: int = 0) -> StageResult:
    """Store `mixture_counts` as `meta["epochs"]`; problems seen 0 times are removed (`mixture`)."""
    counts = mixture_counts(problems, epochs, seed)
    weighted = [
        replace(problem, meta={**problem.meta, "epochs": int(count)})
        for problem, count in zip(problems, counts, strict=True)
    ]
    removed = {
        index: Removed(
            problem=weighted[index], reason="mixture", detail={"cluster": cluster_of(weighted[index])}
        )
        for index in np.flatnonzero(counts == 0).tolist()
    }
    return split("mixture", weighted, removed, {"epochs": dict(epochs), "examples": int(counts.sum())})


def parse_mixture(text: str) -> dict[str, float]:
    """ "modchain/6=2, modchain=0.5" -> epochs per cluster. Raises ConfigError naming the part that is
    wrong."""
    epochs: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if not name or not re.fullmatch(r"\d+(\.\d+)?|\.\d+", value):
            raise ConfigError("curate.mixture", f'expected "cluster=epochs, ...", found {part!r}')
        epochs[name] = float(value)
    return epochs
