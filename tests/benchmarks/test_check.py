"""No times of something whose tests fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import grpo_head
from benchmarks.check import TESTS, failure, files_of
from tests.benchmarks.conftest import ROOT, SMALL, copy_of_benchmarks, python

GREEN = "def test_it() -> None:\n    pass\n"
RED = "def test_it() -> None:\n    assert 1 == 2\n"
# A test that leaves a line each time it runs.
COUNTING = """
from pathlib import Path

def test_it() -> None:
    with open(Path(__file__).with_suffix(".runs"), "a") as file:
        file.write("x")
"""


@pytest.fixture(autouse=True)
def _bare_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted tests need no plugins, which take most of a small run's time."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def planted(root: Path, text: str, name: str = "test_attention_planted.py") -> Path:
    path = root / "tests" / "kernels" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def reason(root: Path, op: str = "attention") -> str:
    return failure(op, "cpu", root, root / "green")


def test_every_op_has_tests_in_this_repository_once_its_kernel_has() -> None:
    assert set(TESTS) == {"attention", "grpo_head", "step", "kernels", "rollout", "data"}
    for op in ("rollout", "data", "kernels"):
        assert files_of(op, "cpu", ROOT), op


def test_failing_tests_give_the_reason_and_passing_ones_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted(tmp_path, RED)
    assert "test_attention_planted.py fails (exit code 1): 1 failed" in reason(tmp_path)
    assert "assert 1 == 2" in capsys.readouterr().out
    planted(tmp_path, GREEN)
    assert reason(tmp_path) == ""


def test_success_is_remembered_until_a_source_or_a_test_changes(tmp_path: Path) -> None:
    path = planted(tmp_path, COUNTING)
    source = tmp_path / "kernels" / "phi4r_kernels" / "kernel.py"
    source.parent.mkdir(parents=True)
    source.write_text("a = 1\n")
    runs = path.with_suffix(".runs")
    assert (reason(tmp_path), reason(tmp_path)) == ("", "")
    assert runs.read_text() == "x"
    source.write_text("a = 2\n")
    assert reason(tmp_path) == ""
    assert runs.read_text() == "xx"


def test_no_tests_and_skipped_tests_are_no_success(tmp_path: Path) -> None:
    assert "no tests of attention for cpu" in reason(tmp_path)
    planted(tmp_path, "import pytest\n\n@pytest.mark.skip\ndef test_it() -> None:\n    pass\n")
    assert "did not run: 1 skipped" in reason(tmp_path)


def test_one_red_file_among_green_ones_is_enough(tmp_path: Path) -> None:
    planted(tmp_path, GREEN, "test_attention_a.py")
    planted(tmp_path, RED, "test_attention_b.py")
    assert "test_attention_b.py fails" in reason(tmp_path)


def test_an_entry_measures_nothing_and_writes_nothing_while_a_test_is_red(tmp_path: Path) -> None:
    folder = copy_of_benchmarks(tmp_path, RED)
    words = [
        "-m",
        "benchmarks.grpo_head",
        *SMALL,
        "--tokens",
        "64",
        "--modes",
        "logprobs",
        "--results",
        "rows",
    ]
    ended = python(folder, *words)
    assert ended.returncode == 1
    assert "nothing is written" in ended.stderr
    assert "naive" not in ended.stdout
    assert not (folder / "rows").exists()


def test_without_the_check_an_entry_prints_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["grpo_head", *SMALL, "--tokens", "64", "--modes", "logprobs"]
    monkeypatch.setattr(sys, "argv", [*words, "--results", str(tmp_path / "rows"), "--no-check"])
    assert grpo_head.main() == 0
    assert "naive" in capsys.readouterr().out
    assert not (tmp_path / "rows").exists()
