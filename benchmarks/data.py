"""From records to packed rows: how fast documents are rendered and packed, and how full the rows get.

    python -m benchmarks.data [--num-documents 2000] [--path sft.jsonl] [--tokenizer FOLDER]

Needs phi4r installed. Ops: render (chat template and tokenisation of records; generated Countdown problems
with their traces unless --path is given) and pack (documents to rows of 32,768 tokens; lengths as of long
reasoning traces, log-normal with median 4,000). How full rows get is compared with what one would do instead:

    ffd          phi4r: first-fit decreasing     next_fit   in order, a new row whenever one does not fit
    one_per_row  no packing: every document padded to the row

efficiency: the share of row positions that hold a token. tokens_per_second counts tokens of documents.
Rows go to results/data.csv.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import suite
from benchmarks.native import ROW_LENGTH, sft_lengths

COLUMNS = [*suite.COLUMNS, "documents", "tokens_per_second", "efficiency"]
BATCH = 500


def next_fit(lengths: Sequence[int], row_length: int) -> int:
    """Rows needed when documents come in order and a row is closed as soon as one does not fit."""
    rows, used = 1, 0
    for n in lengths:
        if used + n > row_length:
            rows, used = rows + 1, 0
        used += n
    return rows


def measure_rendering(run: suite.Run, count: int, path: Path | None, tokenizer_path: str) -> None:
    """Times rendering, over batches of 500 records."""
    from phi4r.data.records import load_records
    from phi4r.data.render import render_example
    from phi4r.data.tokenizer import Tokenizer
    from phi4r.tasks import get_task

    tokenizer = Tokenizer.load(tokenizer_path)
    records: Sequence[Any] = (
        load_records(str(path))[0] if path else get_task("countdown").examples(0, 0, count)
    )
    records = records[:count]
    batches = [records[i : i + BATCH] for i in range(0, len(records), BATCH)]
    tokens = [sum(len(render_example(tokenizer, r, "none")[0]) for r in batch) for batch in batches]

    def render(i: int) -> list[Any]:
        return [render_example(tokenizer, record, "none") for record in batches[i % len(batches)]]

    what = _comparison("render", path.name if path else "countdown", round(np.mean(tokens)), ("render",))
    print(f"rendering {len(records):,} records of {sum(tokens) / len(records):,.0f} tokens")
    rows = suite.compare(run, what, {"render": render}, write=False)
    _finish(run, rows, round(np.mean([len(batch) for batch in batches])), {})


def measure_packing(run: suite.Run, count: int) -> None:
    """Times packing `count` documents, and compares how full rows get."""
    from phi4r.data.packing import Document, efficiency, pack

    lengths = sft_lengths(np.random.default_rng(0), count)
    tokens = int(lengths.sum())
    documents = [Document(np.zeros(n, np.int32), np.ones(n, np.bool_)) for n in lengths.tolist()]
    full = {
        "ffd": efficiency(pack(documents, ROW_LENGTH)),
        "next_fit": tokens / (next_fit(lengths.tolist(), ROW_LENGTH) * ROW_LENGTH),
        "one_per_row": tokens / (count * ROW_LENGTH),
    }
    print(f"packing {count:,} documents of {tokens / count:,.0f} tokens into rows of {ROW_LENGTH:,}")
    what = _comparison("pack", "lognormal", tokens, ("ffd",))
    rows = suite.compare(run, what, {"ffd": lambda i: pack(documents, ROW_LENGTH)}, write=False)
    # The others have an efficiency and no time: they do not fill rows, so theirs would compare nothing.
    blank = {name: "" for name in rows[0] if name.endswith("_ms") or name == "ratio"}
    rows += [{**rows[0], **blank, "impl": name} for name in ("next_fit", "one_per_row")]
    _finish(run, rows, count, full)


def _comparison(op: str, case: str, tokens: int, against: tuple[str, ...]) -> suite.Comparison:
    return suite.Comparison(
        op=op, mode="host", case=case, dtype="int32", shape=str(ROW_LENGTH) if op == "pack" else "",
        tokens=tokens, flops=0.0, bytes=0.0, against=against,
    )  # fmt: skip


def _finish(run: suite.Run, rows: list[dict[str, Any]], count: int, full: dict[str, float]) -> None:
    """Add this entry's own columns, print and write."""
    for row in rows:
        row["documents"] = count
        if row["p50_ms"]:
            row["tokens_per_second"] = f"{int(row['tokens']) / float(row['p50_ms']) * 1e3:.0f}"
        if row["impl"] in full:
            row["efficiency"] = f"{full[row['impl']]:.4f}"
        print(
            f"  {row['impl']:28} {row.get('tokens_per_second', '-'):>12} tokens/s  "
            f"rows full to {row.get('efficiency', '-')}"
        )
    run.write(rows)


def main() -> int:
    """Rendering, then packing."""
    parser = suite.parser(__doc__)
    parser.add_argument("--num-documents", type=int, default=2000)
    parser.add_argument("--path", type=Path, help="records to render (default: generated problems)")
    parser.add_argument("--tokenizer", default="", metavar="FOLDER", help="default: the built-in one")
    options = parser.parse_args()
    run = suite.start("data", options, COLUMNS)
    measure_rendering(run, options.num_documents, options.path, options.tokenizer)
    measure_packing(run, options.num_documents)
    suite.finish(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
