"""What a GPU and its links can do: measured rows of benchmarks/results where there are any, published anchors
otherwise. Every figure carries its source, and the plan prints it.
"""

from __future__ import annotations

import csv
import statistics
from dataclasses import dataclass
from pathlib import Path

from phi4r.core.errors import UserError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
OURS = ("phi4r", "ours")
"""How the names of our implementations begin in the benchmark rows."""


@dataclass(frozen=True)
class Figure:
    """A number and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class Gpu:
    """A GPU type. memory_gib: what torch reports; peak_tflops: dense bf16 of the data sheet, behind every
    MFU."""

    name: str
    memory_gib: float
    peak_tflops: float
    copy_gb_s: float


GPUS = {
    "h100": Gpu("H100", 79.1, 989.0, 3000.0),
    "h200": Gpu("H200", 139.8, 989.0, 4300.0),
}

# TFLOP/s. Products: cuBLAS bf16, 8192^3 on random data, H200. Attention: FlashAttention-2, packed, head dim
# 128, H100: the class of kernel that runs everywhere. Better ones show in the rows once they are measured.
ANCHORS = {"gemm": 769.0, "attention_forward": 344.0, "attention_backward": 263.0}
PRODUCT_EFFICIENCY = 0.85
"""Products of a layer against the best square product (estimate)."""
NVLINK_GB_S = 360.0
"""What a collective moves per GPU inside a node (estimate: 80% of 450 GB/s)."""
NETWORK_GB_S = 40.0
"""What a collective moves per GPU between nodes (estimate: 80% of one 400 Gbit/s port per GPU)."""


@dataclass(frozen=True)
class Rates:
    """Speeds that the step time is made of. TFLOP/s and GB/s."""

    gpu: Gpu
    gemm: Figure
    attention_forward: Figure
    attention_backward: Figure
    copy: Figure

    def lines(self) -> list[str]:
        """One line per figure: its value, unit and source."""
        shown = [
            ("matrix products", self.gemm, "TFLOP/s"),
            ("attention forward", self.attention_forward, "TFLOP/s"),
            ("attention backward", self.attention_backward, "TFLOP/s"),
            ("memory", self.copy, "GB/s"),
        ]
        lines = [f"{what:<18} {figure.value:6,.0f} {unit:<8} {figure.source}" for what, figure, unit in shown]
        lines.append(f"{'inside a node':<18} {NVLINK_GB_S:6,.0f} {'GB/s':<8} estimate")
        return [*lines, f"{'between nodes':<18} {NETWORK_GB_S:6,.0f} {'GB/s':<8} estimate"]


def find_gpu(name: str) -> Gpu:
    """The GPU type called `name`; UserError for one that is not known."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu: expected one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[name.lower()]


def _rows(folder: Path, gpu: Gpu) -> list[dict[str, str]]:
    found = []
    for path in sorted(folder.glob("*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            found += [row | {"file": path.name} for row in csv.DictReader(file)]
    return [
        row
        for row in found
        if gpu.name in (row.get("device") or "") and row.get("dtype") in ("bf16", "bfloat16")
    ]


def _median(rows: list[dict[str, str]], column: str, otherwise: Figure) -> Figure:
    values = [float(row[column]) for row in rows if row.get(column)]
    if not values:
        return otherwise
    files = ", ".join(sorted({row["file"] for row in rows if row.get(column)}))
    return Figure(statistics.median(values), f"measured ({files}, {len(values)} rows)")


def load_rates(gpu: Gpu, results: Path | None = RESULTS) -> Rates:
    """Rates for `gpu`: medians of the rows of `results` measured on it, else the anchors (None: those
    only)."""
    rows = _rows(results, gpu) if results else []

    def attention(mode: str) -> Figure:
        ours = [
            row
            for row in rows
            if row.get("op") == "attention"
            and row.get("mode") == mode
            and (row.get("impl") or "").startswith(OURS)
            and int(row.get("tokens") or 0) >= 8192
        ]
        return _median(ours, "tflops", Figure(ANCHORS[f"attention_{mode}"], "anchor (FlashAttention-2)"))

    return Rates(
        gpu=gpu,
        gemm=_median(rows, "gemm_tflops", Figure(ANCHORS["gemm"], "anchor (cuBLAS on H200)")),
        attention_forward=attention("forward"),
        attention_backward=attention("backward"),
        copy=_median(rows, "copy_gb_s", Figure(gpu.copy_gb_s, "anchor")),
    )
