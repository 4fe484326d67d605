"""Group advantages against their definition, and the corner where a group has nothing to say."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from phi4r.rl.advantages import filtered_advantages, group_advantages, kept_by_filter

REWARDS = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-1, 1).map(lambda x: round(x, 6)),
)


def test_the_standard_deviation_is_the_populations() -> None:
    result = group_advantages([[1.0, 0.0, 0.0, 0.0]])
    # mean 1/4, population variance 3/16.
    np.testing.assert_allclose(result.advantages, np.array([[3, -1, -1, -1]]) / np.sqrt(3), rtol=1e-15)


def test_none_only_centres() -> None:
    result = group_advantages([[0.5, -0.5, 0.25, -0.25], [1, 2, 3, 6]], norm="none")
    assert result.advantages.tolist() == [[0.5, -0.5, 0.25, -0.25], [-2, -1, 0, 3]]


def test_groups_are_independent_and_equal_rewards_give_exactly_zero() -> None:
    rewards = np.array([[0.1] * 7, [0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2]])
    for norm in ("std", "none"):
        result = group_advantages(rewards, norm)
        assert result.advantages[0].tolist() == [0.0] * 7
        assert result.informative.tolist() == [False, True]
        assert result.num_zero_variance == 1
        assert result.informative_share == 0.5
        np.testing.assert_array_equal(result.advantages[1], group_advantages(rewards[1:], norm).advantages[0])


@given(REWARDS)
def test_advantages_are_centred_and_have_unit_variance_or_are_zero(rewards: np.ndarray) -> None:
    result = group_advantages(rewards)
    for group, advantages, informative in zip(rewards, result.advantages, result.informative, strict=True):
        assert informative == (len(set(group.tolist())) > 1)
        if informative:
            # Rewards are multiples of 1e-6 in [-1, 1], so centring loses at most about 1e-10 of the spread.
            assert abs(advantages.mean()) < 1e-9
            assert abs(advantages.std() - 1) < 1e-9
            assert (np.argsort(group, kind="stable") == np.argsort(advantages, kind="stable")).all()
        else:
            assert not advantages.any()


def test_differences_too_small_to_square_are_no_signal() -> None:
    result = group_advantages([[0.0, 1e-200]])
    assert result.advantages.tolist() == [[0.0, 0.0]]
    assert result.num_zero_variance == 1


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        group_advantages([1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        group_advantages([[1.0, float("nan")]])
    with pytest.raises(ValueError, match="'var'"):
        group_advantages([[1.0, 2.0]], "var")  # type: ignore[arg-type]


def test_batch_divides_by_the_standard_deviation_of_all_centred_rewards() -> None:
    result = group_advantages([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0] * 4], norm="batch")
    centred = np.array([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5], [0.0] * 4])
    expected = centred / np.sqrt((0.5625 + 3 * 0.0625 + 4 * 0.25) / 12)
    np.testing.assert_allclose(result.advantages, expected, rtol=1e-15)
    assert result.informative.tolist() == [True, True, False]
    assert not group_advantages([[1.0, 1.0]], norm="batch").advantages.any()


def test_a_filter_keeps_the_shortest_or_best_and_the_first_of_equals() -> None:
    rewards, lengths = [[1.0, 1.0, 0.0, 1.0]], [[40, 10, 5, 10]]
    assert kept_by_filter(rewards, lengths, 2, "length").tolist() == [[False, True, True, False]]
    assert kept_by_filter(rewards, lengths, 2, "efficiency").tolist() == [[False, True, False, True]]
    assert kept_by_filter(rewards, [[7, 7, 7, 7]], 3, "length").tolist() == [[True, True, True, False]]
    for keep in (1, 5):
        with pytest.raises(ValueError, match="between 2 and the group's 4"):
            kept_by_filter(rewards, lengths, keep, "length")


@given(REWARDS, st.randoms(use_true_random=False))
def test_filtered_advantages_are_of_the_kept_alone_and_zero_elsewhere(
    rewards: np.ndarray, random: Random
) -> None:
    if rewards.shape[1] < 2:
        return
    keep = random.randint(2, rewards.shape[1])
    lengths = np.array([[random.randint(1, 50) for _ in group] for group in rewards])
    kept = kept_by_filter(rewards, lengths, keep, "length")
    for norm in ("std", "none", "batch"):
        result = filtered_advantages(rewards, kept, norm)
        assert not result.advantages[~kept].any()
        alone = group_advantages([group[chosen] for group, chosen in zip(rewards, kept, strict=True)], norm)
        np.testing.assert_array_equal(result.advantages[kept], alone.advantages.ravel())
        assert result.informative.tolist() == alone.informative.tolist()
        if keep == rewards.shape[1]:
            np.testing.assert_array_equal(result.advantages, group_advantages(rewards, norm).advantages)


REWARDS_2x3 = np.array([[1.0, 0.0, 0.5], [2.0, -1.0, 2.0]])
LENGTHS_2x3 = np.array([[3, 5, 4], [10, 2, 8]])


def test_the_sample_deviation_divides_by_one_less() -> None:
    found = group_advantages(REWARDS_2x3, "sample_std").advantages
    centred = REWARDS_2x3 - REWARDS_2x3.mean(1, keepdims=True)
    expected = centred / np.sqrt((centred**2).sum(1, keepdims=True) / 2)
    np.testing.assert_allclose(found, expected, rtol=1e-15)


def test_rloo_subtracts_the_mean_of_the_others() -> None:
    found = group_advantages(REWARDS_2x3, "none", "rloo").advantages
    np.testing.assert_allclose(found[0], [1 - 0.25, 0 - 0.75, 0.5 - 0.5], atol=1e-15)
    np.testing.assert_allclose(found[1], [2 - 0.5, -1 - 2, 2 - 0.5], atol=1e-15)


def test_opo_weighs_the_baseline_by_length() -> None:
    found = group_advantages(REWARDS_2x3, "none", "opo", LENGTHS_2x3).advantages
    baselines = [(3 * 1 + 4 * 0.5) / 12, (10 * 2 - 2 + 8 * 2) / 20]
    np.testing.assert_allclose(found, REWARDS_2x3 - np.array(baselines)[:, None], atol=1e-15)


def test_reinforce_pp_whitens_over_the_steps_tokens() -> None:
    """verl's reinforce_plus_plus_baseline: group-centred scores, one copy a token, shifted and divided by
    their mean and sample deviation."""
    found = group_advantages(REWARDS_2x3, "tokens", lengths_PG=LENGTHS_2x3).advantages
    centred = (REWARDS_2x3 - REWARDS_2x3.mean(1, keepdims=True)).ravel()
    tokens = np.repeat(centred, LENGTHS_2x3.ravel())
    np.testing.assert_allclose(found.ravel(), (centred - tokens.mean()) / tokens.std(ddof=1), rtol=1e-14)
