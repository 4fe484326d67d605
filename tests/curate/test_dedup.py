"""Duplicates: what goes, what stays, and that the fast way finds what the slow way finds."""

import numpy as np
import pytest

from phi4r.core.problem import Problem
from phi4r.curate.dedup import (
    NUM_HASHES,
    RECALL,
    bands_for,
    deduplicate,
    jaccard,
    minhash,
    near_duplicates,
)
from phi4r.curate.text import mix

STORY = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)


def problems(*texts: str, answers: list[str] | None = None) -> list[Problem]:
    return [Problem(f"p{i}", text, answers[i] if answers else "7") for i, text in enumerate(texts)]


def removed_ids(
    *texts: str, answers: list[str] | None = None, threshold: float = 0.8
) -> dict[str, tuple[str, str]]:
    result = deduplicate(problems(*texts, answers=answers), threshold)
    return {item.problem.id: (item.reason, item.clash_id) for item in result.removed}


def test_arithmetic_that_differs_in_one_digit_stays() -> None:
    texts = [f"3*7+5-{digit}%10?" for digit in range(10)]
    assert removed_ids(*texts, threshold=0.1) == {}


def test_a_copy_with_other_spacing_goes_and_names_the_first() -> None:
    assert removed_ids("3*7+5-9%10?", "2+2%10?", " 3 * 7+5-9 %10? ") == {"p2": ("duplicate", "p0")}


def test_a_word_problem_with_another_name_goes() -> None:
    other = STORY.replace("friends", "colleagues")
    assert removed_ids(STORY, other) == {"p1": ("near_duplicate", "p0")}


@pytest.mark.parametrize(
    ("old", "new"), [("48", "49"), ("half", "twice"), ("in May.", "in 3 days."), ("altogether", "more")]
)
def test_a_word_problem_with_another_quantity_stays(old: str, new: str) -> None:
    assert old in STORY
    assert removed_ids(STORY, STORY.replace(old, new), threshold=0.3) == {}


def test_short_texts_are_compared_exactly_or_not_at_all() -> None:
    assert removed_ids("Tom has 3 red apples", "Tom has 3 green apples", threshold=0.1) == {}


def test_the_longer_the_text_the_more_words_may_differ() -> None:
    words = [f"word{chr(97 + i)}" for i in range(26)]
    short, long = words[:17], words  # 16 and 25 bigrams; one word in the middle costs two: 14/18 and 23/27
    for text, goes in ((short, False), (long, True)):
        changed = [*text[:8], "other", *text[9:]]
        assert bool(removed_ids(" ".join(text), " ".join(changed))) is goes


def test_equal_texts_whose_answers_disagree_all_go() -> None:
    reasons = removed_ids(STORY, STORY.upper(), STORY + " ", answers=["72", "72", "73"])
    assert {reason for reason, _ in reasons.values()} == {"conflicting_answers"}
    assert sorted(reasons) == ["p0", "p1", "p2"]


def test_similar_texts_whose_answers_disagree_all_stay() -> None:
    assert removed_ids(STORY, STORY.replace("friends", "colleagues"), answers=["72", "73"]) == {}


def test_an_item_goes_only_for_one_that_stays() -> None:
    words = [f"word{chr(97 + i)}" for i in range(26)]
    step1 = [*words[:4], "other", *words[5:]]
    step2 = [*step1[:12], "another", *step1[13:]]  # like step1 (23/27), unlike the first (21/29)
    assert removed_ids(*[" ".join(text) for text in (words, step1, step2)]) == {
        "p1": ("near_duplicate", "p0")
    }


@pytest.mark.parametrize("threshold", [0.0, 1.5, -0.1])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must be in"):
        deduplicate(problems("a"), threshold)


def test_bands_find_a_pair_at_the_threshold_with_the_stated_recall() -> None:
    for threshold in np.linspace(0.1, 1.0, 19):
        bands, rows = bands_for(float(threshold))
        assert bands * rows == NUM_HASHES
        if rows > 1:  # one row to a band is the best there is, at low thresholds too
            assert 1 - (1 - threshold**rows) ** bands >= RECALL


def random_sets(count: int, seed: int) -> list[np.ndarray]:
    """Sets of 40 hashes; every second one is an earlier one with up to 8 members replaced."""
    rng = np.random.default_rng(seed)
    sets: list[np.ndarray] = []
    for index in range(count):
        fresh = rng.integers(0, 2**63, 40, np.uint64)
        if index % 2 and index > 1:
            num_new = int(rng.integers(0, 9))
            fresh[num_new:] = rng.permutation(sets[int(rng.integers(index - 1))])[: 40 - num_new]
        sets.append(np.unique(fresh))
    return sets


def test_minhash_estimates_jaccard_within_five_standard_deviations() -> None:
    sets = random_sets(200, seed=1)
    signatures = minhash(sets, chunk=37)
    for a in range(0, 200, 2):
        for b in (a + 1, (a + 7) % 200):
            true = jaccard(sets[a], sets[b])
            estimate = (signatures[a] == signatures[b]).mean()
            assert abs(estimate - true) <= 5 * np.sqrt(max(true * (1 - true), 1 / NUM_HASHES) / NUM_HASHES)


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_lsh_removes_what_comparing_all_pairs_removes(threshold: float) -> None:
    sets = random_sets(400, seed=2)
    salts = mix(np.arange(400, dtype=np.uint64) % np.uint64(3))
    found = near_duplicates(sets, salts, threshold)
    kept: list[int] = []
    expected: dict[int, int] = {}
    for later in range(400):
        near = [i for i in kept if salts[i] == salts[later] and jaccard(sets[i], sets[later]) >= threshold]
        if near:
            expected[later] = near[0]
        else:
            kept.append(later)
    assert len(expected) > 20
    # The stated recall is 0.999 at the threshold and higher above it; these seeds miss nothing.
    assert {later: earlier for later, (earlier, _) in found.items()} == expected


def test_near_duplicates_of_nothing_or_of_unrelated_sets_are_none() -> None:
    assert near_duplicates([], np.zeros(0, np.uint64), 0.8) == {}
    sets = [np.array([i], np.uint64) for i in range(5)]
    assert near_duplicates(sets, np.zeros(5, np.uint64), 0.8) == {}
