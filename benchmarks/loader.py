"""Times the loader on packed shards, and a build, and appends rows to results/loader.csv.

    python -m benchmarks.loader [--rows 4096] [--build 0] [--workers 1]

Columns: date (UTC), commit, dirty (the tree had changes), cpu, what, size (rows of 32,768 tokens read, or
documents built), workers, seconds, tokens_per_s, needed_per_s (50 times the tokens/s that `phi4r plan`'s
anchors give a node of 8 H100 for the paper's SFT), ratio = tokens_per_s / needed_per_s, peak_mib (largest
resident set of the process). One process on one core does all of it, for a whole node: on a node each
data-parallel rank makes its own share. "read": every array of every row, in shuffled order; "sequence": the
same through the prefetching thread; "dali": the same through `phi4r.data.dali` with `--workers` processes
beside this one, where DALI is installed; "cold": as "sequence", once, with the files dropped from the page
cache first, so that the disk is read. The other figures are the best of three, with the files in the page
cache.
`--build N` also builds shards from N short synthetic rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import append_rows, provenance
from phi4r.core import optional
from phi4r.core.io import atomic_write_json
from phi4r.data.dali import DaliLoader
from phi4r.data.loader import Loader, row_at
from phi4r.data.shards import FORMAT, INDEX, ShardRow, ShardRows, shard_paths, write_array
from phi4r.plan import scale

COLUMNS = [
    "date", "commit", "dirty", "cpu", "what", "size", "workers", "seconds", "tokens_per_s", "needed_per_s",
    "ratio", "peak_mib",
]  # fmt: skip
LENGTH = 32_768
ROWS_PER_SHARD = 512
HEADROOM = 50


def write_shards(folder: Path, num_rows: int) -> None:
    """Shards of random tokens: documents of 1,000 to 12,000 tokens, the last quarter of each is targets."""
    random = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    shards = []
    for number, first in enumerate(range(0, num_rows, ROWS_PER_SHARD)):
        count = min(ROWS_PER_SHARD, num_rows - first)
        tokens = random.integers(0, 100_352, (count, LENGTH), dtype=np.int32)
        tokens[:, ::4] |= np.int32(-(2**31))
        bounds: list[int] = []
        rows = np.zeros((count, 3), np.int64)
        for row in range(count):
            cuts = np.cumsum(random.integers(1_000, 12_000, 40))
            mine = [0, *cuts[cuts < LENGTH].tolist(), LENGTH]
            rows[row] = len(bounds), len(mine), LENGTH
            bounds += mine
        paths = shard_paths(folder / "train", number)
        write_array(paths["tokens"], tokens)
        write_array(paths["bounds"], np.array(bounds, np.int32))
        write_array(paths["rows"], rows)
        shards.append(count)
    index = {"format": FORMAT, "seq_length": LENGTH, "pad_id": 0, "shards": {"train": shards, "heldout": []}}
    atomic_write_json(folder / INDEX, index)


def peak_mib() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read(rows: ShardRows) -> float:
    """Seconds to read every row once in shuffled order."""
    began = time.perf_counter()
    for position in range(len(rows)):
        row = rows[row_at(position, len(rows), 0, 0)]
        assert isinstance(row, ShardRow)
        row.load()
    return time.perf_counter() - began


def through_loader(rows: ShardRows, kind: Callable[..., Any] = Loader, per_step: int = 32) -> float:
    """Seconds to take every row once from a loader, its start left out."""
    steps = len(rows) // per_step
    with kind(rows, seed=0, stream=0, rows_per_step=per_step, first_step=0, last_step=steps) as loader:
        began = time.perf_counter()
        for _ in range(steps):
            loader.next()
        seconds = time.perf_counter() - began
    return seconds * len(rows) / (steps * per_step)


def drop_pages(folder: Path) -> None:
    """Asks the kernel to forget the cached pages of the files under `folder`."""
    for path in folder.rglob("*.npy"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold(rows: ShardRows) -> float:
    """`through_loader` from the disk."""
    drop_pages(rows.folder)
    return through_loader(ShardRows(rows.folder))


def write_corpus(path: Path, count: int) -> None:
    """`count` short problems with traces of 1 to 10 steps."""
    random = np.random.default_rng(0)
    steps = random.integers(1, 11, count)
    with open(path, "w", encoding="utf-8") as file:
        for index in range(count):
            trace = "1+2=3;" * int(steps[index])
            row = {"id": f"p{index}", "problem": f"{index}+1?", "answer": str(index + 1), "trace": trace}
            file.write(json.dumps(row | {"source": ("math", "code", "web")[index % 3]}) + "\n")


def build(count: int, workers: int) -> dict[str, Any]:
    """Build shards from `count` rows in a process of its own; its time, tokens and memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "in.jsonl", count)
        command = [sys.executable, "-m", "phi4r", "data", "build", "tiny", "--out", str(folder / "out")]
        command += ["--workers", str(workers), "--data.path", str(folder / "in.jsonl")]
        command += ["--data.seq_length", "512"]
        began = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
        statistics = json.loads((folder / "out" / INDEX).read_text())["statistics"]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    tokens = statistics["train"]["tokens"]
    return {
        "what": "build", "size": count, "workers": workers, "seconds": f"{seconds:.1f}",
        "tokens_per_s": f"{tokens / seconds:.0f}", "needed_per_s": "", "ratio": "", "peak_mib": f"{peak:.0f}",
    }  # fmt: skip


def main() -> int:
    """Runs, prints and appends the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--build", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    shared = provenance("phi4r/data", "benchmarks/loader.py")
    planned = scale.best("sft", "phi4_sft", "h100", 4)
    assert planned is not None
    needed = HEADROOM * 8 * planned[0].tokens_per_gpu_s
    found = []
    if options.rows:
        with tempfile.TemporaryDirectory() as name:
            write_shards(Path(name) / "shards", options.rows)
            ways: list[tuple[str, Callable[[ShardRows], float], int]] = [
                ("read", read, 3), ("sequence", through_loader, 3), ("cold", cold, 1),
            ]  # fmt: skip
            if optional.available("nvidia.dali"):
                kind = partial(DaliLoader, workers=options.workers)
                ways.insert(2, ("dali", partial(through_loader, kind=kind), 3))
            for what, function, times in ways:
                rows = ShardRows(Path(name) / "shards")
                seconds = min(function(rows) for _ in range(times))
                rate = len(rows) * LENGTH / seconds
                found.append(
                    {
                        "what": what, "size": len(rows),
                        "workers": options.workers if what == "dali" else 1, "seconds": f"{seconds:.3f}",
                        "tokens_per_s": f"{rate:.0f}", "needed_per_s": f"{needed:.0f}",
                        "ratio": f"{rate / needed:.2f}", "peak_mib": f"{peak_mib():.0f}",
                    }
                )  # fmt: skip
    if options.build:
        found.append(build(options.build, options.workers))
    for row in found:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    append_rows("loader", COLUMNS, [shared | row for row in found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
