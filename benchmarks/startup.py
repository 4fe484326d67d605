"""CPU seconds of commands that must answer at once, on a login node; rows in results/startup.csv.

    python -m benchmarks.startup [--repeats 5]

Columns: date (UTC), commit, dirty (the tree had changes), cpu, command, repeats, cpu_s (user and system, the
least of the repeats), wall_s (the least), at_most_s (what it should be on the machine of the rows).
Exit code 1 where a command takes more.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

from benchmarks.rows import append_rows, provenance

COLUMNS = ["date", "commit", "dirty", "cpu", "command", "repeats", "cpu_s", "wall_s", "at_most_s"]
COMMANDS = {"--help": 0.5, "plan phi4_sft --nodes 64": 1.0, "plan phi4_grpo --nodes 4 --simulate": 1.0}


def measure(words: list[str], repeats: int) -> tuple[float, float]:
    """CPU and clock seconds of `phi4r WORDS`, the least of `repeats`."""
    cpu, wall = [], []
    for _ in range(repeats):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-m", "phi4r", *words], stdout=subprocess.DEVNULL, check=True)
        wall.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(cpu), min(wall)


def main() -> int:
    """Measure every command, append the rows, print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    shared, rows = provenance("phi4r", "benchmarks"), []
    for command, at_most in COMMANDS.items():
        cpu, wall = measure(command.split(), options.repeats)
        print(f"phi4r {command}: {cpu:.2f} s of CPU ({at_most:g} at most), {wall:.2f} s")
        row = {
            "command": command,
            "repeats": options.repeats,
            "cpu_s": round(cpu, 3),
            "wall_s": round(wall, 3),
        }
        rows.append({**shared, **row, "at_most_s": at_most})
    print(f"written to {append_rows('startup', COLUMNS, rows)}")
    return int(any(row["cpu_s"] > row["at_most_s"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
