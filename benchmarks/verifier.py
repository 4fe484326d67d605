r"""The verifier on labelled answers, by category, and on long responses: rows in results/verifier.csv.

    python -m benchmarks.verifier [--workers 2] [--num-long 512] [--long-tokens 14000]

The labels are in verifier_cases.jsonl, one case a line: `category`, `gold`, `correct` (a person's label: is
it the same answer?), and either `answer`, put into a \boxed{} after a short think block, or the whole
`response`. Columns: date (UTC), commit, dirty, cpu, workers, category, cases, accuracy (outcome "correct"
exactly where the label says so), false_positives (called correct, and is not), false_negatives (correct, and
called wrong or not found), undecided (time-outs and errors), median_ms and max_ms of one case, seconds of all
of them in one batch. The category "long" is `--num-long` responses of `--long-tokens` tokens (4 characters
each), whose answers are taken from the cases in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import append_rows, provenance
from phi4r.verify.pool import VerifierPool
from phi4r.verify.strict import Verdict

CASES = Path(__file__).parent / "verifier_cases.jsonl"
COLUMNS = [
    "date", "commit", "dirty", "cpu", "workers", "category", "cases", "accuracy", "false_positives",
    "false_negatives", "undecided", "median_ms", "max_ms", "seconds",
]  # fmt: skip
CHARS_PER_TOKEN = 4


def read_cases() -> list[dict[str, Any]]:
    """The labelled cases, with `response` filled in."""
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    for case in cases:
        case.setdefault(
            "response", f"<think>Let me see.</think>\nThe answer is $\\boxed{{{case.get('answer')}}}$."
        )
    return cases


def long_response(response: str, num_tokens: int, seed: int) -> str:
    """`response` with a think block of about `num_tokens` tokens of arithmetic before it."""
    random = np.random.default_rng(seed)
    numbers = random.integers(2, 999, (num_tokens * CHARS_PER_TOKEN // 24, 3))
    lines = [f"so {a} + {b} is {c}, or $x_{{{a}}}$.\n" for a, b, c in numbers]
    return "<think>" + "".join(lines) + "</think>\n" + response.split("</think>")[-1]


def count(cases: Sequence[dict[str, Any]], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What was right and what was not."""
    pairs = [(case["correct"], verdict.outcome) for case, verdict in zip(cases, verdicts, strict=True)]
    return {
        "cases": len(cases),
        "accuracy": round(float(np.mean([label == (out == "correct") for label, out in pairs])), 4),
        "false_positives": sum(not label and out == "correct" for label, out in pairs),
        "false_negatives": sum(label and out in ("wrong", "no_answer") for label, out in pairs),
        "undecided": sum(out in ("timeout", "error") for _, out in pairs),
    }


def measure(pool: VerifierPool, cases: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[Verdict]]:
    """Counts and times of `cases`: in one batch, and one by one."""
    began = time.perf_counter()
    verdicts = pool.map([(case["gold"], case["response"]) for case in cases])
    seconds = time.perf_counter() - began
    single = []
    for case in cases[:64]:
        began = time.perf_counter()
        pool.map([(case["gold"], case["response"])])
        single.append(1e3 * (time.perf_counter() - began))
    times = {"median_ms": round(float(np.median(single)), 3), "max_ms": round(max(single), 1)}
    return {**count(cases, verdicts), **times, "seconds": round(seconds, 3)}, verdicts


def main() -> int:
    """Measure all categories, print what went wrong, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--num-long", type=int, default=512)
    parser.add_argument("--long-tokens", type=int, default=14_000)
    options = parser.parse_args()
    cases = read_cases()
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault(case["category"], []).append(case)
    groups["all"] = cases
    taken = [cases[i % len(cases)] for i in range(options.num_long)]
    groups["long"] = [
        {**case, "response": long_response(case["response"], options.long_tokens, i)}
        for i, case in enumerate(taken)
        if "answer" in case
    ]
    rows = []
    with VerifierPool(options.workers) as pool:
        pool.map([(r"x+\frac{1}{2}", r"<think>a</think>\boxed{\frac{2x+1}{2}}")] * options.workers)  # warm
        for category, members in groups.items():
            found, verdicts = measure(pool, members)
            rows.append({**provenance("phi4r"), "workers": options.workers, "category": category, **found})
            print(category, found)
            if category == "all":
                for case, verdict in zip(members, verdicts, strict=True):
                    if case["correct"] != (verdict.outcome == "correct"):
                        print("  ", verdict.outcome, verdict.method, case)
    print(f"written to {append_rows('verifier', COLUMNS, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
