"""What the entries share: their command line, one comparison, and its rows.

A comparison is one op at one size: implementations by name, each a `Call`, with the work they all do. An
implementation that is missing, fails, or is wrong falls out with one printed line; the others go on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import check, measure
from benchmarks.measure import Call, Timing
from benchmarks.rows import RESULTS, append_rows
from benchmarks.shapes import SHAPES, TOKENS

COLUMNS = [
    "date", "commit", "dirty", "cpu", "device", "driver", "cuda", "cudnn", "torch", "triton",
    "op", "mode", "case", "impl", "dtype", "shape", "tokens", "rounds", "p20_ms", "p50_ms", "p80_ms",
    "flops", "bytes", "tflops", "gb_s", "gemm_tflops", "copy_gb_s", "percent_of_ceiling",
    "peak_mib", "error", "against", "ratio", "percent_of_bound",
]  # fmt: skip
COLUMN_HELP = """
columns: rounds (samples); p20_ms, p50_ms, p80_ms; flops and bytes by the formulas of benchmarks/shapes.py;
tflops and gb_s at p50; gemm_tflops and copy_gb_s: the ceilings, measured in the same run; percent_of_ceiling:
the least time for these flops and bytes under both ceilings, over p50; peak_mib: memory beyond the inputs;
error: worst |x - float64| / |float64| over the outputs, on a problem that fits; ratio: this time over that of
`against`, median of the rounds; percent_of_bound: the time of the bare library calls over this one.
"""
INTERPRETED = "a Triton kernel: without a GPU only its interpreter runs, whose time says nothing"


class SkippedError(Exception):
    """Why an implementation is not compared here."""


def require_vllm(parser: argparse.ArgumentParser) -> None:
    """End with one line, and exit code 2, where there is no interpreter with vLLM."""
    from phi4r.core import optional
    from phi4r.core.errors import UserError

    try:
        optional.vllm_python()
    except UserError as error:
        parser.error(str(error))


@dataclass(frozen=True)
class Comparison:
    """One op at one size. `against`: what ratios are over (the first that is there); `bound`: which
    implementation is the bare library calls, if any; `errors`: measured beforehand, by implementation."""

    op: str
    mode: str
    case: str
    dtype: str
    shape: str
    tokens: int
    flops: float
    bytes: float
    against: tuple[str, ...]
    bound: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Run:
    """A benchmark's settings, and where its rows go."""

    name: str
    device: str
    shape: str
    seconds: float
    min_rounds: int
    only: tuple[str, ...]
    writes: bool
    results: Path
    columns: Sequence[str]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def wanted(self, name: str) -> bool:
        """Whether --only leaves this implementation in."""
        return not self.only or any(name.startswith(prefix) for prefix in self.only)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows at once, so that a later crash loses nothing; keeps them for a table."""
        self.rows += [dict(row) for row in rows]
        if self.writes and rows:
            append_rows(self.name, self.columns, rows, self.results)


def parser(description: str) -> argparse.ArgumentParser:
    """The options every entry has."""
    made = argparse.ArgumentParser(
        description=description + COLUMN_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--device", choices=("cuda", "cpu"), default=measure.default_device())
    made.add_argument("--shape", choices=tuple(SHAPES), help="default: phi4 on a GPU, tiny without")
    made.add_argument("--tokens", type=int, nargs="+", metavar="T", help="default: by --shape")
    made.add_argument(
        "--seconds", type=float, default=1.0, help="per comparison and implementation (default: %(default)s)"
    )
    made.add_argument("--min-rounds", type=int, default=5, help="at least (default: %(default)s)")
    made.add_argument("--only", nargs="+", default=[], metavar="IMPL", help="names that begin so")
    made.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    made.add_argument(
        "--no-check", action="store_true", help="do not run the op's tests first; print, never write"
    )
    return made


def start(name: str, options: argparse.Namespace, columns: Sequence[str] = ()) -> Run:
    """Fill in what depends on the device, and run the op's tests. Exit code 1 where they fail."""
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"benchmarks.{name}: --device cuda, and this torch sees no GPU")
    options.shape = options.shape or ("phi4" if options.device == "cuda" else "tiny")
    options.tokens = options.tokens or list(TOKENS[options.shape])
    if not options.no_check and (reason := check.failure(name, options.device)):
        sys.exit(f"benchmarks.{name}: {reason}; nothing is written (--no-check prints all the same)")
    run = Run(
        name=name,
        device=options.device,
        shape=options.shape,
        seconds=options.seconds,
        min_rounds=options.min_rounds,
        only=tuple(options.only),
        writes=not options.no_check,
        results=options.results,
        columns=columns or COLUMNS,
    )
    if options.device == "cpu":
        print("no GPU: small shapes, torch's own implementations only; Triton's interpreter is not timed")
    return run


def gather(run: Run, makers: Mapping[str, Callable[[], Any]], said: set[str] | None = None) -> dict[str, Any]:
    """What the makers of wanted implementations return, without those that are skipped or fail (each said
    once, if `said` remembers)."""
    found = {}
    for name, make in makers.items():
        if not run.wanted(name):
            continue
        try:
            found[name] = make()
        except SkippedError as reason:
            line = f"  {name}: skipped: {reason}"
        except Exception as error:  # noqa: BLE001  (a peer may fail in any way: that is a result)
            line = f"  {name}: fell out: {measure.one_line(error)}"
        else:
            continue
        if said is None or line not in said:
            print(line)
        if said is not None:
            said.add(line)
    return found


def compare(
    run: Run, what: Comparison, calls: Mapping[str, Call], *, write: bool = True
) -> list[dict[str, Any]]:
    """Time the calls side by side, print a line each, write (unless the caller will) and return their
    rows."""
    if not calls:
        return []
    limits = measure.ceilings(run.device) if what.flops or what.bytes else None
    timings, failed = measure.interleave(
        calls, run.seconds * len(calls), run.device, min_rounds=run.min_rounds
    )
    for name, reason in failed.items():
        print(f"  {name}: fell out: {reason}")
    against = next((name for name in what.against if name in timings), next(iter(timings), ""))
    shared = measure.describe(run.device)
    rows = []
    for name, timing in timings.items():
        row = shared | _numbers(what, timing, limits)
        peak = measure.peak_bytes(calls[name], run.device)
        row |= {
            "impl": name,
            "peak_mib": "" if peak is None else f"{peak / 2**20:.1f}",
            "error": f"{what.errors[name]:.3e}" if name in what.errors else "",
            "against": against,
            "ratio": f"{measure.ratio(timing, timings[against]):.4f}",
            "percent_of_bound": (
                f"{100 * measure.ratio(timings[what.bound], timing):.1f}" if what.bound in timings else ""
            ),
        }
        rows.append(row)
        print(f"  {name:28} {_line(row)}")
    sys.stdout.flush()
    if write:
        run.write(rows)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    """A row's numbers for the screen, without those it has not."""
    units = {"tflops": "TFLOP/s", "gb_s": "GB/s", "percent_of_ceiling": "% of ceiling", "peak_mib": "MiB"}
    parts = [f"{float(row['p50_ms']):10.3f} ms", f"x{row['ratio']}"]
    parts += [f"{row[name]:>8} {unit}" for name, unit in units.items() if row.get(name)]
    return "  ".join([*parts, f"error {row['error']}"] if row["error"] else parts)


def _numbers(what: Comparison, timing: Timing, limits: measure.Ceilings | None) -> dict[str, Any]:
    numbers = {
        "op": what.op,
        "mode": what.mode,
        "case": what.case,
        "dtype": what.dtype,
        "shape": what.shape,
        "tokens": what.tokens,
        "rounds": len(timing.times_ms),
        "p20_ms": f"{timing.quantile(0.2):.5f}",
        "p50_ms": f"{timing.p50:.5f}",
        "p80_ms": f"{timing.quantile(0.8):.5f}",
    }
    if what.flops:
        numbers |= {"flops": f"{what.flops:.6e}", "tflops": f"{what.flops / timing.p50 / 1e9:.4g}"}
    if what.bytes:
        numbers |= {"bytes": f"{what.bytes:.6e}", "gb_s": f"{what.bytes / timing.p50 / 1e6:.4g}"}
    if limits is not None:
        best = limits.best_ms(what.flops, what.bytes)
        numbers |= {
            "gemm_tflops": f"{limits.gemm_tflops:.4g}",
            "copy_gb_s": f"{limits.copy_gb_s:.4g}",
            "percent_of_ceiling": f"{100 * best / timing.p50:.1f}",
        }
    return numbers


def finish(run: Run) -> None:
    """Say where the rows went; exit code 1 where nothing could be measured."""
    if not run.rows:
        sys.exit(f"benchmarks.{run.name}: nothing was measured")
    if run.writes:
        print(f"{len(run.rows)} rows written to {run.results / run.name}.csv")
    else:
        print(f"{len(run.rows)} rows, none written (--no-check)")
