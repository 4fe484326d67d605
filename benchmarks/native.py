"""Times the C++ host code against its Python reference and appends a row per op and size to
results/native.csv.

    python -m benchmarks.native [--repeats 7]

Columns: date (UTC), commit, dirty (the tree had changes), cpu, op, size, python_s, native_s (medians of
interleaved runs), ratio = python_s / native_s. Inputs are random, drawn anew for every repeat; both answers
are compared before a time counts, and nothing is written if they differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.rows import append_rows, provenance
from phi4r.data import native

COLUMNS = ["date", "commit", "dirty", "cpu", "op", "size", "python_s", "native_s", "ratio"]
ROW_LENGTH = 32_768


def sft_lengths(random: np.random.Generator, size: int) -> np.ndarray:
    """Document lengths like those of long reasoning traces: log-normal, median 4,000 tokens, cut at one
    row."""
    return np.clip(random.lognormal(np.log(4_000), 0.9, size), 1, ROW_LENGTH).astype(np.int64)


def response(random: np.random.Generator, size: int) -> np.ndarray:
    """A response of `size` tokens over Phi-4's vocabulary, the last third of it a loop of 40 tokens."""
    tokens = random.integers(0, 100_352, size)
    tokens[-(size // 3) :] = np.resize(random.integers(0, 100_352, 40), size // 3)
    return tokens.astype(np.int32)


def cases(
    module: Any,
) -> list[tuple[str, int, Callable[..., np.ndarray], Callable[..., Any], Callable[..., Any]]]:
    """(op, size, input maker, Python function, C++ function)."""
    found: list[tuple[str, int, Callable[..., np.ndarray], Callable[..., Any], Callable[..., Any]]] = []
    for size in (512, 25_600, 200_000):
        found.append(
            (
                "pack_ffd",
                size,
                sft_lengths,
                lambda x: native.pack_ffd_python(x, ROW_LENGTH).tolist(),
                lambda x: module.pack_ffd(x, ROW_LENGTH).tolist(),
            )
        )
    for size in (64, 4_096, 31_744):
        found.append(
            (
                "ngram_repetition",
                size,
                response,
                lambda x: native.ngram_repetition_python(x, 5, 5),
                lambda x: tuple(module.ngram_repetition(x, 5, 5)),
            )
        )
    return found


def seconds(function: Callable[[Any], Any], argument: Any) -> tuple[float, Any]:
    """Time of one call, repeated until a hundredth of a second has passed."""
    calls, start = 0, time.perf_counter()
    while True:
        result = function(argument)
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed > 0.01:
            return elapsed / calls, result


def main() -> int:
    """Runs all cases, prints a table and appends the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    if native.backend() != "native":
        print(f"nothing to compare: {native.reason()}", file=sys.stderr)
        return 1
    from phi4r_kernels import _native

    shared = provenance("kernels", "phi4r/data", "benchmarks/native.py")
    random = np.random.default_rng()
    rows = []
    for op, size, make, python, cpp in cases(_native):
        times: list[list[float]] = [[], []]
        for _ in range(repeats):
            argument = make(random, size)
            (slow, expected), (fast, answer) = seconds(python, argument), seconds(cpp, argument)
            if answer != expected:
                print(f"{op}, size {size}: C++ and Python disagree; nothing is written", file=sys.stderr)
                return 1
            times[0].append(slow)
            times[1].append(fast)
        slow, fast = map(statistics.median, times)
        row = {"op": op, "size": size, "python_s": f"{slow:.3e}", "native_s": f"{fast:.3e}"}
        rows.append(shared | row | {"ratio": f"{slow / fast:.1f}"})
        print(f"{op:18} {size:>8,}  python {slow:.3e} s  native {fast:.3e} s  {slow / fast:6.1f}x")
    append_rows("native", COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
