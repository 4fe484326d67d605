"""Nothing moves the numbers: metrics of every step, graded answers and log-probs are those of commit 8169e13.

A change of numerics that is meant rewrites the values (`python -m tests.golden --write COMMIT`) and says so
in its message. Values are compared bit for bit where torch and the kind of processor are those of the file,
and to 1e-9 elsewhere, which a warning says.
"""

from __future__ import annotations

import warnings

import pytest

from tests.golden import compare, runner

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]

REST = {
    layout: tuple(case for case in runner.CASES if case not in runner.DEFAULT.get(layout, ()))
    for layout in runner.LAYOUTS
    if (compare.VALUES / f"{layout}.jsonl").exists()
}


def check(layout: str, cases: tuple[str, ...]) -> None:
    """Run the cases with this tree and compare them with the file of the layout."""
    header, rows = compare.read(layout)
    here = compare.environment()
    exact = here.items() <= header.items()
    if not exact:
        warnings.warn(
            f"golden values of {layout}: compared to {compare.CLOSE:g} and not bit for bit: the file is of"
            f" torch {header['torch']} on {header['cpu_capability']}, here are {here['torch']} on"
            f" {here['cpu_capability']}",
            stacklevel=2,
        )
    found = runner.run(runner.TREE, layout, cases)
    different = compare.differences({case: rows[case] for case in cases}, found, exact)
    assert not different, "\n".join(
        [f"{len(different)} values differ from {header['commit']}:", *different[:40]]
    )


@pytest.mark.parametrize("layout", runner.DEFAULT)
@pytest.mark.proves(
    "Metrics, answers and log-probs equal those of 0.1.0, whose checkpoints load",
    how="SFT, GRPO (synchronous, one step off, continuous), evaluation and score in fp64, bit for bit",
)
def test_values_equal_those_of_0_1_0(layout: str) -> None:
    check(layout, runner.DEFAULT[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layout, cases in REST.items() if cases])
def test_values_of_the_other_layouts_equal_those_of_0_1_0(layout: str) -> None:
    check(layout, REST[layout])


def test_a_change_of_1e_12_is_seen() -> None:
    rows = {"sft": [{"step": 1, "loss": 5.75, "ids": [1.0, 2.0]}]}
    moved = {"sft": [{"step": 1, "loss": 5.75 * (1 + 1e-12), "ids": [1.0, 2.0], "new": 3}]}
    assert compare.differences(rows, moved, exact=True) == [
        "sft row 1 loss: expected 5.75, found 5.75000000000575"
    ]
    assert not compare.differences(rows, moved, exact=False)
    assert compare.differences(rows, {"sft": [{"step": 1, "loss": 5.75, "ids": [1.0, 2.1]}]}, exact=False)
    assert compare.differences(rows, {"sft": []}, exact=False) == ["sft: 1 rows expected, 0 found"]
