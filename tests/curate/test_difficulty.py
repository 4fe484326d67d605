"""Pass rates, the band, plurality and the mixture."""

import numpy as np
import pytest

from phi4r.core.errors import ConfigError
from phi4r.core.problem import Problem
from phi4r.curate.difficulty import (
    apply_mixture,
    fill_by_plurality,
    mixture_counts,
    parse_mixture,
    plurality,
    teachable_band,
)


def pool(count: int, task: str = "modchain", difficulty: float | None = 4) -> list[Problem]:
    return [Problem(f"{task}{difficulty}-{i}", f"q{i}", "7", task, difficulty) for i in range(count)]


def test_the_band_keeps_both_of_its_edges_and_names_what_lies_outside() -> None:
    rates = np.array([0.0, 0.1, 0.5, 0.9, 1.0, np.nan])
    result = teachable_band(pool(6), rates, 0.1, 0.9)
    assert [problem.meta["pass_rate"] for problem in result.kept] == [0.1, 0.5, 0.9]
    assert [item.reason for item in result.removed] == ["too_hard", "too_easy", "not_measured"]
    assert result.notes["share_without_variance"] == 0.4
    assert sum(result.notes["histogram"]) == 5


@pytest.mark.parametrize(
    ("rates", "low", "high"), [([0.5], 0.1, 0.9), ([0.5, 1.5], 0.1, 0.9), ([0.5, 0.5], 0.9, 0.1)]
)
def test_impossible_rates_and_bands_are_refused(rates: list[float], low: float, high: float) -> None:
    with pytest.raises(ValueError):
        teachable_band(pool(2), np.array(rates), low, high)


def test_the_plurality_wins_and_missing_answers_count_against_it() -> None:
    assert plurality(["7", " 7", "8", None]) == ("7", 0.5)
    assert plurality(["8", "7", "7", "8"]) == ("8", 0.5)
    assert plurality([None, None]) == ("", 0.0)
    assert plurality(["2", "0.5", r"\frac12", "1/2", "2"]) == ("0.5", 0.6)
    assert plurality(["1/2", "0.5", "3"], same=lambda a, b: {a, b} == {"1/2", "0.5"}) == ("1/2", 2 / 3)


def test_plurality_fills_missing_answers_and_removes_disagreements() -> None:
    problems = [Problem("a", "q", "5"), Problem("b", "q", ""), Problem("c", "q", "")]
    result = fill_by_plurality(problems, [["6", "6"], ["6", "6", "7"], ["1", "2", "3"]], min_agreement=0.5)
    assert [(problem.id, problem.answer) for problem in result.kept] == [("a", "5"), ("b", "6")]
    assert [(item.problem.id, item.reason) for item in result.removed] == [("c", "no_agreement")]
    assert result.kept[1].meta["answer_source"] == "plurality"


def test_epochs_go_by_cluster_then_task_then_star_then_once() -> None:
    problems = pool(1, difficulty=6) + pool(1) + pool(1, "addition") + pool(1, "", None)
    epochs = {"modchain/6": 3.0, "modchain": 2.0, "*": 0.0}
    assert mixture_counts(problems, epochs).tolist() == [3, 2, 0, 0]
    assert mixture_counts(problems, {"modchain": 2.0}).tolist() == [2, 2, 1, 1]


def test_fractional_epochs_hold_on_average_for_each_problem_alone() -> None:
    problems = pool(4000)
    counts = mixture_counts(problems, {"*": 1.3}, seed=5)
    assert set(counts.tolist()) == {1, 2}
    assert abs(counts.mean() - 1.3) <= 5 * np.sqrt(0.3 * 0.7 / 4000)
    assert np.array_equal(mixture_counts(problems[::-3], {"*": 1.3}, seed=5), counts[::-3])
    assert not np.array_equal(mixture_counts(problems, {"*": 1.3}, seed=6), counts)


def test_a_cluster_with_no_epochs_is_removed_with_its_name() -> None:
    result = apply_mixture(pool(3), {"modchain/4": 0.0})
    assert [item.detail["cluster"] for item in result.removed] == ["modchain/4"] * 3
    assert [problem.meta["epochs"] for problem in apply_mixture(pool(2), {"*": 2.0}).kept] == [2, 2]


def test_a_mixture_is_read_from_text_and_a_bad_part_is_named() -> None:
    assert parse_mixture(" modchain/6=2, *=.5 ") == {"modchain/6": 2.0, "*": 0.5}
    assert parse_mixture("") == {}
    for bad in ("modchain", "modchain=", "=2", "modchain=-1", "modchain=nan"):
        with pytest.raises(ConfigError, match=r"curate\.mixture"):
            parse_mixture(bad)
