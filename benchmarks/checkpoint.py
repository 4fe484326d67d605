"""How fast checkpoints are written, checked and read, and how long training stands still for one.

    python -m benchmarks.checkpoint [--hidden 512] [--layers 8] [--repeats 5] [--folder DIR]

A model of the given size with its distributed optimizer on one rank, in fp32 (16 bytes a parameter on disk:
the weights, and Adam's fp32 copy and two moments). Each repeat saves once at once and twice beside training
steps, then checks and loads. The columns are medians over the repeats:

    save_gb_s        bytes of a checkpoint / seconds from `begin` to visible, written at once
    stall_s          seconds that training stands still for one written beside it (copying, then the renaming)
    write_s          seconds its thread took meanwhile
    step_s, step_during_s   a training step without and with a checkpoint being written
    check_gb_s       reading and comparing CRC-32 of every byte
    load_gb_s        loading model and optimizer, the check included
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.rows import append_rows, provenance
from phi4r.configs.sections import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from phi4r.data.packing import Document, PackedRow, pack
from phi4r.models.names import load_weights, random_weights
from phi4r.parallel.layout import distributed_session, init_layout
from phi4r.train.checkpoint import load_checkpoint
from phi4r.train.engine import Engine, sft_loss
from phi4r.train.folders import damage
from phi4r.train.save import CheckpointSaver

COLUMNS = [
    "date", "commit", "dirty", "cpu", "parameters", "repeats", "gb", "save_gb_s", "stall_s", "write_s",
    "step_s", "step_during_s", "check_gb_s", "load_gb_s",
]  # fmt: skip
LENGTH = 256


def make_engine(hidden: int, layers: int) -> Engine:
    """An engine with random weights."""
    model = ModelConfig(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=4 * hidden, num_attention_heads=hidden // 64,
        num_query_groups=max(1, hidden // 128), head_dim=64, vocab_size=1024, max_position_embeddings=LENGTH,
    )  # fmt: skip
    parallel = ParallelConfig()
    layout = init_layout(parallel)
    engine = Engine(model, parallel, layout, TrainConfig(), OptimizerConfig())
    load_weights(engine.models, model, random_weights(model, 1), 0, 1)
    engine.sync_optimizer()
    return engine


def batch() -> list[PackedRow]:
    """One row."""
    tokens = np.random.default_rng().integers(0, 1024, LENGTH).astype(np.int32)
    return pack([Document(tokens, np.ones(LENGTH, dtype=bool))], LENGTH)


def measure(engine: Engine, folder: Path) -> dict[str, float]:
    """One repeat."""

    def step() -> float:
        began = time.perf_counter()
        engine.train_step(batch(), sft_loss, 1e-4)
        return time.perf_counter() - began

    found: dict[str, float] = {}
    sync = CheckpointSaver(folder / "sync", engine.chunks, engine.optimizer, model_cfg=engine.model_config)
    began = time.perf_counter()
    sync.begin(1, {})
    saved = sync.wait()
    assert saved is not None
    seconds = time.perf_counter() - began
    gigabytes = sum(path.stat().st_size for path in saved.folder.rglob("*") if path.is_file()) / 1e9
    found |= {"gb": gigabytes, "save_gb_s": gigabytes / seconds}

    found["step_s"] = statistics.median(step() for _ in range(5))
    beside = CheckpointSaver(
        folder / "beside", engine.chunks, engine.optimizer, model_cfg=engine.model_config, background=True
    )
    for number in (1, 2):  # the second has its plan and its buffers, as all but the first of a run do
        beside.begin(number, {})
        during = [step()]
        while (saved := beside.poll()) is None:
            during.append(step())
    found |= {"stall_s": saved.stall_s, "write_s": saved.write_s, "step_during_s": statistics.median(during)}
    beside.close()

    began = time.perf_counter()
    assert not damage(saved.folder)
    found["check_gb_s"] = gigabytes / (time.perf_counter() - began)
    began = time.perf_counter()
    load_checkpoint(saved.folder, engine.chunks, engine.optimizer)
    found["load_gb_s"] = gigabytes / (time.perf_counter() - began)
    return found


def main() -> None:
    """Measure, print and append a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default="", help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    shared = provenance("phi4r/train", "benchmarks/checkpoint.py")
    with distributed_session():
        engine = make_engine(options.hidden, options.layers)
        repeats = []
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory(dir=options.folder or None) as folder:
                repeats.append(measure(engine, Path(folder)))
    medians = {name: statistics.median(row[name] for row in repeats) for name in repeats[0]}
    row = {"parameters": engine.model_config.num_parameters, "repeats": options.repeats}
    text = {name: f"{value:.3g}" for name, value in medians.items()}
    append_rows("checkpoint", COLUMNS, [shared | row | text])
    for name in COLUMNS[4:]:
        print(f"{name:14} {(row | text)[name]}")


if __name__ == "__main__":
    main()
