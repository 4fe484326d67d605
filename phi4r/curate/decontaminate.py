"""Training problems that repeat a held-out problem are leaks, and go.

Four passes, each with a reason of its own:

- `leak_exact`: the whole strings are equal (tokens of `curate.text`; lead-ins such as "Compute" are ignored
  in pure arithmetic). This alone judges pure arithmetic, where a shared run of tokens is not evidence:
  "3*7+5-9%10?" shares nine tokens with "2+3*7+5-9%10?", another problem with another answer. It also covers
  held-out problems too short for an n-gram, which plain n-gram scripts miss even when copied word for word.
- `leak_ngram`: a run of n tokens of a held-out problem occurs in the training problem. n = min(ngram,
  length of the held-out problem), so a short held-out problem is looked for whole; below `MIN_NGRAM` tokens
  only `leak_exact` applies.
- `leak_overlap`: at least `OVERLAP_SHARE` of the held-out problem's 7-grams occur in the training problem,
  and `OVERLAP_MIN` of them: a copy with words put in, which breaks every long run. (Phi-4 decontaminated
  with a hybrid of 13- and 7-grams; the share is ours, set where GSM8K's unrelated problems end.)
- `leak_masked` (optional): the same with every number replaced, which finds copies with changed numbers.
  Never applied to pure arithmetic, of which nothing would be left.

Runs found in more than max(`BOILERPLATE_MIN`, `BOILERPLATE_SHARE` x problems) training problems are a
template, not a leak ("using each number exactly once make the target"); they are left out of the n-gram
passes and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phi4r.core.problem import Problem
from phi4r.curate.stage import Removed, StageResult, split
from phi4r.curate.text import Text, analyse, masked, ngram_hashes

MIN_NGRAM = 5
OVERLAP_NGRAM = 7
OVERLAP_SHARE = 0.3
OVERLAP_MIN = 3
BOILERPLATE_MIN = 10
BOILERPLATE_SHARE = 0.005


Hit = tuple[int, int, int]  # n, n-gram hash, position in the training problem


@dataclass
class _Index:
    """Held-out n-grams: for each length n, hash -> the held-out problems that have it."""

    owners: dict[int, dict[int, list[int]]] = field(default_factory=dict)
    sorted_hashes: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def build(cls, token_lists: Sequence[tuple[str, ...]], ngram: int) -> _Index:
        index = cls()
        for item, tokens in enumerate(token_lists):
            n = min(ngram, len(tokens))
            if n >= min(MIN_NGRAM, ngram):
                owners = index.owners.setdefault(n, {})
                for value in np.unique(ngram_hashes(tokens, n)).tolist():
                    owners.setdefault(value, []).append(item)
        for n, owners in index.owners.items():
            index.sorted_hashes[n] = np.sort(np.array(list(owners), np.uint64))
        return index

    def hits(self, tokens: tuple[str, ...]) -> list[Hit]:
        """Every n-gram of `tokens` that is in the index."""
        found = []
        for n, known in self.sorted_hashes.items():
            hashes = ngram_hashes(tokens, n)
            if hashes.size:
                places = np.minimum(np.searchsorted(known, hashes), known.size - 1)
                found += [(n, int(hashes[p]), int(p)) for p in np.flatnonzero(known[places] == hashes)]
        return found


@dataclass(frozen=True)
class _Pass:
    """One n-gram pass: with `share` 0 a single shared n-gram is a leak, else that share of the held-out
    problem's."""

    reason: str
    ngram: int
    mask: bool = False
    share: float = 0.0

    def look(self, tokens: tuple[str, ...]) -> tuple[str, ...]:
        return masked(tokens) if self.mask else tokens


def decontaminate(
    problems: Sequence[Problem], heldout: Sequence[Problem], ngram: int = 13, mask_numbers: bool = False
) -> StageResult:
    """Remove problems that leak a held-out problem (see the module's text); `ngram` >= 1 is in tokens.

    `detail` of a removal holds the shared run and the share of the held-out problem's n-grams that were
    found.
    """
    if ngram < 1:
        raise ValueError(f"ngram must be at least 1, got {ngram}")
    texts = [analyse(problem.problem) for problem in problems]
    held = [analyse(problem.problem) for problem in heldout]
    removed: dict[int, Removed] = {}
    exact: dict[str, int] = {}
    for item, text in enumerate(held):
        exact.setdefault(_whole(text), item)
    for index, text in enumerate(texts):
        match = exact.get(_whole(text))
        if match is not None:
            removed[index] = _leak(problems[index], heldout[match], "leak_exact", {})
    notes: dict[str, Any] = {
        "ngram": ngram,
        "heldout": len(heldout),
        "heldout_matched_whole_only": sum(t.symbolic or len(t.tokens) < min(MIN_NGRAM, ngram) for t in held),
    }
    passes = [_Pass("leak_ngram", ngram), _Pass("leak_overlap", OVERLAP_NGRAM, share=OVERLAP_SHARE)]
    if mask_numbers:
        passes.append(_Pass("leak_masked", ngram, mask=True))
    for stage in passes:
        left = {i: text.tokens for i, text in enumerate(texts) if i not in removed and not text.symbolic}
        found, num_boilerplate = _find(stage, left, [() if text.symbolic else text.tokens for text in held])
        notes[f"{stage.reason}_boilerplate_ngrams"] = num_boilerplate
        for i, (owner, detail) in found.items():
            removed[i] = _leak(problems[i], heldout[owner], stage.reason, detail)
    return split("decontaminate", problems, removed, notes)


def _find(
    stage: _Pass, texts: dict[int, tuple[str, ...]], held: Sequence[tuple[str, ...]]
) -> tuple[dict[int, tuple[int, dict[str, Any]]], int]:
    """Leaks of one pass, training index -> (held-out index, detail), and the number of boilerplate
    n-grams."""
    index = _Index.build([stage.look(tokens) for tokens in held], stage.ngram)
    hits = {i: index.hits(stage.look(tokens)) for i, tokens in texts.items()}
    boilerplate = _boilerplate(hits, len(texts))
    found: dict[int, tuple[int, dict[str, Any]]] = {}
    for i, all_hits in hits.items():
        evidence = [hit for hit in all_hits if hit[:2] not in boilerplate]
        if not evidence:
            continue
        votes = Counter(
            owner for n, value in {hit[:2] for hit in evidence} for owner in index.owners[n][value]
        )
        shares = {
            owner: count / max(1, len(held[owner]) - min(stage.ngram, len(held[owner])) + 1)
            for owner, count in votes.items()
            if not stage.share or count >= OVERLAP_MIN
        }
        if not shares or max(shares.values()) < stage.share:
            continue
        owner = min(shares, key=lambda item: (-shares[item], item))
        n, _, position = next(hit for hit in evidence if owner in index.owners[hit[0]][hit[1]])
        shared = " ".join(texts[i][position : position + n])
        found[i] = owner, {"shared": shared, "share_of_heldout": round(shares[owner], 4)}
    return found, len(boilerplate)


def _whole(text: Text) -> str:
    """What whole-string comparison compares; pure arithmetic and prose never meet."""
    return "=" + text.core if text.symbolic else text.key


def _boilerplate(hits: dict[int, list[Hit]], num_problems: int) -> set[tuple[int, int]]:
    """N-grams (n, hash) found in too many training problems to be evidence."""
    counts: dict[tuple[int, int], int] = {}
    for found in hits.values():
        for ngram in {hit[:2] for hit in found}:
            counts[ngram] = counts.get(ngram, 0) + 1
    limit = max(BOILERPLATE_MIN, BOILERPLATE_SHARE * num_problems)
    return {ngram for ngram, count in counts.items() if count > limit}


def _leak(problem: Problem, heldout: Problem, reason: str, detail: dict[str, Any]) -> Removed:
    return Removed(
        problem=problem, reason=reason, clash_id=heldout.id, clash_text=heldout.problem, detail=detail
    )
