"""What a build found: lengths, packing, tokens per cluster; and a picture of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from phi4r.data.build_plan import Plan

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
NUM_BINS = 40


def statistics(plan: Plan, seq_length: int) -> dict[str, Any]:
    """Counts of rows, documents and tokens. Documents and tokens of "train" count every copy; `efficiency`
    is the share of row positions that hold a token."""
    table, found = plan.table, {}
    for part, (documents, starts) in plan.rows.items():
        lengths = table["length"][documents]
        rows = len(starts) - 1
        found[part] = {
            "documents": len(documents),
            "rows": rows,
            "tokens": int(lengths.sum()),
            "targets": int(table["targets"][documents].sum()),
            "efficiency": float(lengths.sum() / (rows * seq_length)) if rows else 0.0,
        }
    left_out = table["length"] == 0
    documents = plan.rows["train"][0]
    cluster, lengths = table["cluster"][documents], table["length"][documents].astype(np.int64)
    tokens = np.bincount(cluster, weights=lengths, minlength=len(plan.clusters))
    seen = np.bincount(cluster, minlength=len(plan.clusters))
    unique = np.bincount(documents, minlength=len(table)) > 0
    once = np.bincount(table["cluster"][unique], minlength=len(plan.clusters))
    kept = table["length"][~left_out]
    return {
        "rows_read": plan.rows_read,
        "rejected": plan.rejected,
        "overlap": plan.overlap,
        "left_out": int(left_out.sum()),
        "truncated": int((~left_out & (table["length"] < table["rendered"])).sum()),
        **found,
        "length_quantiles": {str(q): int(np.quantile(kept, q)) for q in QUANTILES} if len(kept) else {},
        "clusters": {
            name: {"documents": int(once[i]), "seen": int(seen[i]), "tokens": int(tokens[i])}
            for i, name in sorted(enumerate(plan.clusters), key=lambda pair: pair[1])
        },
    }


def summary(found: dict[str, Any]) -> list[str]:
    """For the console."""
    train = found["train"]
    lines = [
        f"data build: {found['rows_read']:,} rows read, {found['rejected']:,} rejected, {found['left_out']:,}"
        f" left out by length, {found['overlap']:,} that ask a held-out question",
        f"data build: {train['documents']:,} documents, {train['tokens']:,} tokens ({train['targets']:,}"
        f" targets) in {train['rows']:,} rows, {train['efficiency']:.1%} full;"
        f" {found['heldout']['documents']:,} held out",
    ]
    for name, cluster in found["clusters"].items():
        share = cluster["tokens"] / max(1, train["tokens"])
        lines.append(
            f"data build:   {name}: {cluster['documents']:,} documents seen {cluster['seen']:,} times,"
            f" {cluster['tokens']:,} tokens ({share:.1%})"
        )
    return lines


def picture(plan: Plan, seq_length: int, path: Path) -> None:
    """Draw document lengths (by tokens) and tokens per cluster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    documents = plan.rows["train"][0]
    lengths = plan.table["length"][documents].astype(np.int64)
    tokens = np.bincount(plan.table["cluster"][documents], weights=lengths, minlength=len(plan.clusters))
    order = np.argsort(tokens)[-20:]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    edges = np.geomspace(1, seq_length, NUM_BINS)
    left.hist(lengths, bins=edges, weights=lengths, color="#4477aa")
    left.set_xscale("log")
    left.set(xlabel="tokens of a document", ylabel="tokens", title="Tokens by length of their document")
    right.barh([plan.clusters[i] for i in order], tokens[order], color="#4477aa")
    right.set(xlabel="tokens, copies included", title="Tokens by cluster")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
