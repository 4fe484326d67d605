"""Statistics of repeated evaluation runs: `Q` problems, each answered in `R` independent runs.

Shape legend: `Q` problems, `R` runs, `K` runs of another checkpoint, `B` bootstrap resamples. A name such as
`correct_QR` is an array [Q, R]. All inputs are NumPy arrays; nothing here knows about files, models or text.

Two different questions have two different intervals, and a report must say which one it answers:

- *new problems* (the default): where would the mean land on fresh problems of the same kind, sampled afresh?
  Its width is set by the number of problems; more runs do not shrink it below the spread between problems.
- *these problems*: where would a repeat of this very benchmark land? Its width is set by problems x runs.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from phi4r.verify.strict import classes

Floats = NDArray[np.float64]
Target = Literal["new_problems", "these_problems"]

MAX_RUNS = 1000  # binomial coefficients C(n, k) stay finite in float64 up to here
_CHUNK_ELEMENTS = 2_000_000  # random draws held at once by the bootstrap


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A two-sided confidence interval `[low, high]` around `mean`, at level `confidence` (0.95 = 95%)."""

    mean: float
    low: float
    high: float
    confidence: float

    @property
    def half_width(self) -> float:
        """Half of the interval's width, in the units of `mean`."""
        return (self.high - self.low) / 2

    def as_list(self) -> list[float]:
        """`[low, high]`, as it is written into summaries."""
        return [self.low, self.high]


def as_matrix(values: ArrayLike, name: str = "values") -> Floats:
    """`values` as a float64 matrix [Q, R] with at least one problem and one run.

    Raises ValueError, naming `name` and the shape, for anything else, and for NaN or infinity.
    """
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"{name} must be a matrix [problems, runs] with at least one of each, got shape {matrix.shape}"
        )
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return matrix


def _check_k(k: int, num_runs: int) -> None:
    if not 1 <= k <= num_runs:
        raise ValueError(f"k must be between 1 and the number of runs ({num_runs}), got {k}")


# --- per-problem estimators


def avg_at_k(correct_QR: ArrayLike) -> float:
    """Mean accuracy over problems and runs: the mean pass@1 over R runs."""
    return float(as_matrix(correct_QR, "correct").mean())


def pass_at_k(correct_QR: ArrayLike, k: int) -> Floats:
    """Unbiased pass@k per problem, float64 [Q]: `1 - C(n - c, k) / C(n, k)` for c right answers in n = R
    runs.

    (Chen et al. 2021.) It is the chance that k answers drawn without replacement from
    the n hold at least one right one, so SciPy's hypergeometric survival function computes it without large
    factorials. The plug-in `1 - (1 - c/n)^k` would be biased low. Best-of-k in the paper's words. ValueError
    unless 1 <= k <= R.
    """
    correct = as_matrix(correct_QR, "correct")
    num_runs = correct.shape[1]
    _check_k(k, num_runs)
    return np.asarray(
        stats.hypergeom.sf(0, num_runs, correct.sum(axis=1).astype(np.int64), k), dtype=np.float64
    )


def all_at_k(correct_QR: ArrayLike, k: int) -> Floats:
    """Worst-of-k per problem, float64 [Q]: `C(c, k) / C(n, k)`, the chance that k drawn answers are all
    right.
    """
    correct = as_matrix(correct_QR, "correct")
    num_runs = correct.shape[1]
    _check_k(k, num_runs)
    return np.asarray(
        stats.hypergeom.sf(k - 1, num_runs, correct.sum(axis=1).astype(np.int64), k), dtype=np.float64
    )


def maj_at_k(correct_QR: ArrayLike, answers: Sequence[Sequence[str | None]], k: int) -> Floats:
    """Majority vote of k answers per problem, float64 [Q]: its expected accuracy over *all* k-subsets of the
    R votes.

    `answers[q][r]` is the extracted answer, or None where there was none; such a run casts no vote. Right
    answers are all equal to the gold one, so they count as one candidate however they are written; so do
    wrong ones that are the same by the reward's equality (`phi4r.verify.strict.same_answer`; where only
    algebra can tell, they are different).

    A tie of t candidates is worth 1/t when the right one is among them; a
    subset without any vote is worth 0. The expectation is computed exactly by counting subsets, not by
    drawing some. ValueError unless 1 <= k <= R <= 1000.
    """
    correct = as_matrix(correct_QR, "correct").astype(bool)
    num_questions, num_runs = correct.shape
    _check_k(k, num_runs)
    if num_runs > MAX_RUNS:
        raise ValueError(f"maj@k counts subsets of at most {MAX_RUNS} runs, got {num_runs}")
    if len(answers) != num_questions or any(len(row) != num_runs for row in answers):
        raise ValueError(f"answers must have the shape of correct, {correct.shape}")
    values = np.empty(num_questions)
    for question in range(num_questions):
        missed = [a for a, is_right in zip(answers[question], correct[question], strict=True) if not is_right]
        wrong = tuple(sorted(answer for answer in missed if answer is not None))
        values[question] = _majority_accuracy(
            int(correct[question].sum()), _votes(wrong), len(missed) - len(wrong), k
        )
    return values


@lru_cache(maxsize=65536)
def _votes(answers: tuple[str, ...]) -> tuple[int, ...]:
    """Votes of each different answer, the least first."""
    return tuple(sorted(Counter(classes(answers)).values()))


@lru_cache(maxsize=65536)
def _majority_accuracy(num_right: int, wrong_counts: tuple[int, ...], num_silent: int, k: int) -> float:
    """Expected worth of the majority among k of `num_right + sum(wrong_counts) + num_silent` votes.

    For each number m of right votes in the subset, count the ways to choose the other k - m so that no wrong
    candidate has more than m, by how many have exactly m (the ties): a small table ways[size, ties] filled
    candidate by candidate.
    """
    if num_right == 0:
        return 0.0
    total = num_right + sum(wrong_counts) + num_silent
    expected = 0.0
    for right_votes in range(1, min(num_right, k) + 1):
        others = k - right_votes
        max_ties = others // right_votes
        ways = np.zeros((others + 1, max_ties + 1))
        for silent in range(min(num_silent, others) + 1):
            ways[silent, 0] = math.comb(num_silent, silent)
        for count in wrong_counts:
            grown = np.zeros_like(ways)
            for votes in range(min(count, right_votes, others) + 1):
                weight = math.comb(count, votes)
                source = ways[: others + 1 - votes]
                if votes == right_votes:
                    grown[votes:, 1:] += weight * source[:, :-1]
                else:
                    grown[votes:] += weight * source
            ways = grown
        worth = (ways[others] / np.arange(1, max_ties + 2)).sum()
        expected += math.comb(num_right, right_votes) * float(worth)
    return min(1.0, expected / math.comb(total, k))


# --- intervals


def bootstrap_interval(
    values_QR: ArrayLike,
    *,
    rng: np.random.Generator,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    target: Target = "new_problems",
) -> Interval:
    """Bootstrap interval of the mean of `values_QR` over problems and runs.

    With `target="new_problems"` the bootstrap is hierarchical: problems are drawn with replacement, then
    fresh runs of each drawn problem. Taken literally this counts the noise of the runs twice (the observed
    problem means already carry it) and is too wide; so the problem means are first shrunk towards the grand
    mean until their spread is the estimated spread between problems alone, and the resampled deviations
    within a problem are inflated by sqrt(R / (R - 1)), as in the residual bootstrap for multilevel data
    (Carpenter, Goldstein and Rasbash 2003). With one run per problem the two levels cannot be told apart and
    problems alone are drawn, which covers both. With `target="these_problems"` the problems stay and only
    their runs are drawn again; that needs at least two runs.

    The percentiles are widened for the number of problems Q (the "expanded percentile" of Hesterberg 2015),
    which matters below about 30 problems. Where all values are 0 or all are 1 a bootstrap cannot see any
    spread: the interval is then Clopper-Pearson's with Q trials. The interval is kept inside the range [0, 1]
    for 0/1 data.
    """
    values = as_matrix(values_QR)
    is_binary = bool(np.isin(values, (0.0, 1.0)).all())
    if is_binary and values.min() == values.max():
        return _degenerate_interval(float(values[0, 0]), len(values), confidence)
    interval = contrast_interval(
        [(values, 1.0)], rng=rng, num_resamples=num_resamples, confidence=confidence, target=target
    )
    if not is_binary:
        return interval
    return Interval(
        mean=interval.mean, low=max(0.0, interval.low), high=min(1.0, interval.high), confidence=confidence
    )


def contrast_interval(
    terms: Sequence[tuple[ArrayLike, float]],
    *,
    rng: np.random.Generator,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    target: Target = "new_problems",
) -> Interval:
    """Bootstrap interval of `sum_i weight_i * mean(values_i)` where all matrices share their problems (rows).

    `[(before_QR, -1.0), (after_QK, 1.0)]` is the paired gain. The problems are drawn once for all terms, so
    what they have in common cancels; the numbers of runs may differ. See `bootstrap_interval` for the method
    and the targets.
    """
    matrices = [(as_matrix(values), weight) for values, weight in terms]
    num_questions = len(matrices[0][0])
    if any(len(values) != num_questions for values, _ in matrices):
        raise ValueError(
            f"terms have different numbers of problems: {[len(values) for values, _ in matrices]}"
        )
    _check_bootstrap(num_resamples, confidence)
    point_Q = np.zeros(num_questions)
    noise = 0.0
    for values, weight in matrices:
        point_Q += weight * values.mean(axis=1)
        num_runs = values.shape[1]
        if num_runs > 1:
            noise += weight**2 * float(values.var(axis=1, ddof=1).mean()) / num_runs
    mean = float(point_Q.mean())
    can_split = all(values.shape[1] > 1 for values, _ in matrices)
    if target == "these_problems" and not can_split:
        raise ValueError("an interval for these problems needs at least two runs of each")

    if target == "these_problems":
        centres_Q, questions_BQ = point_Q, None
    else:
        spread = float(point_Q.var(ddof=1)) if num_questions > 1 else 0.0
        if not can_split:
            shrink = 1.0
        elif spread > 0:
            shrink = math.sqrt(max(0.0, 1.0 - noise / spread))
        else:
            shrink = 0.0
        centres_Q = mean + shrink * (point_Q - mean)
        questions_BQ = rng.integers(num_questions, size=(num_resamples, num_questions), dtype=np.int32)

    means_B = np.full(num_resamples, mean) if questions_BQ is None else centres_Q[questions_BQ].mean(axis=1)
    if can_split:
        for values, weight in matrices:
            means_B += weight * _resampled_run_noise(values, questions_BQ, num_resamples, rng)
    degrees = num_questions - 1 if questions_BQ is not None else num_questions * (matrices[0][0].shape[1] - 1)
    low, high = _expanded_percentiles(means_B, confidence, degrees)
    return Interval(mean=mean, low=low, high=high, confidence=confidence)


def problem_interval(
    values_Q: ArrayLike, *, rng: np.random.Generator, num_resamples: int = 2000, confidence: float = 0.95
) -> Interval:
    """Bootstrap interval of the mean of one unbiased estimate per problem (pass@k, maj@k, ...), float [Q].

    Problems are drawn with replacement. The spread of the estimates over problems holds the noise of their
    runs too, so this covers new problems *and* new samples. Values must lie in [0, 1].
    """
    values = as_matrix(np.asarray(values_Q, dtype=np.float64).reshape(-1, 1))
    if values.min() < 0 or values.max() > 1:
        raise ValueError("per-problem estimates must lie in [0, 1]")
    return bootstrap_interval(values, rng=rng, num_resamples=num_resamples, confidence=confidence)


def _resampled_run_noise(
    values: Floats, questions_BQ: NDArray[np.int32] | None, num_resamples: int, rng: np.random.Generator
) -> Floats:
    """Mean over problems of freshly drawn run noise, float64 [B]: deviations within a problem, drawn with
    replacement.

    Deviations are inflated by sqrt(R / (R - 1)) so that their variance is the unbiased one.
    """
    num_questions, num_runs = values.shape
    inflate = math.sqrt(num_runs / (num_runs - 1))
    noise_B = np.empty(num_resamples)
    is_binary = bool(np.isin(values, (0.0, 1.0)).all())
    rates_Q = values.mean(axis=1)
    deviations_QR = values - rates_Q[:, None]
    step = max(1, _CHUNK_ELEMENTS // (num_questions * (1 if is_binary else num_runs)))
    everyone = np.arange(num_questions)
    for start in range(0, num_resamples, step):
        stop = min(start + step, num_resamples)
        questions = np.broadcast_to(everyone, (stop - start, num_questions))
        if questions_BQ is not None:
            questions = questions_BQ[start:stop]
        if is_binary:  # the sum of R draws from a row of zeros and ones is binomial
            rates = rates_Q[questions]
            drawn = rng.binomial(num_runs, rates) / num_runs - rates
        else:
            picks = rng.integers(num_runs, size=(*questions.shape, num_runs), dtype=np.int32)
            drawn = deviations_QR[questions[..., None], picks].mean(axis=-1)
        noise_B[start:stop] = inflate * drawn.mean(axis=1)
    return noise_B


def _check_bootstrap(num_resamples: int, confidence: float) -> None:
    if num_resamples < 100:
        raise ValueError(f"a bootstrap interval needs at least 100 resamples, got {num_resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")


def _expanded_percentiles(means_B: Floats, confidence: float, degrees: int) -> tuple[float, float]:
    """Percentiles of the resampled means at a level adjusted for `degrees` of freedom (Hesterberg 2015,
    section 3.2).

    A percentile interval is too short by sqrt((n - 1) / n) and by the ratio of normal to t quantiles; asking
    for the percentile Phi(-sqrt(n / (n - 1)) t_{alpha/2, n-1}) makes up for both.
    """
    tail = (1 - confidence) / 2
    if degrees < 1:
        return float(means_B.min()), float(means_B.max())
    tail = float(stats.norm.cdf(-math.sqrt((degrees + 1) / degrees) * stats.t.isf(tail, degrees)))
    low, high = np.quantile(means_B, [tail, 1 - tail])
    return float(low), float(high)


def _degenerate_interval(value: float, num_questions: int, confidence: float) -> Interval:
    exact = stats.binomtest(round(value * num_questions), num_questions).proportion_ci(
        confidence, method="exact"
    )
    return Interval(mean=value, low=float(exact.low), high=float(exact.high), confidence=confidence)


# --- two checkpoints


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Checkpoint B against checkpoint A on the same problems; all differences are B - A, in units of the
    values.
    """

    gain: Interval
    """Mean difference over problems with its hierarchical bootstrap interval (target: new problems)."""
    standard_error: float
    """Standard deviation of the per-problem differences / sqrt(Q) (Miller 2024, paired by question)."""
    t: float
    """Paired t statistic over problems (infinite when every problem moved by the same amount, 0 when none
    moved).
    """
    t_p_value: float
    permutation_p_value: float
    """Two-sided sign-flip permutation p-value."""
    num_problems: int
    num_better: int
    num_worse: int


def paired_comparison(
    before_QR: ArrayLike,
    after_QK: ArrayLike,
    *,
    rng: np.random.Generator,
    num_resamples: int = 2000,
    num_permutations: int = 10_000,
    confidence: float = 0.95,
) -> PairedComparison:
    """Compare two checkpoints, paired by problem: row q of both matrices is the same problem.

    Pairing removes the spread in difficulty between problems, which is most of the variance. ValueError when
    the numbers of problems differ.
    """
    before, after = as_matrix(before_QR, "before"), as_matrix(after_QK, "after")
    if len(before) != len(after):
        raise ValueError(f"a paired comparison needs the same problems: got {len(before)} and {len(after)}")
    difference_Q = after.mean(axis=1) - before.mean(axis=1)
    num_problems = len(difference_Q)
    gain = contrast_interval(
        [(before, -1.0), (after, 1.0)], rng=rng, num_resamples=num_resamples, confidence=confidence
    )
    deviation = float(difference_Q.std(ddof=1)) if num_problems > 1 else math.nan
    standard_error = deviation / math.sqrt(num_problems)
    mean = float(difference_Q.mean())
    if standard_error > 0:
        t = mean / standard_error
    elif mean == 0:
        t = 0.0
    else:
        t = math.copysign(math.inf, mean) if num_problems > 1 else math.nan
    return PairedComparison(
        gain=gain,
        standard_error=standard_error,
        t=t,
        t_p_value=float(2 * stats.t.sf(abs(t), num_problems - 1)) if num_problems > 1 else math.nan,
        permutation_p_value=sign_flip_p_value(difference_Q, rng=rng, num_permutations=num_permutations),
        num_problems=num_problems,
        num_better=int((difference_Q > 0).sum()),
        num_worse=int((difference_Q < 0).sum()),
    )


def sign_flip_p_value(
    difference_Q: ArrayLike, *, rng: np.random.Generator, num_permutations: int = 10_000
) -> float:
    """Two-sided p-value of mean(difference) = 0 when each difference is as likely as its negative, over sign
    flips.

    Exact, over all 2^Q flips, where those are no more than `num_permutations`; else random flips with the
    observed one counted in, (1 + #extreme) / (1 + #drawn), which can never be 0. Differences of 0 carry no
    information and are dropped.
    """
    difference = np.asarray(difference_Q, dtype=np.float64)
    difference = difference[difference != 0]
    if len(difference) == 0:
        return 1.0
    observed = abs(float(difference.sum()))
    limit = observed - 1e-9 * float(np.abs(difference).sum())  # ties that differ by rounding are ties
    if len(difference) < 31 and 2 ** len(difference) <= num_permutations:
        codes = np.arange(2 ** len(difference))[:, None] >> np.arange(len(difference))
        sums = (1 - 2.0 * (codes & 1)) @ difference
        return float((np.abs(sums) >= limit).mean())
    num_extreme = 0
    step = max(1, _CHUNK_ELEMENTS // len(difference))
    for start in range(0, num_permutations, step):
        size = (min(step, num_permutations - start), len(difference))
        signs = 1 - 2 * rng.integers(2, size=size, dtype=np.int8)
        num_extreme += int((np.abs(signs @ difference) >= limit).sum())
    return (1 + num_extreme) / (1 + num_permutations)


# --- run to run


@dataclass(frozen=True, kw_only=True)
class RunDistribution:
    """How accuracy varies from run to run on the same problems (the paper's "mean (std over runs)" and its
    densities).
    """

    accuracies: Floats
    """Accuracy of each run, float64 [R]."""
    mean: float
    std: float
    """Sample standard deviation (n - 1) over runs; NaN for one run."""
    low: float
    high: float
    grid: Floats
    """Accuracies in [0, 1] at which `density` is given; empty when the runs do not differ."""
    density: Floats
    """Gaussian kernel density (Scott's bandwidth), cut to [0, 1] and scaled to integrate to 1 there."""

    @property
    def two_run_gap(self) -> float:
        """The gap that two single runs of the *same* checkpoint exceed one time in twenty: 1.96 sqrt(2)
        std.
        """
        return 1.96 * math.sqrt(2) * self.std


def run_distribution(correct_QR: ArrayLike, num_points: int = 513) -> RunDistribution:
    """Distribution of the accuracy of single runs, from correct [Q, R]."""
    accuracy = as_matrix(correct_QR, "correct").mean(axis=0)
    std = float(accuracy.std(ddof=1)) if len(accuracy) > 1 else math.nan
    grid, density = np.empty(0), np.empty(0)
    if len(accuracy) > 1 and std > 1e-12:
        kernel = stats.gaussian_kde(accuracy, bw_method="scott")
        width = 4 * math.sqrt(float(kernel.covariance.item()))
        low, high = max(0.0, accuracy.min() - width), min(1.0, accuracy.max() + width)
        grid = np.linspace(low, high, num_points)
        density = kernel(grid) / kernel.integrate_box_1d(0.0, 1.0)
    return RunDistribution(
        accuracies=accuracy,
        mean=float(accuracy.mean()),
        std=std,
        low=float(accuracy.min()),
        high=float(accuracy.max()),
        grid=grid,
        density=density,
    )


# --- lengths


@dataclass(frozen=True, kw_only=True)
class LengthStatistics:
    """Response lengths in tokens, over all problems and runs; None where no response falls into a class."""

    mean: float
    median: float
    p90: float
    max: int
    mean_right: float | None
    mean_wrong: float | None
    truncation_rate: float
    """Share of responses that ended at the token limit instead of with an end token."""


def length_statistics(
    correct_QR: ArrayLike, tokens_QR: ArrayLike, finished_QR: ArrayLike
) -> LengthStatistics:
    """Length statistics, split by right and wrong answers, and the truncation rate."""
    correct = as_matrix(correct_QR, "correct").astype(bool)
    tokens, finished = as_matrix(tokens_QR, "tokens"), as_matrix(finished_QR, "finished").astype(bool)
    _check_shapes(correct, tokens=tokens, finished=finished)
    return LengthStatistics(
        mean=float(tokens.mean()),
        median=float(np.median(tokens)),
        p90=float(np.quantile(tokens, 0.9)),
        max=int(tokens.max()),
        mean_right=float(tokens[correct].mean()) if correct.any() else None,
        mean_wrong=float(tokens[~correct].mean()) if not correct.all() else None,
        truncation_rate=float((~finished).mean()),
    )


def accuracy_at_budget(correct_QR: ArrayLike, tokens_QR: ArrayLike, budgets: ArrayLike) -> Floats:
    """Accuracy when every response is cut at L tokens, for each L in `budgets`: right *and* no longer than
    L.
    """
    correct, tokens = as_matrix(correct_QR, "correct").astype(bool), as_matrix(tokens_QR, "tokens")
    _check_shapes(correct, tokens=tokens)
    lengths = np.sort(tokens[correct])
    limits = np.asarray(budgets, dtype=np.float64)
    return np.asarray(np.searchsorted(lengths, limits, side="right") / tokens.size, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class LengthBin:
    """Responses of `low <= tokens <= high`: how many, and how many of them are right."""

    low: int
    high: int
    count: int
    accuracy: float


def accuracy_by_length(correct_QR: ArrayLike, tokens_QR: ArrayLike, max_bins: int = 6) -> list[LengthBin]:
    """Accuracy of responses grouped by length into at most `max_bins` bins of about equal counts, shortest
    first.

    A length is never split over two bins, so fewer bins come back when few lengths occur.
    """
    correct = as_matrix(correct_QR, "correct").ravel()
    tokens = as_matrix(tokens_QR, "tokens").ravel()
    _check_shapes(correct, tokens=tokens)
    edges = np.unique(np.quantile(tokens, np.linspace(0, 1, max_bins + 1)[1:], method="inverted_cdf"))
    which = np.searchsorted(edges, tokens, side="left")
    bins = []
    for index in np.unique(which):
        inside = which == index
        bins.append(
            LengthBin(
                low=int(tokens[inside].min()),
                high=int(tokens[inside].max()),
                count=int(inside.sum()),
                accuracy=float(correct[inside].mean()),
            )
        )
    return bins


def _check_shapes(correct: np.ndarray, **others: np.ndarray) -> None:
    for name, values in others.items():
        if values.shape != correct.shape:
            raise ValueError(f"{name} has shape {values.shape}, correct has {correct.shape}")
