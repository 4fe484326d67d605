"""The estimators against enumeration and closed forms; the intervals and tests against simulation."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from phi4r.evaluate import statistics


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- pass@k, worst-of-k, maj@k


def test_pass_and_worst_of_k_equal_the_enumeration_of_all_subsets():
    for num_runs in range(1, 8):
        for num_right in range(num_runs + 1):
            row = [True] * num_right + [False] * (num_runs - num_right)
            for k in range(1, num_runs + 1):
                subsets = list(itertools.combinations(row, k))
                any_right = sum(map(any, subsets)) / len(subsets)
                all_right = sum(map(all, subsets)) / len(subsets)
                assert statistics.pass_at_k([row], k)[0] == pytest.approx(any_right, abs=1e-14)
                assert statistics.all_at_k([row], k)[0] == pytest.approx(all_right, abs=1e-14)


@pytest.mark.parametrize("num_runs", [64, 1000])
def test_pass_at_k_stays_exact_where_binomials_are_astronomical(num_runs):
    for num_right in (0, 1, num_runs // 3, num_runs - 1, num_runs):
        row = np.arange(num_runs) < num_right
        for k in (1, 8, num_runs // 2, num_runs):
            exact = 1 - Fraction(math.comb(num_runs - num_right, k), math.comb(num_runs, k))
            # a value of about 1 in float64, after a handful of roundings
            assert abs(statistics.pass_at_k([row], k)[0] - float(exact)) <= 16 * np.finfo(float).eps


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not():
    rate, num_runs, k, num_problems = 0.1, 16, 8, 40_000
    correct = rng().random((num_problems, num_runs)) < rate
    estimates = statistics.pass_at_k(correct, k)
    true = 1 - (1 - rate) ** k
    error = 4 * estimates.std() / math.sqrt(num_problems)
    assert abs(estimates.mean() - true) < error
    plug_in = (1 - (1 - correct.mean(axis=1)) ** k).mean()
    assert true - plug_in > 5 * error


def enumerate_majority(correct: list[bool], answers: list[str | None], k: int) -> float:
    """Majority voting as one would do it by hand, over every subset of k votes."""
    worth = []
    for subset in itertools.combinations(range(len(correct)), k):
        votes: dict[str, int] = {}
        for run in subset:
            candidate = "the right one" if correct[run] else answers[run]
            if candidate is not None:
                votes[candidate] = votes.get(candidate, 0) + 1
        most = max(votes.values(), default=0)
        winners = [candidate for candidate, count in votes.items() if count == most]
        worth.append(winners.count("the right one") / len(winners) if winners else 0.0)
    return sum(worth) / len(worth)


def test_majority_vote_equals_the_enumeration_of_all_subsets():
    generator = rng(1)
    for _ in range(60):
        num_runs = int(generator.integers(1, 9))
        correct = (generator.random(num_runs) < 0.4).tolist()
        answers = [None if right else [None, "a", "b", "c"][generator.integers(4)] for right in correct]
        for k in range(1, num_runs + 1):
            got = statistics.maj_at_k([correct], [answers], k)[0]
            assert got == pytest.approx(enumerate_majority(correct, answers, k), abs=1e-12)


def test_right_answers_are_one_candidate_however_they_are_written():
    correct = [[True, True, False, False]]
    assert statistics.maj_at_k(correct, [["1/2", "0.5", "3", "3"]], 4)[0] == 0.5  # a tie of two against two
    assert statistics.maj_at_k([[True, False, False]], [["7", "1", "2"]], 3)[0] == pytest.approx(1 / 3)


def test_wrong_answers_are_one_candidate_however_they_are_written():
    correct = [[True, True, False, False, False]]
    assert statistics.maj_at_k(correct, [["2", "2", "0.5", r"\frac12", "1/2"]], 5)[0] == 0.0
    assert statistics.maj_at_k(correct, [["2", "2", "0.5", r"\frac12", "1/3"]], 5)[0] == 0.5


def test_majority_of_one_is_accuracy_and_missing_answers_do_not_vote():
    correct = rng(2).random((20, 9)) < 0.5
    answers = [[None if right else "w" for right in row] for row in correct]
    assert statistics.maj_at_k(correct, answers, 1).mean() == pytest.approx(statistics.avg_at_k(correct))
    assert statistics.maj_at_k([[True, False, False, False]], [["5", None, None, None]], 4)[0] == 1.0
    assert statistics.maj_at_k([[False, False]], [[None, None]], 2)[0] == 0.0


def test_majority_vote_stays_finite_and_sharpens_with_many_runs():
    correct = np.arange(1000) < 600
    answers = [[None if right else "w" for right in correct]]
    values = [statistics.maj_at_k([correct], answers, k)[0] for k in (1, 101, 1000)]
    assert values[0] == pytest.approx(0.6)
    assert values[1] == pytest.approx(stats.hypergeom.sf(50, 1000, 600, 101), abs=1e-9)
    assert values[2] == pytest.approx(1.0)


def test_k_beyond_the_number_of_runs_is_refused():
    for k in (0, 4):
        with pytest.raises(ValueError, match=r"between 1 and the number of runs \(3\)"):
            statistics.pass_at_k([[1, 0, 1]], k)
    with pytest.raises(ValueError, match="shape of correct"):
        statistics.maj_at_k([[1, 0, 1]], [["a", "b"]], 2)


# --- intervals


def test_intervals_cover_the_mean_of_new_problems_at_their_nominal_rate():
    generator = rng(3)
    for alpha, beta, num_problems, num_runs in ((0.6, 0.4, 30, 8), (20, 16, 60, 8), (2, 2, 40, 1)):
        num_trials, hits = 600, 0
        for _ in range(num_trials):
            rates = generator.beta(alpha, beta, num_problems)
            correct = generator.random((num_problems, num_runs)) < rates[:, None]
            interval = statistics.bootstrap_interval(correct, rng=generator, num_resamples=400)
            hits += interval.low <= alpha / (alpha + beta) <= interval.high
        assert 0.92 <= hits / num_trials <= 0.98


def test_intervals_for_the_same_problems_cover_a_repeat_and_are_narrower():
    generator = rng(4)
    rates = generator.beta(0.6, 0.4, 30)
    num_trials, hits = 600, 0
    for _ in range(num_trials):
        correct = generator.random((30, 16)) < rates[:, None]
        same = statistics.bootstrap_interval(
            correct, rng=generator, num_resamples=400, target="these_problems"
        )
        hits += same.low <= rates.mean() <= same.high
    assert 0.92 <= hits / num_trials <= 0.98
    fresh = statistics.bootstrap_interval(correct, rng=generator, num_resamples=400)
    assert same.half_width < 0.5 * fresh.half_width


def test_the_bootstrap_width_matches_the_standard_error_over_problem_means():
    correct = rng(5).random((256, 8)) < rng(6).beta(2, 2, 256)[:, None]
    lengths = 20 + 5 * correct + rng(7).normal(size=correct.shape)
    for values in (correct, lengths):
        interval = statistics.bootstrap_interval(values, rng=rng(8), num_resamples=4000)
        standard_error = stats.sem(values.mean(axis=1))
        # a 95% percentile from 4,000 resamples is known to about 3% of the width
        assert interval.half_width == pytest.approx(1.96 * standard_error, rel=0.08)
        assert interval.mean == pytest.approx(values.mean())
        assert interval.low < interval.mean < interval.high


def test_an_interval_stays_in_the_unit_range_and_is_never_certain():
    nearly = np.ones((12, 2))
    nearly[0, 0] = 0
    assert statistics.bootstrap_interval(nearly, rng=rng(), num_resamples=500).high <= 1.0
    perfect = statistics.bootstrap_interval(np.ones((30, 8)), rng=rng())
    assert perfect.high == 1.0
    assert perfect.low == pytest.approx(0.025 ** (1 / 30))  # Clopper-Pearson for 30 out of 30
    nothing = statistics.problem_interval(np.zeros(30), rng=rng())
    assert (nothing.low, nothing.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 30)))


def test_the_same_seed_gives_the_same_interval():
    correct = rng(9).random((40, 4)) < 0.5
    first, second, other = (statistics.bootstrap_interval(correct, rng=rng(seed)) for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_impossible_bootstraps_are_refused():
    with pytest.raises(ValueError, match="at least two runs"):
        statistics.bootstrap_interval([[1], [0]], rng=rng(), target="these_problems")
    with pytest.raises(ValueError, match="at least 100 resamples"):
        statistics.bootstrap_interval([[1, 0]], rng=rng(), num_resamples=10)
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        statistics.bootstrap_interval([1, 0, 1], rng=rng())
    with pytest.raises(ValueError, match="NaN"):
        statistics.bootstrap_interval([[1, math.nan]], rng=rng())


# --- two checkpoints


def test_the_paired_comparison_agrees_with_scipy():
    before = rng(10).random((50, 4)) < 0.5
    after = rng(11).random((50, 8)) < 0.6
    compared = statistics.paired_comparison(before, after, rng=rng(12), num_permutations=20_000)
    means = before.mean(axis=1), after.mean(axis=1)
    expected = stats.ttest_rel(means[1], means[0])
    assert compared.t == pytest.approx(expected.statistic)
    assert compared.t_p_value == pytest.approx(expected.pvalue)
    by_scipy = stats.permutation_test(
        means,
        lambda a, b, axis: np.mean(b - a, axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
        rng=rng(13),
    ).pvalue
    # two Monte-Carlo estimates of one p-value
    assert abs(compared.permutation_p_value - by_scipy) < 5 * math.sqrt(
        2 * by_scipy * (1 - by_scipy) / 20_000
    )
    assert compared.gain.mean == pytest.approx(means[1].mean() - means[0].mean())
    difference = means[1] - means[0]
    assert (compared.num_better, compared.num_worse) == ((difference > 0).sum(), (difference < 0).sum())


def test_the_sign_flip_test_is_exact_for_few_problems():
    difference = [0.5, 0.25, -0.125, 0.375, 0.0]
    flips = [
        abs(sum(s * d for s, d in zip(signs, difference))) for signs in itertools.product((-1, 1), repeat=5)
    ]
    expected = sum(value >= abs(sum(difference)) - 1e-12 for value in flips) / len(flips)
    assert statistics.sign_flip_p_value(difference, rng=rng()) == pytest.approx(expected)
    assert statistics.sign_flip_p_value([0.0, 0.0], rng=rng()) == 1.0


def test_permutation_p_values_are_uniform_when_nothing_changed():
    generator = rng(14)
    values = [
        statistics.sign_flip_p_value(generator.normal(size=40), rng=generator, num_permutations=400)
        for _ in range(800)
    ]
    assert stats.kstest(values, "uniform").pvalue > 0.001
    counted = []  # means of 8 runs tie often: the test may only become more careful
    for _ in range(800):
        rates = generator.beta(2, 2, 40)[:, None]
        before, after = generator.random((40, 8)) < rates, generator.random((40, 8)) < rates
        difference = after.mean(axis=1) - before.mean(axis=1)
        counted.append(statistics.sign_flip_p_value(difference, rng=generator, num_permutations=400))
    assert 0.02 < np.mean(np.array(counted) <= 0.05) < 0.07


def test_the_paired_interval_covers_the_gain_and_is_narrower():
    generator = rng(15)
    hits, num_trials = 0, 500
    for _ in range(num_trials):
        rates = generator.uniform(0, 0.9, 40)[:, None]
        before = generator.random((40, 8)) < rates
        after = generator.random((40, 8)) < rates + 0.1
        gain = statistics.contrast_interval([(before, -1), (after, 1)], rng=generator, num_resamples=400)
        hits += gain.low <= 0.1 <= gain.high
    assert 0.92 <= hits / num_trials <= 0.98
    alone = statistics.bootstrap_interval(after, rng=generator)
    assert gain.half_width < 0.7 * math.sqrt(2) * alone.half_width


def test_a_comparison_of_different_problems_is_refused():
    with pytest.raises(ValueError, match="got 3 and 2"):
        statistics.paired_comparison(np.ones((3, 2)), np.ones((2, 2)), rng=rng())


def test_an_equal_gain_on_every_problem_is_infinitely_significant_by_t():
    compared = statistics.paired_comparison(np.zeros((8, 2)), np.ones((8, 2)), rng=rng())
    assert compared.t == math.inf
    assert compared.t_p_value == 0.0
    assert compared.permutation_p_value == 2 / 2**8
    assert (compared.gain.low, compared.gain.high) == (1.0, 1.0)


# --- runs and lengths


def test_the_run_density_is_a_density_inside_the_unit_range():
    correct = (
        rng(16).random((10, 40)) < 0.93
    )  # runs between 60% and 100%: an uncut kernel would leave the range
    runs = statistics.run_distribution(correct)
    accuracy = correct.mean(axis=0)
    assert (runs.mean, runs.std) == (pytest.approx(accuracy.mean()), pytest.approx(accuracy.std(ddof=1)))
    assert (runs.low, runs.high) == (accuracy.min(), accuracy.max())
    assert 0 <= runs.grid.min() < runs.grid.max() == 1.0
    assert np.trapezoid(runs.density, runs.grid) == pytest.approx(1.0, abs=1e-3)
    inside = stats.gaussian_kde(accuracy).integrate_box_1d(0, 1)
    assert inside < 0.97
    assert runs.two_run_gap == pytest.approx(2.77 * runs.std, rel=1e-3)


def test_runs_that_do_not_differ_have_no_density():
    assert len(statistics.run_distribution(np.ones((5, 4))).grid) == 0
    assert math.isnan(statistics.run_distribution(np.ones((5, 1))).std)


def test_lengths_are_split_by_right_and_wrong_and_truncations_counted():
    lengths = statistics.length_statistics(
        [[1, 1], [0, 0]], [[10, 20], [30, 64]], [[True, True], [True, False]]
    )
    assert (lengths.mean, lengths.median, lengths.max) == (31.0, 25.0, 64)
    assert (lengths.mean_right, lengths.mean_wrong, lengths.truncation_rate) == (15.0, 47.0, 0.25)
    assert statistics.length_statistics([[1]], [[5]], [[True]]).mean_wrong is None
    with pytest.raises(ValueError, match=r"tokens has shape \(1, 2\), correct has \(1, 1\)"):
        statistics.length_statistics([[1]], [[5, 6]], [[True]])


def test_accuracy_at_a_budget_counts_only_right_answers_that_fit():
    correct, tokens = [[1, 1, 0, 1]], [[4, 8, 2, 16]]
    got = statistics.accuracy_at_budget(correct, tokens, [1, 4, 7.5, 8, 100])
    assert got.tolist() == [0.0, 0.25, 0.25, 0.5, 0.75]


def test_length_bins_partition_the_responses():
    tokens = rng(17).integers(5, 40, size=(50, 8))
    correct = rng(18).random((50, 8)) < tokens / 40
    bins = statistics.accuracy_by_length(correct, tokens, max_bins=5)
    assert sum(part.count for part in bins) == 400
    most_of_one_length = np.unique_counts(tokens).counts.max()  # a length is not split, so a bin is off by it
    assert all(abs(part.count - 400 / 5) <= most_of_one_length for part in bins)
    assert all(left.high < right.low for left, right in itertools.pairwise(bins))
    for part in bins:
        inside = (tokens >= part.low) & (tokens <= part.high)
        assert (inside.sum(), correct[inside].mean()) == (part.count, pytest.approx(part.accuracy))
    assert len(statistics.accuracy_by_length([[1, 0]], [[7, 7]])) == 1
