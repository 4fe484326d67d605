"""Group advantages against their definition, and the corner where a group has nothing to say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from phi4r.rl.advantages import group_advantages

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


def test_groups_do_not_touch_each_other_and_equal_rewards_give_exactly_zero() -> None:
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
