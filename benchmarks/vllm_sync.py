"""Seconds that vLLM servers take to get new weights, through files and by broadcast: rows in
results/vllm_sync.csv.

    python -m benchmarks.vllm_sync [--models tiny 100m] [--servers 2] [--syncs 5]

Needs `make vllm-deps` (or PHI4R_VLLM_PYTHON). The servers of a model are started once and get weights in both
ways, in turn, other ones each time: gathered, written or sent, loaded, their digests compared, probe answers
sampled and compared. "100m" has random weights and Phi-4's form with 12 layers of width 768. Columns: date
(UTC), commit, dirty, cpu, model, parameters, mib (of the weights as they are served), transfer, servers,
syncs, p20_s, p50_s, p80_s (of a sync), num_equal and num_unreadable (parameters whose digests were compared,
and that the server has repacked), max_probe_gap (nats).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import append_rows, provenance
from benchmarks.suite import require_vllm
from phi4r.configs.sections import ModelConfig, ParallelConfig, SamplingConfig, TrainConfig, VLLMConfig
from phi4r.models.names import load_weights, random_weights
from phi4r.parallel.layout import init_layout
from phi4r.sampling.vllm.engine import VLLMEngine
from phi4r.train.engine import Engine

COLUMNS = [
    "date", "commit", "dirty", "cpu", "model", "parameters", "mib", "transfer", "servers", "syncs", "p20_s",
    "p50_s", "p80_s", "num_equal", "num_unreadable", "max_probe_gap",
]  # fmt: skip
MODELS = {
    "tiny": ModelConfig.from_preset("tiny", vocab_size=512, max_position_embeddings=256),
    "100m": ModelConfig(
        num_layers=12, hidden_size=768, ffn_hidden_size=2048, num_attention_heads=12, num_query_groups=4,
        head_dim=64, vocab_size=20_000, max_position_embeddings=256,
    ),
}  # fmt: skip
PROBES = [(5, 6, 7), (9, 10)]


def open_engine(trainer: Engine, folder: Path, **settings: Any) -> VLLMEngine:
    """A rollout engine with `settings` of the section vllm."""
    config = VLLMConfig(**settings)
    sampling = SamplingConfig(engine="vllm")
    return VLLMEngine(trainer, (3,), config, sampling, folder, max_model_len=256, probe_prompts=PROBES)


def measure(name: str, num_servers: int, num_syncs: int, folder: Path) -> list[dict[str, Any]]:
    """The rows of one model."""
    model = MODELS[name]
    trainer = Engine(model, ParallelConfig(), init_layout(ParallelConfig()), TrainConfig())
    load_weights(trainer.models, model, random_weights(model, 0), 0, 1)
    engines = {"gloo": open_engine(trainer, folder / "gloo", num_servers=num_servers, transfer="gloo")}
    print(f"{name}: starting {num_servers} servers", flush=True)
    try:
        engines["gloo"].sync(0)
        addresses = ",".join(member.url for member in engines["gloo"].fleet.members)
        engines["files"] = open_engine(trainer, folder / "files", addresses=addresses)
        engines["files"].sync(0)
        seconds: dict[str, list[float]] = {transfer: [] for transfer in engines}
        metrics: dict[str, dict[str, float]] = {}
        for sync in range(1, num_syncs + 1):
            for transfer, engine in engines.items():
                seed = 2 * sync + (transfer == "gloo")
                load_weights(trainer.models, model, random_weights(model, seed), 0, 1)
                began = time.monotonic()
                metrics[transfer] = engine.sync(sync)
                seconds[transfer].append(time.monotonic() - began)
                print(f"  {transfer:6} {seconds[transfer][-1]:7.3f} s", flush=True)
    finally:
        for engine in engines.values():
            engine.close()
    shared = {
        "model": name, "parameters": model.num_parameters, "mib": round(model.num_parameters * 4 / 2**20, 1),
        "servers": num_servers, "syncs": num_syncs,
    }  # fmt: skip
    rows = []
    for transfer, engine in engines.items():
        p20, p50, p80 = np.percentile(seconds[transfer], [20, 50, 80])
        rows.append(
            {
                **shared, "transfer": transfer, "p20_s": f"{p20:.3f}", "p50_s": f"{p50:.3f}",
                "p80_s": f"{p80:.3f}", "num_equal": engine.comparison.num_equal,
                "num_unreadable": engine.comparison.num_unreadable,
                "max_probe_gap": f"{metrics[transfer]['max_probe_gap']:.3g}",
            }
        )  # fmt: skip
    return rows


def main() -> int:
    """All models, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--syncs", type=int, default=5)
    options = parser.parse_args()
    require_vllm(parser)
    shared = provenance("phi4r", "kernels", "benchmarks")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(name, options.servers, options.syncs, Path(folder))
        path = append_rows("vllm_sync", COLUMNS, [{**shared, **row} for row in rows])
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
