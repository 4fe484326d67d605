"""Result files of an evaluation: one record per problem and run, and the summary computed from them.

`results.jsonl` is the source; every number in `summary.json` and in the report can be computed again from it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from phi4r.core.errors import UserError
from phi4r.core.io import JsonlWriter, read_jsonl
from phi4r.core.seeds import Stream
from phi4r.evaluate import statistics
from phi4r.evaluate.statistics import Interval

OUTCOMES = ("correct", "wrong", "no_answer", "timeout", "error")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One answer: problem x run. A line of results.jsonl holds these fields; those that are None are left
    out.
    """

    problem_id: str
    run: int
    """Index of the run, counted from 0; every run answers every problem once."""
    seed: int
    """The run's seed; distinct over runs."""
    correct: bool
    outcome: str
    """One of OUTCOMES. `timeout` and `error` are the verifier's and count as not correct without being called
    wrong.
    """
    answer: str | None
    """The extracted answer in normal form, which majority votes compare; None where there is none."""
    num_tokens: int
    """Length of the response in tokens, the end token included."""
    finished: bool
    """False where the response ended at the token limit."""
    text: str | None = None
    problem: str | None = None
    gold: str | None = None
    difficulty: float | None = None

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome must be one of {', '.join(OUTCOMES)}, got {self.outcome!r}")
        if self.correct != (self.outcome == "correct"):
            raise ValueError(f"correct is {str(self.correct).lower()} but outcome is {self.outcome!r}")
        if self.run < 0:
            raise ValueError(f"run must be 0 or more, got {self.run}")
        if self.num_tokens < 0:
            raise ValueError(f"num_tokens must be 0 or more, got {self.num_tokens}")


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "problem_id": (str,),
    "run": (int,),
    "seed": (int,),
    "correct": (bool,),
    "outcome": (str,),
    "answer": (str, type(None)),
    "num_tokens": (int,),
    "finished": (bool,),
    "text": (str, type(None)),
    "problem": (str, type(None)),
    "gold": (str, type(None)),
    "difficulty": (int, float, type(None)),
}
_REQUIRED = ("problem_id", "run", "seed", "correct", "outcome", "num_tokens", "finished")


class Results:
    """A full rectangle of records: Q problems x R runs, every pair exactly once.

    `problem_ids` keeps the order of first appearance and `runs` is sorted; the matrices have shape [Q, R] in
    that order. ValueError names the first pair that is missing or doubled, or the run whose seed is another
    run's.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        by_pair: dict[tuple[str, int], Record] = {}
        seeds: dict[int, int] = {}
        for record in records:
            pair = (record.problem_id, record.run)
            if pair in by_pair:
                raise ValueError(f"problem {record.problem_id!r} appears twice in run {record.run}")
            if seeds.setdefault(record.run, record.seed) != record.seed:
                raise ValueError(f"run {record.run} has two seeds, {seeds[record.run]} and {record.seed}")
            by_pair[pair] = record
        if not by_pair:
            raise ValueError("there are no results")
        if len(set(seeds.values())) != len(seeds):
            shared = next(seed for seed, count in Counter(seeds.values()).items() if count > 1)
            runs = ", ".join(str(run) for run, seed in seeds.items() if seed == shared)
            raise ValueError(f"runs {runs} share the seed {shared}: they are not independent")
        self.problem_ids = list(dict.fromkeys(problem_id for problem_id, _ in by_pair))
        self.runs = sorted(seeds)
        self.seeds = [seeds[run] for run in self.runs]
        for problem_id in self.problem_ids:
            for run in self.runs:
                if (problem_id, run) not in by_pair:
                    raise ValueError(f"problem {problem_id!r} has no result in run {run}")
        self._by_pair = by_pair

    def __len__(self) -> int:
        return len(self._by_pair)

    def record(self, problem_id: str, run: int) -> Record:
        """The record of one problem in one run (KeyError if there is none)."""
        return self._by_pair[problem_id, run]

    def records(self) -> list[Record]:
        """All records, problem by problem, runs in order."""
        return [self._by_pair[problem_id, run] for problem_id in self.problem_ids for run in self.runs]

    def _matrix(self, field: str, dtype: type) -> NDArray[Any]:
        values = [getattr(record, field) for record in self.records()]
        return np.array(values, dtype=dtype).reshape(len(self.problem_ids), len(self.runs))

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Right or not, bool [Q, R]."""
        return self._matrix("correct", np.bool_)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Response lengths in tokens, int64 [Q, R]."""
        return self._matrix("num_tokens", np.int64)

    @property
    def finished(self) -> NDArray[np.bool_]:
        """Ended with an end token, bool [Q, R]."""
        return self._matrix("finished", np.bool_)

    @property
    def answers(self) -> list[list[str | None]]:
        """Extracted answers, [Q][R]."""
        return [
            [self._by_pair[problem_id, run].answer for run in self.runs] for problem_id in self.problem_ids
        ]

    def select(self, problem_ids: Sequence[str]) -> "Results":
        """The results of these problems only, in this order."""
        return Results(self._by_pair[problem_id, run] for problem_id in problem_ids for run in self.runs)


# --- files


def write_results(path: str | Path, results: Results) -> None:
    """Write results.jsonl, a line per problem and run; the file appears whole or not at all."""
    with JsonlWriter(path) as writer:
        for record in results.records():
            row = asdict(record)
            writer.write({key: value for key, value in row.items() if value is not None or key == "answer"})


def read_results(path: str | Path) -> Results:
    """Read results.jsonl. A bad line raises UserError naming file, line, field and what was expected.

    Fields that are not known are ignored, so that other tools may add their own.
    """
    records = []
    for line_number, row in read_jsonl(path):
        where = f"{path}:{line_number}"
        for name in _REQUIRED:
            if name not in row:
                raise UserError(f"{where}: {name!r} is missing (a line needs {', '.join(_REQUIRED)})")
        known = {name: row[name] for name in _FIELD_TYPES if name in row}
        for name, value in known.items():
            allowed = _FIELD_TYPES[name]
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
                raise UserError(f"{where}: {name!r} must be {wanted}, got {value!r}")
        try:
            records.append(Record(**{"answer": None, **known}))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
    try:
        return Results(records)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


# --- from samples to results


class ProblemLike(Protocol):
    """What evaluation needs to know of a problem."""

    @property
    def id(self) -> str: ...
    @property
    def problem(self) -> str: ...
    @property
    def answer(self) -> str: ...


class SampleLike(Protocol):
    """What evaluation needs to know of one response; the rollout engines' samples fit."""

    @property
    def text(self) -> str: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def finished(self) -> bool: ...


class VerdictLike(Protocol):
    """What a checker says of one response: one of OUTCOMES, and the normalised answer where one was found."""

    @property
    def outcome(self) -> str: ...
    @property
    def answer(self) -> str | None: ...


P = TypeVar("P", bound=ProblemLike)
S = TypeVar("S", bound=SampleLike)


def evaluate_samples(
    problems: Sequence[P],
    samples_by_run: Sequence[Sequence[S]],
    check: Callable[[Sequence[P], Sequence[S]], Sequence[VerdictLike]],
    *,
    seeds: Sequence[int] | None = None,
    keep_text: bool = True,
) -> Results:
    """Check every sample and collect the records: `samples_by_run[r][q]` answers `problems[q]` in run r.

    `check(problems, samples)` grades one run at a time, so that a pool of workers can share it; it should be
    the checker that serves the reward. `seeds[r]` is run r's seed (default: r). ValueError when a run has
    another number of samples, or of verdicts, than there are problems. With `keep_text=False` response texts
    are not kept.
    """
    run_seeds = list(range(len(samples_by_run))) if seeds is None else list(seeds)
    if len(run_seeds) != len(samples_by_run):
        raise ValueError(f"{len(run_seeds)} seeds for {len(samples_by_run)} runs")
    records = []
    for run, samples in enumerate(samples_by_run):
        if len(samples) != len(problems):
            raise ValueError(f"run {run} has {len(samples)} samples for {len(problems)} problems")
        verdicts = check(problems, samples)
        if len(verdicts) != len(problems):
            raise ValueError(f"run {run} has {len(verdicts)} verdicts for {len(problems)} problems")
        for problem, sample, verdict in zip(problems, samples, verdicts, strict=True):
            records.append(
                Record(
                    problem_id=problem.id,
                    run=run,
                    seed=run_seeds[run],
                    correct=verdict.outcome == "correct",
                    outcome=verdict.outcome,
                    answer=verdict.answer,
                    num_tokens=sample.num_tokens,
                    finished=sample.finished,
                    text=sample.text if keep_text else None,
                    problem=problem.problem,
                    gold=problem.answer,
                    difficulty=getattr(problem, "difficulty", None),
                )
            )
    return Results(records)


# --- summaries


@dataclass(frozen=True, kw_only=True)
class SummarySettings:
    """How intervals are computed; the same settings and results give the same numbers."""

    bootstrap: int = 2000
    """Bootstrap resamples of each interval."""
    permutations: int = 10_000
    """Sign flips of the permutation test."""
    confidence: float = 0.95
    seed: int = 0

    def rng(self, stream: Stream) -> np.random.Generator:
        """An independent random stream for one interval."""
        return np.random.default_rng([self.seed, stream])


def _powers_of_two_up_to(limit: int) -> list[int]:
    values = [2**power for power in range(limit.bit_length()) if 2**power <= limit]
    return values if values[-1] == limit else [*values, limit]


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def summarise(results: Results, settings: SummarySettings | None = None) -> dict[str, Any]:
    """The summary of one checkpoint, ready for JSON (None stands where a number does not exist).

    `avg_at_k`, also under its name such as `avg_at_8`, with `ci95` (new problems) and `ci95_same_problems`;
    tables `pass_at_k`, `maj_at_k` and `worst_at_k` by k = 1, 2, 4, ... R with intervals; the run-to-run
    spread; lengths; outcomes; and accuracy by length and by difficulty where problems have one.
    """
    settings = settings or SummarySettings()
    correct, tokens = results.correct, results.tokens
    num_problems, num_runs = correct.shape
    options: dict[str, Any] = {"num_resamples": settings.bootstrap, "confidence": settings.confidence}
    accuracy = statistics.bootstrap_interval(correct, rng=settings.rng(Stream.ACCURACY), **options)
    same = None
    if num_runs > 1:
        same = statistics.bootstrap_interval(
            correct, rng=settings.rng(Stream.ACCURACY_SAME_PROBLEMS), target="these_problems", **options
        )
    length = statistics.bootstrap_interval(tokens, rng=settings.rng(Stream.LENGTH), **options)
    runs = statistics.run_distribution(correct)

    def table(estimate: Callable[[int], statistics.Floats], stream: Stream) -> dict[str, Any]:
        rows = {}
        for k in _powers_of_two_up_to(num_runs):
            interval = statistics.problem_interval(estimate(k), rng=settings.rng(stream), **options)
            rows[str(k)] = {"value": interval.mean, "ci95": interval.as_list()}
        return rows

    answers = results.answers
    return {
        "num_problems": num_problems,
        "num_runs": num_runs,
        "seeds": results.seeds,
        "k": num_runs,
        "avg_at_k": accuracy.mean,
        f"avg_at_{num_runs}": accuracy.mean,
        "ci95": accuracy.as_list(),
        "ci95_same_problems": None if same is None else same.as_list(),
        "pass_at_k": table(lambda k: statistics.pass_at_k(correct, k), Stream.PASS_AT_K),
        "maj_at_k": table(lambda k: statistics.maj_at_k(correct, answers, k), Stream.MAJ_AT_K),
        "worst_at_k": table(lambda k: statistics.all_at_k(correct, k), Stream.WORST_AT_K),
        "accuracy_by_run": runs.accuracies.tolist(),
        "std_over_runs": _finite(runs.std),
        "min_over_runs": runs.low,
        "max_over_runs": runs.high,
        "two_run_gap95": _finite(runs.two_run_gap),
        "mean_length": length.mean,
        "mean_length_ci95": length.as_list(),
        "length": asdict(statistics.length_statistics(correct, tokens, results.finished)),
        "outcomes": {name: count for name, count in _count_outcomes(results).items() if count},
        "by_difficulty": _by_difficulty(results),
        "by_length": [asdict(part) for part in statistics.accuracy_by_length(correct, tokens)],
        "settings": asdict(settings),
    }


def _count_outcomes(results: Results) -> dict[str, int]:
    counts = Counter(record.outcome for record in results.records())
    return {name: counts[name] for name in OUTCOMES}


def _by_difficulty(results: Results) -> list[dict[str, float]]:
    groups: dict[float, list[Record]] = {}
    for record in results.records():
        if record.difficulty is not None:
            groups.setdefault(record.difficulty, []).append(record)
    return [
        {
            "difficulty": difficulty,
            "num_problems": len(group) // len(results.runs),
            "accuracy": sum(record.correct for record in group) / len(group),
            "mean_length": sum(record.num_tokens for record in group) / len(group),
        }
        for difficulty, group in sorted(groups.items())
    ]


def compare(before: Results, after: Results, settings: SummarySettings | None = None) -> dict[str, Any]:
    """The paired comparison of two checkpoints on the same problems, ready for JSON; differences are after -
    before.

    `mean` and `ci95` are the gain in accuracy with its hierarchical bootstrap interval (new problems);
    `length` the same for response lengths in tokens; `pass_at_k` at the largest k both have. UserError when
    the problems differ.
    """
    settings = settings or SummarySettings()
    in_one_only = sorted(set(before.problem_ids) ^ set(after.problem_ids))
    if in_one_only:
        num_problems = len(set(before.problem_ids) | set(after.problem_ids))
        raise UserError(
            f"the two evaluations are not of the same problems: {len(in_one_only)} of {num_problems} are in "
            f"one only, such as {in_one_only[0]!r}"
        )
    after = after.select(before.problem_ids)
    options: dict[str, Any] = {"num_resamples": settings.bootstrap, "confidence": settings.confidence}
    paired = statistics.paired_comparison(
        before.correct,
        after.correct,
        rng=settings.rng(Stream.GAIN),
        num_permutations=settings.permutations,
        **options,
    )
    length = statistics.contrast_interval(
        [(before.tokens, -1.0), (after.tokens, 1.0)], rng=settings.rng(Stream.GAIN_LENGTH), **options
    )
    k = min(len(before.runs), len(after.runs))
    difference_Q = statistics.pass_at_k(after.correct, k) - statistics.pass_at_k(before.correct, k)
    passes = statistics.contrast_interval(
        [(difference_Q[:, None], 1.0)], rng=settings.rng(Stream.GAIN_PASSES), **options
    )

    def rendered(interval: Interval) -> dict[str, Any]:
        return {"mean": interval.mean, "ci95": interval.as_list()}

    return {
        **rendered(paired.gain),
        "standard_error": _finite(paired.standard_error),
        "t": _finite(paired.t),
        "t_p_value": _finite(paired.t_p_value),
        "permutation_p_value": paired.permutation_p_value,
        "num_problems": paired.num_problems,
        "num_better": paired.num_better,
        "num_worse": paired.num_worse,
        "length": rendered(length),
        "pass_at_k": {"k": k, **rendered(passes)},
        "settings": asdict(settings),
    }


# --- console


def summary_table(summaries: Mapping[str, Mapping[str, Any]], gain: Mapping[str, Any] | None = None) -> Table:
    """A rich table of summaries by stage name, in the given order, with the paired gain as its caption."""
    first = next(iter(summaries.values()))
    num_runs = {summary["k"] for summary in summaries.values()}
    k = str(num_runs.pop()) if len(num_runs) == 1 else "k"
    table = Table(
        title=f"{first['num_problems']} problems, {first['num_runs']} runs each", title_justify="left"
    )
    table.add_column("stage", style="bold", no_wrap=True)
    # Few enough columns for a terminal of 80 characters; the rest is in summary.json and the report.
    for title in (f"avg@{k}", "95% CI", f"maj@{k}", f"pass@{k}", "mean tokens"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, summary in summaries.items():
        last = str(summary["k"])
        table.add_row(
            name,
            percent(summary["avg_at_k"]),
            interval_text(summary["ci95"]),
            percent(summary["maj_at_k"][last]["value"]),
            percent(summary["pass_at_k"][last]["value"]),
            f"{summary['mean_length']:.1f}",
        )
    if gain is not None:
        table.caption = f"gain {gain_text(gain)}, paired by problem; permutation p {p_value_text(gain)}"
        table.caption_justify = "left"
    return table


def percent(share: float) -> str:
    """`0.5312` -> `53.1%`."""
    return f"{100 * share:.1f}%"


def interval_text(ci95: Sequence[float]) -> str:
    """`[0.5, 0.561]` -> `50.0-56.1%` (with an en dash)."""
    return f"{100 * ci95[0]:.1f}\u2013{100 * ci95[1]:.1f}%"


def gain_text(gain: Mapping[str, Any]) -> str:
    """The gain in percentage points with its interval: `+42.5 points (95% CI +40.1 to +44.8)`."""
    low, high = gain["ci95"]
    return f"{100 * gain['mean']:+.1f} points (95% CI {100 * low:+.1f} to {100 * high:+.1f})"


def p_value_text(gain: Mapping[str, Any]) -> str:
    """The permutation p-value: `= 0.031`, or `< 0.001`."""
    value = gain["permutation_p_value"]
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
