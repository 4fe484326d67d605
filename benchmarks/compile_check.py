"""Compiles every kernel as it ships, for GPUs that need not be there, and fails on what would make it slow.

    python -m benchmarks.compile_check [--arch 90 100 80] [--write] [--workers 2] [--only TEXT]

For each variant: registers, spills, shared memory, MMA and TMA instructions. `phi4r_kernels.aot.problems`
says what is an error: spills, more shared memory or registers than the device has, a dot without MMA, on
Hopper without wgmma, serialized wgmma. A variant that needs over an eighth more registers than its last row
in results/compile_check.csv is a warning, and so are products by mma.sync beside wgmma. Exits 1 on an error.
What compiled is remembered by its source in --cache, so that a second run takes seconds. --write appends a
row per variant, only where there is no error.

Columns: date (UTC), commit, dirty, cpu, triton, arch (compute capability), variant, registers (per thread at
entry), num_warps, spill_bytes, shared_bytes, scratch_bytes (global memory per program), mma (mma.sync),
wgmma, tcgen05, tma, tma_reduce, atomics (instructions in the PTX), seconds (of compiling).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from phi4r_kernels.aot import Report, Variant, problems, variants_of

from benchmarks.rows import RESULTS, append_rows, provenance, read_rows

MODULES = (
    "phi4r_kernels.attention_tiles",
    "phi4r_kernels.attention_hopper",
    "phi4r_kernels.linear_loss.variants",
)
MEASURED = (
    "registers", "num_warps", "spill_bytes", "shared_bytes", "scratch_bytes", "mma", "wgmma", "tcgen05",
    "tma", "tma_reduce", "atomics", "seconds",
)  # fmt: skip
COLUMNS = ["date", "commit", "dirty", "cpu", "triton", "arch", "variant", *MEASURED]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "phi4r" / "compile_check"
DEADLINE_S = 900
"""For one variant; the compiler takes seconds, a loaded machine minutes."""
MORE_REGISTERS = 1.125
"""Growth over the last row that is worth a warning."""


class Worker:
    """A child process that compiles variants by name; see `phi4r_kernels.aot.main`."""

    def __init__(self, modules: Sequence[str], cache: Path, scratch: Path) -> None:
        variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        variables["TRITON_CACHE_DIR"] = str(scratch)
        variables["PYTHONPATH"] = os.pathsep.join(path or "." for path in sys.path)
        self.child = subprocess.Popen(
            [sys.executable, "-m", "phi4r_kernels.aot", "--cache", str(cache), *modules],
            env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.last_words: list[str] = []
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.child.stderr
        for line in self.child.stderr:
            self.last_words = [*self.last_words[-3:], line.strip()]

    def compile(self, variant: Variant) -> Report:
        """Its report; if the process dies or the deadline passes, one whose error says so."""
        assert self.child.stdin
        assert self.child.stdout
        watchdog = threading.Timer(DEADLINE_S, self.child.kill)
        watchdog.start()
        try:
            self.child.stdin.write(variant.name + "\n")
            self.child.stdin.flush()
            answer = self.child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        watchdog.cancel()
        if answer:
            return Report(**json.loads(answer))
        status = self.child.wait()
        self.listener.join()
        words = " | ".join(self.last_words)[-300:]
        return Report(variant.name, variant.arch, error=f"the compiler died (status {status}): {words}")

    def close(self) -> None:
        assert self.child.stdin
        self.child.stdin.close()
        self.child.wait()


def compile_all(
    variants: Iterable[Variant], modules: Sequence[str], num_workers: int, cache: Path
) -> list[Report]:
    """The report of every variant, in order, from `num_workers` processes; a dead one is replaced."""
    todo: queue.SimpleQueue[tuple[int, Variant]] = queue.SimpleQueue()
    for item in enumerate(variants):
        todo.put(item)
    reports: dict[int, Report] = {}

    def work(scratch: Path) -> None:
        worker = None
        while True:
            try:
                index, variant = todo.get_nowait()
            except queue.Empty:
                break
            worker = worker or Worker(modules, cache, scratch)
            reports[index] = worker.compile(variant)
            if worker.child.poll() is not None:
                worker = None
        if worker:
            worker.close()

    with tempfile.TemporaryDirectory() as scratch:
        threads = [threading.Thread(target=work, args=(Path(scratch),)) for _ in range(num_workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [reports[index] for index in sorted(reports)]


def last_rows(path: Path, triton: str) -> dict[str, dict[str, str]]:
    """The newest row of every variant for this version of triton; only variants of the newest commit, since
    what an older one lists may have been dropped on purpose."""
    rows = [row for row in read_rows(path) if row["triton"] == triton] if path.exists() else []
    return {row["variant"]: row for row in rows if row["commit"] == rows[-1]["commit"]}


def warnings(reports: Sequence[Report], last: dict[str, dict[str, str]]) -> list[str]:
    """What needs many more registers than in its last row, and products that went to the slower MMA."""
    found = []
    for report in reports:
        if report.wgmma and report.mma:
            found.append(f"{report.name}: {report.mma} mma.sync beside {report.wgmma} wgmma")
        before = int(last[report.name]["registers"]) if report.name in last else report.registers
        if report.registers > MORE_REGISTERS * before:
            found.append(f"{report.name}: {report.registers} registers, {before} in its last row")
    return found


def show(reports: Sequence[Report]) -> None:
    """The table, on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    headers = ("variant", "regs", "warps", "spill", "shared", "mma", "wgmma", "tcgen05", "tma", "atomics", "")
    for header in headers:
        table.add_column(
            header, justify="left" if header in ("variant", "") else "right", no_wrap=bool(header)
        )
    for r in reports:
        found = problems(r)
        numbers = (
            r.registers, r.num_warps, r.spill_bytes, r.shared_bytes, r.mma, r.wgmma, r.tcgen05,
            r.tma + r.tma_reduce, r.atomics,
        )  # fmt: skip
        table.add_row(
            r.name,
            *map(str, numbers),
            "; ".join(found) or "ok",
            style="red" if found else "",
            end_section=False,
        )
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table, markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, prints, and returns 1 if a shipped kernel is not as it must be."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_check", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="compute capabilities (90)")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name contains TEXT")
    parser.add_argument("--modules", nargs="+", default=list(MODULES), help="where variants() are")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one per core)")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"({CACHE})")
    parser.add_argument("--write", action="store_true", help="append rows to results/compile_check.csv")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        print("compile_check: triton is not installed: make install EXTRAS=triton", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET") == "1":
        print(
            "compile_check: TRITON_INTERPRET=1 is set; an interpreted kernel cannot be compiled",
            file=sys.stderr,
        )
        return 2
    import triton

    known = [v for v in variants_of(options.modules) if v.arch in options.arch]
    chosen = [v for v in known if options.only in v.name]
    if not chosen:
        print(f"compile_check: no variant for {options.arch} contains {options.only!r}", file=sys.stderr)
        return 2
    reports = compile_all(chosen, options.modules, min(options.workers, len(chosen)), options.cache)
    show(reports)
    errors = [f"{report.name}: {problem}" for report in reports for problem in problems(report)]
    last = last_rows(RESULTS / "compile_check.csv", triton.__version__)
    for warning in warnings(reports, last):
        print(f"warning: {warning}")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    print(f"triton {triton.__version__}: {len(reports)} variants, {len(errors)} errors")
    if options.write and not errors:
        shared = provenance("kernels", "benchmarks/compile_check.py") | {"triton": triton.__version__}
        rows = [
            shared | {"arch": r.arch, "variant": r.name} | {column: getattr(r, column) for column in MEASURED}
            for r in reports
        ]
        print(f"wrote {len(rows)} rows to {append_rows('compile_check', COLUMNS, rows)}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
