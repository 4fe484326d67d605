"""`phi4r profile RECIPE`: where the time of an SFT step goes, by torch's profiler.

The run's own model, layout and rows are used; some steps warm up and are not recorded. Every rank writes

    D/trace_rank_00000.json   for chrome://tracing or https://ui.perfetto.dev

and rank 0 D/summary.json: seconds of every step, and per operator the calls and milliseconds that it spent
itself, not in what it called, over the recorded steps, on the device that was profiled.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from phi4r.configs.stages import SFTConfig
from phi4r.core.console import print_table, say
from phi4r.core.io import atomic_write_json
from phi4r.parallel.layout import distributed_session, init_layout
from phi4r.train.engine import Engine, sft_loss
from phi4r.train.session import fill_weights, open_tokenizer, resolve_model
from phi4r.train.sft import load_data, open_loader

SHOWN = 15


def main(cfg: SFTConfig, num_steps: int, num_warmup: int, run_dir: Path) -> None:
    """Profile `num_steps` steps on every rank of the job. `cfg.train.num_steps` must be their sum."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with distributed_session():
        layout = init_layout(cfg.parallel, cfg.seed)
        tokenizer = open_tokenizer(cfg.tokenizer, cfg.init.checkpoint)
        model = resolve_model(cfg.model, tokenizer, cfg.init.checkpoint)
        rows, _ = load_data(cfg, tokenizer, run_dir, layout)
        engine = Engine(model, cfg.parallel, layout, cfg.train, cfg.optimizer)
        fill_weights(engine, cfg.init.checkpoint, cfg.seed)
        on_gpu = layout.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
        with open_loader(cfg, rows, layout, 0) as loader:

            def step() -> float:
                began = time.perf_counter()
                with record_function("phi4r: rows"):
                    batch = loader.next()
                with record_function("phi4r: train_step"):
                    engine.train_step(batch, sft_loss, cfg.optimizer.lr)
                return time.perf_counter() - began

            for _ in range(num_warmup):
                step()
            with profile(activities=activities, record_shapes=True) as recorded:
                seconds = [step() for _ in range(num_steps)]
        trace = run_dir / f"trace_rank_{layout.rank:05d}.json"
        temporary = trace.with_name(f".{trace.name}.tmp")
        recorded.export_chrome_trace(str(temporary))
        temporary.replace(trace)
        if layout.is_main:
            _summarise(recorded, seconds, on_gpu, run_dir)


def _summarise(recorded: Any, seconds: list[float], on_gpu: bool, run_dir: Path) -> None:
    """Write D/summary.json and print the operators that took the most time."""
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    operators = [
        {"name": event.key, "calls": event.count, "self_ms": getattr(event, key) / 1e3}
        for event in recorded.key_averages()
        if getattr(event, key) > 0
    ]
    operators.sort(key=lambda operator: -operator["self_ms"])
    total = sum(operator["self_ms"] for operator in operators)
    summary = {"device": "cuda" if on_gpu else "cpu", "step_seconds": seconds, "operators": operators}
    atomic_write_json(run_dir / "summary.json", summary)
    shown = [
        (
            operator["name"][:60],
            operator["calls"],
            f"{operator['self_ms']:.1f}",
            f"{operator['self_ms'] / total:.1%}",
        )
        for operator in operators[:SHOWN]
    ]
    print_table(f"{len(seconds)} steps, rank 0", ["operator", "calls", "ms", "share"], shown)
    say(f"wrote {run_dir}/summary.json and a trace per rank, for https://ui.perfetto.dev")
