"""Golden values as text: a file a layout, a line a row, floats as Python prints them; their comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tests.golden.runner import Row

VALUES = Path(__file__).parent / "values"
Rows = dict[str, list[Row]]

CLOSE = 1e-9
"""Largest relative difference between processors of different kinds, where nothing is equal bit for bit."""
CLOSE_FP32 = 1e-4
FP32_CASES = ("sft_resumed", "score")
FP32_METRICS = ("logprob_gap", "max_logprob_gap", "effective_sample_share")
"""What is in fp32, or rounded to it once: a resumed run, log-probs of `phi4r score` and of the sampler."""

AUTOGRAD_CASES = ("grpo_two_updates", "gspo", "cispo")
SUMMED_METRICS = ("heldout_loss", "effective_sample_share")
CLOSE_ORDER = 1e-12
"""Where the order of operations has changed since 0.1.0. In these cases the policy moves within a step:
autograd multiplies weight, advantage and ratio, and the parts of k3's derivative, in another order than the
derivatives that were written out. These metrics: microbatches are summed one after another; torch's sum over
rows, whose order depends on the number of columns, did it for the other metrics and not for these."""
GONE = {("cispo", "dual_clipped")}
"""(case, metric): zeros in 0.1.0 that are no longer reported, as the objective has no such bound."""


def environment() -> dict[str, str]:
    """What decides the last bits on a CPU."""
    import torch

    return {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def write(layout: str, commit: str, rows: Rows) -> Path:
    """values/LAYOUT.jsonl: a header with the commit and the environment, then the rows of each case."""
    path = VALUES / f"{layout}.jsonl"
    VALUES.mkdir(exist_ok=True)
    lines: list[Any] = [{"commit": commit, **environment()}]
    lines += [{"case": case, **row} for case, found in rows.items() for row in found]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(layout: str) -> tuple[dict[str, str], Rows]:
    """(header, rows of each case) of values/LAYOUT.jsonl."""
    header, *lines = map(json.loads, (VALUES / f"{layout}.jsonl").read_text().splitlines())
    rows: Rows = {}
    for line in lines:
        rows.setdefault(line.pop("case"), []).append(line)
    return header, rows


def differences(expected: Rows, found: Rows, exact: bool) -> list[str]:
    """Each value that differs, in words: bit for bit where `exact`, else beyond the tolerances above. Columns
    that `expected` has not are left alone: a later commit may measure more."""
    result = []
    for case, rows in expected.items():
        if len(rows) != len(found[case]):
            result.append(f"{case}: {len(rows)} rows expected, {len(found[case])} found")
        for number, (row, other) in enumerate(zip(rows, found[case], strict=False), start=1):
            for name, value in row.items():
                if (case, name) in GONE:
                    continue
                if name not in other:
                    result.append(f"{case} row {number} {name}: expected {value!r}, missing")
                    continue
                loose = case in FP32_CASES or name in FP32_METRICS
                tolerance = 0.0 if exact else CLOSE_FP32 if loose else CLOSE
                if exact and (case in AUTOGRAD_CASES or name in SUMMED_METRICS):
                    tolerance = CLOSE_ORDER
                if not _same(value, other[name], tolerance):
                    result.append(f"{case} row {number} {name}: expected {value!r}, found {other[name]!r}")
    return result


def _same(expected: Any, found: Any, tolerance: float) -> bool:
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(
            _same(a, b, tolerance) for a, b in zip(expected, found, strict=True)
        )
    if isinstance(expected, float) and isinstance(found, int | float) and tolerance:
        return math.isclose(expected, found, rel_tol=tolerance, abs_tol=tolerance)
    return bool(expected == found) and isinstance(found, bool) == isinstance(expected, bool)
