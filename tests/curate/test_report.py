"""The report adds up, and refuses to be written where it does not."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from phi4r.core.problem import Problem
from phi4r.curate.decontaminate import decontaminate
from phi4r.curate.dedup import deduplicate
from phi4r.curate.difficulty import apply_mixture, teachable_band
from phi4r.curate.report import EXAMPLES_PER_REASON, build_report, print_funnel, stage_summary, summarise
from phi4r.curate.stage import StageResult
from phi4r.curate.validate import task_check, validate

TEXTS = st.sampled_from(
    ["1+2%10?", " 1 + 2%10?", "3*3%10?", "9-1%10?", "not a chain", "", "4+4%10?", "5*5-5%10?", "8%10?"]
)
ROWS = st.lists(st.tuples(TEXTS, st.sampled_from(["3", "9", "8", ""]), st.floats(0, 1)), max_size=30)


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost_between_the_stages_whatever_comes_in(rows: list[tuple[str, str, float]]) -> None:
    problems = [Problem(f"p{i}", text, answer, "modchain") for i, (text, answer, _) in enumerate(rows)]
    rates = {problem.id: rate for problem, (_, _, rate) in zip(problems, rows, strict=True)}
    results: list[StageResult] = []

    def step(result: StageResult) -> list[Problem]:
        results.append(result)
        return result.kept

    left = step(validate(problems, task_check))
    left = step(deduplicate(left))
    left = step(decontaminate(left, [Problem("h", "4+4%10?", "8")]))
    left = step(teachable_band(left, [rates[problem.id] for problem in left], 0.2, 0.8))  # type: ignore[arg-type]
    left = step(apply_mixture(left, {"*": 0.5}))

    report = build_report([summarise(result) for result in results])
    gone = [item.problem.id for result in results for item in result.removed]
    assert sorted(gone + [problem.id for problem in left]) == sorted(problem.id for problem in problems)
    assert report["input"] == len(problems) == report["kept"] + sum(s["removed"] for s in report["stages"])
    for stage in report["stages"]:
        assert stage["before"] == stage["kept"] + stage["removed"]
        assert sum(stage["reasons"].values()) == stage["removed"]
        assert len(stage["examples"]) <= EXAMPLES_PER_REASON * len(stage["reasons"])


def test_kept_and_removed_items_stay_in_input_order() -> None:
    problems = [Problem(f"p{i}", f"{i % 3}+1%10?", str(i % 3 + 1), "modchain") for i in range(9)]
    result = deduplicate(problems)
    assert [problem.id for problem in result.kept] == ["p0", "p1", "p2"]
    assert [item.problem.id for item in result.removed] == [f"p{i}" for i in range(3, 9)]


def test_a_stage_that_loses_items_is_refused() -> None:
    with pytest.raises(ValueError, match="stage dedup loses items: 5 before, 3 kept and 0 removed"):
        stage_summary("dedup", 5, 3, [], {})


def test_a_funnel_with_a_leak_between_two_stages_is_refused() -> None:
    stages = [stage_summary("a", 5, 5, [], {}), stage_summary("b", 4, 4, [], {})]
    with pytest.raises(ValueError, match="5 leave it, but 4 enter b"):
        build_report(stages)


def test_the_table_shows_every_stage_reason_count_and_what_did_not_run() -> None:
    result = deduplicate([Problem(f"p{i}", "1+1", "2") for i in range(1200)])
    out = io.StringIO()
    report = build_report([summarise(result)], {"skipped": ["difficulty was not measured: no model"]})
    print_funnel(report, Console(file=out, width=100))
    text = out.getvalue()
    for expected in ("dedup", "1,200", "duplicate", "1,199", "difficulty was not measured"):
        assert expected in text


def test_an_empty_funnel_can_be_reported() -> None:
    print_funnel(build_report([]), Console(file=io.StringIO()))
