"""Supervised fine-tuning: packed chat documents, cross-entropy on the assistant's tokens (reference section
3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi4r.configs.stages import SFTConfig
from phi4r.console import say
from phi4r.data.order import items_of_step
from phi4r.data.sft_data import SFTData, build_sft_data
from phi4r.data.tokenizer import Tokenizer
from phi4r.parallel.layout import Layout, broadcast_object, distributed_session, init_layout
from phi4r.train.engine import Engine, sft_loss
from phi4r.train.loop import open_loop
from phi4r.train.schedule import learning_rate
from phi4r.train.session import open_tokenizer, resolve_model

# Separates the stream that shuffles rows from the other streams of a run's seed.
SHUFFLE_STREAM = 11


def load_data(config: SFTConfig, tokenizer: Tokenizer, run_dir: Path, layout: Layout) -> SFTData:
    """The run's documents, read once by rank 0 and handed to the others."""
    data = None
    if layout.is_main:
        data = build_sft_data(config.data, tokenizer, config.seed, run_dir / "rejects.jsonl")
        for line in data.report.lines():
            say(line)
    return broadcast_object(data)


def main(cfg: SFTConfig, run_dir: Path) -> None:
    """Train, on every rank of the job; the same call with the same run folder resumes."""
    with distributed_session():
        layout = init_layout(cfg.parallel, cfg.seed)
        tokenizer = open_tokenizer(cfg.tokenizer, cfg.init.checkpoint)
        model = resolve_model(cfg.model, tokenizer, cfg.init.checkpoint)
        data = load_data(cfg, tokenizer, run_dir, layout)
        engine = Engine(model, cfg.parallel, layout, cfg.train, cfg.optimizer)
        say(
            f"sft: {model.num_parameters:,} parameters on {layout.world_size} rank(s),"
            f" {cfg.train.num_steps} steps"
        )
        with open_loop(cfg, run_dir, engine, tokenizer, "sft") as loop:
            for step in loop.steps():
                loop.begin_step()
                drawn = items_of_step(
                    len(data.train_rows), cfg.seed, SHUFFLE_STREAM, step, cfg.train.global_batch_size
                )
                rows = [data.train_rows[index] for index in drawn]
                lr = learning_rate(cfg.optimizer, step, cfg.train.num_steps)
                loop.clock.phase("train")
                result = engine.train_step(rows, sft_loss, lr)
                loop.check_finite(step, result, rows)
                metrics = {
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "lr": lr,
                    "num_valid_tokens": result.count,
                    "num_tokens": sum(row.num_tokens for row in rows),
                    "epoch": step * cfg.train.global_batch_size / len(data.train_rows),
                    "skipped": int(not result.applied),
                }
                last = step + 1 == cfg.train.num_steps
                if (
                    data.heldout_rows
                    and cfg.train.eval_every
                    and ((step + 1) % cfg.train.eval_every == 0 or last)
                ):
                    loop.clock.phase("eval")
                    metrics["heldout_loss"] = engine.evaluate(data.heldout_rows).loss
                shown: dict[str, Any] = {
                    k: metrics[k] for k in ("loss", "heldout_loss", "grad_norm", "lr") if k in metrics
                }
                loop.finish_step(step, metrics, shown, int(metrics["num_tokens"]))
