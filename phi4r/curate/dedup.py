"""Duplicates and near-duplicates among problems: the first one stays.

Two problems are the same when their tokens are equal (spacing, case, LaTeX dress and punctuation aside).
They are near-duplicates when all of these hold:

- both have at least `MIN_WORDS` content words. Below that a text has no wording to vary: in "3*7+5-9%10?"
  every token is the problem itself, so short and symbolic texts are compared exactly or not at all;
- their quantities (numbers, number and comparison words, operators, variables) are equal and in the same
  order: two word problems that differ in one number are two problems, however alike they read;
- the Jaccard similarity of their word-bigram sets is at least the threshold. One changed word costs two
  bigrams, so a text with S bigrams bears one changed word only if (S - 2) / (S + 2) >= threshold: at 0.8
  from S = 18 on. The longer the text, the more words may differ, without a second setting;
- their answers agree: equal quantities with another answer is another question.

Candidates come from MinHash with banding, its bands salted with the hash of the quantities so that only
texts with equal quantities can meet; every candidate is then verified with the exact Jaccard similarity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from phi4r.core.problem import Problem
from phi4r.curate.stage import Removed, StageResult, split
from phi4r.curate.text import Text, analyse, mix, ngram_hashes, token_hash

MIN_WORDS = 8
SHINGLE = 2
NUM_HASHES = 128
RECALL = 0.999
SameAnswer = Callable[[Problem, Problem], bool]


def same_answer_text(a: Problem, b: Problem) -> bool:
    """Answers compared as normalised text: the default where no task checker is at hand."""
    return analyse(a.answer).tokens == analyse(b.answer).tokens


def deduplicate(
    problems: Sequence[Problem],
    threshold: float = 0.8,
    same_answer: SameAnswer = same_answer_text,
) -> StageResult:
    """Remove all but the first of each set of duplicates; reasons `duplicate`, `near_duplicate`,
    `conflicting_answers`.

    `threshold` is the Jaccard similarity in (0, 1] from which texts are near-duplicates. An item is
    near-removed only for a *kept* item that it was compared with, never through a chain of similar ones.
    Texts that are equal but whose answers disagree are all removed: nothing says which of the answers is
    right.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    texts = [analyse(problem.problem) for problem in problems]
    removed = _exact_duplicates(problems, texts, same_answer)
    worded = [i for i, text in enumerate(texts) if i not in removed and text.num_words >= MIN_WORDS]
    shingles = [np.unique(ngram_hashes(texts[i].tokens, SHINGLE)) for i in worded]
    salts = np.array([token_hash(" ".join(texts[i].quantities)) for i in worded], np.uint64)

    def same(later: int, earlier: int) -> bool:
        a, b = worded[later], worded[earlier]
        return texts[a].quantities == texts[b].quantities and same_answer(problems[b], problems[a])

    for later, (earlier, similarity) in near_duplicates(shingles, salts, threshold, same).items():
        problem, other = problems[worded[later]], problems[worded[earlier]]
        removed[worded[later]] = Removed(
            problem=problem,
            reason="near_duplicate",
            clash_id=other.id,
            clash_text=other.problem,
            detail={"jaccard": round(similarity, 4)},
        )
    notes: dict[str, Any] = {
        "threshold": threshold,
        "compared_exactly_only": sum(text.num_words < MIN_WORDS for text in texts),
    }
    return split("dedup", problems, removed, notes)


def _exact_duplicates(
    problems: Sequence[Problem], texts: Sequence[Text], same_answer: SameAnswer
) -> dict[int, Removed]:
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, text in enumerate(texts):
        groups.setdefault(text.tokens, []).append(index)
    removed: dict[int, Removed] = {}
    for group in groups.values():
        first, *rest = group
        agree = all(same_answer(problems[first], problems[index]) for index in rest)
        for index in rest if agree else group:
            other = first if index != first else rest[0]
            removed[index] = Removed(
                problem=problems[index],
                reason="duplicate" if agree else "conflicting_answers",
                clash_id=problems[other].id,
                clash_text=problems[other].problem,
                detail={}
                if agree
                else {"answer": problems[index].answer, "other_answer": problems[other].answer},
            )
    return removed


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|a & b| / |a | b| of two sorted arrays of distinct uint64 hashes; two empty sets are equal (1)."""
    shared = np.intersect1d(a, b, assume_unique=True).size
    union = a.size + b.size - shared
    return shared / union if union else 1.0


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows) with bands x rows = NUM_HASHES: the longest bands that still find a pair at the
    threshold.

    A pair of similarity s meets in some band with probability 1 - (1 - s^rows)^bands. Longer bands give
    fewer useless candidates; the choice keeps that probability >= RECALL at s = threshold.
    """
    for rows in (32, 16, 8, 4, 2):
        if 1 - (1 - threshold**rows) ** (NUM_HASHES // rows) >= RECALL:
            return NUM_HASHES // rows, rows
    return NUM_HASHES, 1


def minhash(shingles: Sequence[np.ndarray], chunk: int = 2048) -> np.ndarray:
    """MinHash signatures, uint64[N, NUM_HASHES], of N non-empty arrays of shingle hashes.

    Each of the NUM_HASHES permutations is a bijective mix of the shingle hash with a constant of its own;
    the number of equal entries of two rows / NUM_HASHES estimates their Jaccard similarity without bias.
    """
    constants = mix(np.arange(1, NUM_HASHES + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03))
    signatures = np.empty((len(shingles), NUM_HASHES), np.uint64)
    for start in range(0, len(shingles), chunk):
        part = shingles[start : start + chunk]
        flat = np.concatenate(part)
        starts = np.concatenate([[0], np.cumsum([len(item) for item in part])[:-1]])
        for column, constant in enumerate(constants):
            signatures[start : start + len(part), column] = np.minimum.reduceat(mix(flat ^ constant), starts)
    return signatures


def near_duplicates(
    shingles: Sequence[np.ndarray],
    salts: np.ndarray,
    threshold: float,
    same: Callable[[int, int], bool] = lambda later, earlier: True,
) -> dict[int, tuple[int, float]]:
    """Greedy near-duplicates: later position -> (earlier kept position, Jaccard similarity).

    `shingles` are N arrays of sorted distinct hashes, `salts` uint64[N]: items with different salts never
    meet. Items are taken in order and compared with those kept so far that share a band, so a large cluster
    costs one comparison an item; `same(later, earlier)` has the last word on a pair at or above the
    threshold.
    """
    filled = np.array([i for i, item in enumerate(shingles) if item.size], np.int64)
    if filled.size < 2:
        return {}
    signatures = minhash([shingles[i] for i in filled])
    spread = 5 * np.sqrt(threshold * (1 - threshold) / NUM_HASHES) + 1e-9
    kept_in: dict[int, list[int]] = {}
    found: dict[int, tuple[int, float]] = {}
    for row, buckets in _shared_buckets(signatures, salts[filled], threshold):
        candidates = np.array(
            sorted({other for bucket in buckets for other in kept_in.get(bucket, ())}), np.int64
        )
        # An estimate more than five standard deviations below the threshold rules a pair out without its
        # shingles.
        estimates = (
            (signatures[candidates] == signatures[row]).mean(axis=1) if candidates.size else np.zeros(0)
        )
        later = int(filled[row])
        for other in candidates[estimates >= threshold - spread]:
            earlier = int(filled[other])
            similarity = jaccard(shingles[later], shingles[earlier])
            if similarity >= threshold and same(later, earlier):
                found[later] = (earlier, similarity)
                break
        else:
            for bucket in buckets:
                kept_in.setdefault(bucket, []).append(row)
    return found


def _shared_buckets(
    signatures: np.ndarray, salts: np.ndarray, threshold: float
) -> Iterator[tuple[int, list[int]]]:
    """(row, its buckets) for every row that shares a bucket with another one, in order of rows.

    A bucket is an equal band of equal salt, numbered over all bands; buckets of a single row are left out.
    """
    bands, rows = bands_for(threshold)
    salted = mix(salts)
    members: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    total = 0
    for band in range(bands):
        key = salted.copy()
        for column in range(band * rows, (band + 1) * rows):
            key = mix(key * np.uint64(0x9E3779B97F4A7C15) + signatures[:, column])
        _, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
        shared = np.flatnonzero(counts[inverse] > 1)
        members.append(shared)
        numbers.append(inverse[shared] + total)
        total += counts.size
    row_of, bucket_of = np.concatenate(members), np.concatenate(numbers)
    if not row_of.size:
        return
    order = np.argsort(row_of, kind="stable")
    row_of, bucket_of = row_of[order], bucket_of[order]
    starts = np.flatnonzero(np.diff(row_of, prepend=-1))
    for start, end in zip(starts, np.append(starts[1:], row_of.size), strict=True):
        yield int(row_of[start]), bucket_of[start:end].tolist()
