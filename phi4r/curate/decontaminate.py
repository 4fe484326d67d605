"""Training problems that repeat a held-out problem are leaks, and go.

Three passes, each with a reason of its own:

- `leak_exact`: the whole strings are equal (tokens of `curate.text`; lead-ins such as "Compute" are ignored in pure
  arithmetic). This alone judges pure arithmetic, where a shared run of tokens is not evidence: "3*7+5-9%10?" shares nine
  tokens with "2+3*7+5-9%10?", another problem with another answer. It also covers held-out problems too short for an
  n-gram, which plain n-gram scripts miss even when copied word for word.
- `leak_ngram`: a run of n tokens of a held-out problem occurs in the training problem. n = min(ngram, length of the
  held-out problem), so a short held-out problem is looked for whole; below `MIN_NGRAM` tokens only `leak_exact` applies.
- `leak_masked` (optional): the same with every number replaced, which finds copies with changed numbers. Never applied
  to pure arithmetic, of which nothing would be left.

Runs found in more than max(`BOILERPLATE_MIN`, `BOILERPLATE_SHARE` x problems) training problems are a template, not a
leak ("using each number exactly once make the target"); they are left out of the two n-gram passes and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phi4r.curate.stage import Removed, StageResult, split
from phi4r.curate.text import Text, analyse, masked, ngram_hashes
from phi4r.data.records import Problem

MIN_NGRAM = 5
BOILERPLATE_MIN = 10
BOILERPLATE_SHARE = 0.005


@dataclass
class _Index:
    """Held-out n-grams: for each length n, hash -> held-out problem that has it (the first one)."""

    owners: dict[int, dict[int, int]] = field(default_factory=dict)
    sorted_hashes: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def build(cls, token_lists: Sequence[tuple[str, ...]], ngram: int) -> _Index:
        index = cls()
        for item, tokens in enumerate(token_lists):
            n = min(ngram, len(tokens))
            if n >= min(MIN_NGRAM, ngram):
                owners = index.owners.setdefault(n, {})
                for value in ngram_hashes(tokens, n).tolist():
                    owners.setdefault(value, item)
        for n, owners in index.owners.items():
            index.sorted_hashes[n] = np.sort(np.array(list(owners), np.uint64))
        return index

    def hits(self, tokens: tuple[str, ...]) -> list[tuple[int, int, int]]:
        """(n, hash, position) of every n-gram of `tokens` that is in the index."""
        found = []
        for n, known in self.sorted_hashes.items():
            hashes = ngram_hashes(tokens, n)
            if hashes.size:
                places = np.minimum(np.searchsorted(known, hashes), known.size - 1)
                found += [(n, int(hashes[p]), int(p)) for p in np.flatnonzero(known[places] == hashes)]
        return found


def decontaminate(
    problems: Sequence[Problem], heldout: Sequence[Problem], ngram: int = 13, mask_numbers: bool = False
) -> StageResult:
    """Remove problems that leak a held-out problem (see the module's text); `ngram` >= 1 is in tokens.

    `detail` of a removal holds the shared run and the share of the held-out problem's n-grams that were found.
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
    worded = [index for index, text in enumerate(texts) if index not in removed and not text.symbolic]
    held_tokens = [() if text.symbolic else text.tokens for text in held]
    passes = [("leak_ngram", False)] + ([("leak_masked", True)] if mask_numbers else [])
    for reason, with_mask in passes:
        look = masked if with_mask else _as_is
        index_of_ngrams = _Index.build([look(tokens) for tokens in held_tokens], ngram)
        candidates = [i for i in worded if i not in removed]
        hits = {i: index_of_ngrams.hits(look(texts[i].tokens)) for i in candidates}
        boilerplate = _boilerplate(hits, len(problems))
        notes[f"{reason}_boilerplate_ngrams"] = len(boilerplate)
        for i, found in hits.items():
            evidence = [hit for hit in found if hit[:2] not in boilerplate]
            if evidence:
                n, value, position = evidence[0]
                owner = index_of_ngrams.owners[n][value]
                detail = {
                    "shared": " ".join(texts[i].tokens[position : position + n]),
                    "share_of_heldout": _share(look(held_tokens[owner]), look(texts[i].tokens), n),
                }
                removed[i] = _leak(problems[i], heldout[owner], reason, detail)
    return split("decontaminate", problems, removed, notes)


def _whole(text: Text) -> str:
    """What whole-string comparison compares; pure arithmetic and prose never meet."""
    return "=" + text.core if text.symbolic else text.key


def _as_is(tokens: tuple[str, ...]) -> tuple[str, ...]:
    return tokens


def _boilerplate(hits: dict[int, list[tuple[int, int, int]]], num_problems: int) -> set[tuple[int, int]]:
    """N-grams (n, hash) found in too many training problems to be evidence."""
    counts: dict[tuple[int, int], int] = {}
    for found in hits.values():
        for ngram in {hit[:2] for hit in found}:
            counts[ngram] = counts.get(ngram, 0) + 1
    limit = max(BOILERPLATE_MIN, BOILERPLATE_SHARE * num_problems)
    return {ngram for ngram, count in counts.items() if count > limit}


def _share(held: tuple[str, ...], tokens: tuple[str, ...], n: int) -> float:
    """Share of the held-out problem's n-grams that occur in `tokens`, in (0, 1]."""
    return round(float(np.isin(ngram_hashes(held, n), ngram_hashes(tokens, n)).mean()), 4)


def _leak(problem: Problem, heldout: Problem, reason: str, detail: dict[str, Any]) -> Removed:
    return Removed(
        problem=problem, reason=reason, clash_id=heldout.id, clash_text=heldout.problem, detail=detail
    )
