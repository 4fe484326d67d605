"""The head of this tree against that of a commit: CPU seconds of a step, in turns on the same problems.

    python -m benchmarks.head_against COMMIT [--tokens 1024] [--hidden 256] [--vocab 8192] [--rounds 9]

Each tree has a process of its own with one thread, which runs `benchmarks.head_peers.ours`, forward and
backward, when it is asked to: the two take turns, so that whatever else the machine does falls on both. Rows
go to results/head_against.csv: the median CPU seconds of each and the median of the rounds' ratios, with the
middle half of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles

from benchmarks.rows import append_rows, git, provenance
from benchmarks.trees import checkout

ROOT = Path(__file__).parents[1]
MODES = ("cross_entropy", "grpo", "grpo_full")
COLUMNS = (
    "date", "commit", "dirty", "cpu", "against", "mode", "tokens", "hidden", "vocab", "rounds",
    "cpu_s", "against_cpu_s", "ratio", "ratio_p25", "ratio_p75",
)  # fmt: skip

WORKER = """
import sys, time
tree, tokens, hidden, vocab = sys.argv[1], *map(int, sys.argv[2:])
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path[:0] = [tree, tree + "/kernels"]
import torch
torch.set_num_threads(1)
from benchmarks.head_peers import ours, random_problem
assert sys.modules["benchmarks"].__path__[0].startswith(tree)
x, weight, batch = random_problem(tokens, hidden, vocab, torch.float32, "cpu", 0)
for line in sys.stdin:
    head = ours(batch, line.strip())
    head(x, weight)
    start = time.process_time()
    head(x, weight)
    print(time.process_time() - start, flush=True)
"""


def main() -> int:
    """Measure, print and append a row for each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("commit")
    for name, default in (("tokens", 1024), ("hidden", 256), ("vocab", 8192), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    with checkout(given.commit) as other:
        sizes = [str(size) for size in (given.tokens, given.hidden, given.vocab)]
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(tree), *sizes],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree,
            )
            for tree in (ROOT, other)
        ]  # fmt: skip
        rows = [_row(given, mode, workers) for mode in MODES]
        for worker in workers:
            worker.communicate(timeout=60)
    append_rows("head_against", COLUMNS, rows)
    return 0


def _seconds(worker: subprocess.Popen[str], mode: str) -> float:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(f"{mode}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def _row(given: argparse.Namespace, mode: str, workers: list[subprocess.Popen[str]]) -> dict[str, object]:
    pairs = [[_seconds(worker, mode) for worker in workers] for _ in range(given.rounds)]
    ours, theirs = (median(values) for values in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    low, middle, high = quantiles(ratios, n=4)
    print(
        f"{mode}: {ours:.4f} CPU seconds against {theirs:.4f}, ratio {middle:.3f} ({low:.3f} .. {high:.3f})"
    )
    return {
        **provenance("benchmarks", "kernels", "phi4r"), "against": git("rev-parse", "--short", given.commit),
        "mode": mode, "tokens": given.tokens, "hidden": given.hidden, "vocab": given.vocab,
        "rounds": given.rounds, "cpu_s": f"{ours:.4f}", "against_cpu_s": f"{theirs:.4f}",
        "ratio": f"{middle:.3f}", "ratio_p25": f"{low:.3f}", "ratio_p75": f"{high:.3f}",
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
