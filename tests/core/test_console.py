"""What is printed when the output is not a terminal, and by whom."""

from __future__ import annotations

import re

import pytest

from phi4r.core import console
from phi4r.core.console import Progress, format_seconds, format_value, print_table, say


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A console for this test's stdout; not a rank, unless the test says so."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    console.console.cache_clear()


def test_progress_is_plain_lines_with_percent_metrics_and_eta(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("sft", 200, every=100) as progress:
        for step in range(1, 201):
            progress.update(step, {"loss": 1.23456, "tokens": 1024})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["sft", "1/200", "0%"],
        ["sft", "100/200", "50%"],
        ["sft", "200/200", "100%"],
    ]
    assert all(re.search(r"  loss 1\.235  tokens 1,024  ETA \d+:\d\d$", line) for line in lines)


def test_steps_of_an_earlier_run_count_for_percent_and_not_for_eta() -> None:
    with Progress("sft", 100, start=90) as progress:
        assert progress.eta_s is None
        progress._began -= 10.0
        progress.update(95)
        # Five own steps in ten seconds, five to go.
        assert progress.eta_s == pytest.approx(10.0, abs=1.0)


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    console.console.cache_clear()
    say("x")
    print_table("t", ["a"], [[1]])
    with Progress("sft", 1) as progress:
        progress.update(1)
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("RANK")
    console.console.cache_clear()


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    say("[bold] " + "x" * 300)
    assert capsys.readouterr().out == "[bold] " + "x" * 300 + "\n"


def test_values_and_times_are_short() -> None:
    assert [format_value(value) for value in (12345, 0.000123456, 1.0, True, "x")] == [
        "12,345",
        "0.0001235",
        "1",
        "True",
        "x",
    ]
    assert [format_seconds(value) for value in (0.4, 61, 3727, -1)] == ["0:00", "1:01", "1:02:07", "0:00"]
