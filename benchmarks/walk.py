"""How much of phi4r a training step passes through: files, functions and lines, seen by tracing one step.

python -m benchmarks.walk sft|grpo                    this tree; appends a row to benchmarks/results/walk.csv
python -m benchmarks.walk grpo --commit 8169e13       another commit, run by what is installed here
python -m benchmarks.walk grpo --list                 prints the files and functions, appends nothing

A step is what runs from one `begin_step` of the training loop to the next, in all threads, on one rank: the
second step of the tiny recipe on a small model that SFT has taught the format (tests/golden), so that rewards
differ and the optimizer steps. `files`: Python files of phi4r and phi4r_kernels of which the step enters a
function. `functions`: those functions, without lambdas and comprehensions. `lines`: all lines of these files:
what one has open while following a step. `function_lines`: the lines of these functions alone.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

STEP = 2
TIMEOUT_S = 300
COLUMNS = ["date", "commit", "dirty", "cpu", "stage", "files", "functions", "lines", "function_lines"]


def main() -> None:
    """Walk through a step in a process of its own, print and append the row."""
    from benchmarks.rows import append_rows, provenance
    from benchmarks.trees import ROOT, checkout

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stage", choices=("sft", "grpo"))
    parser.add_argument("--commit", default="", help="another commit than the one checked out")
    parser.add_argument("--list", action="store_true", help="print the files and functions; append nothing")
    arguments = parser.parse_args()
    row = provenance("phi4r", "kernels")
    if arguments.commit:
        row |= {"commit": arguments.commit, "dirty": 0}
        with checkout(arguments.commit) as tree:
            found = walk(arguments.stage, tree)
    else:
        found = walk(arguments.stage, ROOT)
    if arguments.list:
        for name, functions in found.items():
            print(f"{name} ({functions['lines']} lines)")
            for function, lines in functions["functions"].items():
                print(f"    {function} ({lines})")
    row |= {"stage": arguments.stage, **totals(found)}
    print(", ".join(f"{key} {row[key]:,}" for key in COLUMNS[5:]))
    if not arguments.list:
        print(append_rows("walk", COLUMNS, [row]))


def totals(found: dict[str, Any]) -> dict[str, int]:
    """The row's numbers from what `walk` found."""
    functions = [lines for entry in found.values() for lines in entry["functions"].values()]
    return {
        "files": len(found),
        "functions": len(functions),
        "lines": sum(entry["lines"] for entry in found.values()),
        "function_lines": sum(functions),
    }


def walk(stage: str, tree: Path) -> dict[str, Any]:
    """File -> {"lines": n, "functions": {qualified name: lines}} of a step of `stage` by `tree`'s phi4r."""
    from benchmarks.trees import environment
    from tests.golden.runner import CASES, RL, SFT

    settings = SFT if stage == "sft" else {**RL, **CASES["grpo"].settings}
    settings = {**settings, "train.num_steps": STEP + 1}
    with tempfile.TemporaryDirectory(prefix="walk-") as name:
        folder = Path(name)
        given = {"stage": "sft" if stage == "sft" else "rl", "settings": settings, "tree": str(tree)}
        (folder / "given.json").write_text(json.dumps(given))
        command = [sys.executable, __file__, "--inside", name]
        variables = environment(tree, folder)
        ended = subprocess.run(
            command, cwd=tree, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        if ended.returncode:
            raise SystemExit(f"phi4r of {tree} ended with code {ended.returncode}:\n{ended.stderr[-3000:]}")
        found: dict[str, Any] = json.loads((folder / "found.json").read_text())
        return found


# --- in the process that trains


class Tracer:
    """Collects the code objects that run in one step."""

    def __init__(self, tree: Path) -> None:
        self.roots = (str(tree / "phi4r") + os.sep, str(tree / "kernels" / "phi4r_kernels") + os.sep)
        self.step = 0
        self.codes: set[CodeType] = set()

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """The profile function of every thread."""
        if event != "call":
            return
        code = frame.f_code
        if code.co_name == "begin_step":
            self.step += 1
        if self.step == STEP and code.co_filename.startswith(self.roots):
            self.codes.add(code)

    def found(self) -> dict[str, Any]:
        """See `walk`."""
        result: dict[str, Any] = {}
        for code in sorted(self.codes, key=lambda code: (code.co_filename, code.co_firstlineno)):
            path = Path(code.co_filename)
            name = str(path.relative_to(Path(self.roots[0]).parents[0]))
            if code.co_name.startswith("<"):
                continue
            lines = [line for _, _, line in code.co_lines() if line is not None]
            entry = result.setdefault(name, {"lines": len(path.read_text().splitlines()), "functions": {}})
            entry["functions"][code.co_qualname] = max(lines) - code.co_firstlineno + 1
        return result


def inside(folder: Path) -> None:
    """Train in this process, traced, and write found.json."""
    # `tests` is the package of the tree; how older trees spell their settings, only this one's runner knows.
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "golden"))
    from runner import options

    given = json.loads((folder / "given.json").read_text())
    words = ["phi4r", given["stage"], "tiny", "--run-dir", str(folder / "run")]
    words += options(given["stage"], given["settings"])
    tracer = Tracer(Path(given["tree"]))
    threading.setprofile(tracer)
    sys.setprofile(tracer)
    sys.argv = words
    try:
        runpy.run_module("phi4r", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert tracer.step == STEP + 1, f"begin_step ran {tracer.step} times and not {STEP + 1}"
    (folder / "found.json").write_text(json.dumps(tracer.found()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]))
    else:
        main()
