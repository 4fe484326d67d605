"""Supervised fine-tuning: packed chat documents, cross-entropy on the assistant's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from phi4r.configs.stages import SFTConfig
from phi4r.core.console import say
from phi4r.core.seeds import Stream, problem_seed
from phi4r.data.dali import DaliLoader
from phi4r.data.loader import Loader
from phi4r.data.packing import PackedRow
from phi4r.data.sft_data import SFTData, build_sft_data, open_shards
from phi4r.data.shards import is_shard_folder
from phi4r.data.tokenizer import Tokenizer
from phi4r.parallel.layout import Layout, broadcast_object, distributed_session, init_layout
from phi4r.tasks import get_task
from phi4r.train.engine import Engine, sft_loss
from phi4r.train.loop import open_loop
from phi4r.train.session import open_tokenizer, resolve_model


def load_data(
    config: SFTConfig, tokenizer: Tokenizer, run_dir: Path, layout: Layout
) -> tuple[Sequence[PackedRow], Sequence[PackedRow]]:
    """(training rows, held-out rows). Shards are mapped by every rank; other files are read and packed by
    rank 0 and handed to the others."""
    if is_shard_folder(config.data.path):
        rows, heldout, lines = open_shards(config.data, tokenizer)
        for line in lines:
            say(line)
        return rows, heldout
    data: SFTData | None = None
    if layout.is_main:
        section = config.data
        count = 0 if section.path else section.num_generated + section.heldout
        seed = problem_seed(config.seed, "train")
        generated = get_task(section.task, "data.task").examples(seed, 0, count) if count else []
        data = build_sft_data(section, tokenizer, config.seed, run_dir / "rejects.jsonl", generated)
        for line in data.report.lines():
            say(line)
    data = broadcast_object(data)
    assert data is not None
    return data.train_rows, data.heldout_rows


def open_loader(
    config: SFTConfig, rows: Sequence[PackedRow], layout: Layout, first_step: int
) -> Loader | DaliLoader:
    """The batches of the steps that are still to do."""
    kind: Callable[..., Loader | DaliLoader] = Loader
    if config.data.loader == "dali":
        kind = partial(DaliLoader, gpu=layout.device.index)
    return kind(
        rows,
        seed=config.seed,
        stream=Stream.SFT_ROWS,
        rows_per_step=config.train.global_batch_size,
        first_step=first_step,
        last_step=config.train.num_steps,
        dp=layout.dp,
        dp_rank=layout.dp_rank,
        deadline_s=config.parallel.timeout_s,
    )


def main(cfg: SFTConfig, run_dir: Path) -> None:
    """Train, on every rank of the job; the same call with the same run folder resumes."""
    with distributed_session():
        layout = init_layout(cfg.parallel, cfg.seed)
        tokenizer = open_tokenizer(cfg.tokenizer, cfg.init.checkpoint)
        model = resolve_model(cfg.model, tokenizer, cfg.init.checkpoint)
        train_rows, heldout_rows = load_data(cfg, tokenizer, run_dir, layout)
        engine = Engine(model, cfg.parallel, layout, cfg.train, cfg.optimizer)
        say(
            f"sft: {model.num_parameters:,} parameters on {layout.world_size} rank(s),"
            f" {cfg.train.num_steps} steps"
        )
        with (
            open_loop(cfg, run_dir, engine, tokenizer, "sft") as loop,
            open_loader(cfg, train_rows, layout, loop.start_step) as loader,
        ):
            for step in loop.steps():
                loop.begin_step()
                rows = loader.next()
                lr = cfg.optimizer.learning_rate(step, cfg.train.num_steps)
                loop.clock.phase("train")
                result = engine.train_step(rows, sft_loss, lr)
                loop.check_finite(step, result, rows)
                metrics = {
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "lr": lr,
                    "num_valid_tokens": result.count,
                    "num_tokens": sum(row.num_tokens for row in rows),
                    "epoch": step * cfg.train.global_batch_size / len(train_rows),
                    "skipped": int(not result.applied),
                }
                last = step + 1 == cfg.train.num_steps
                if heldout_rows and cfg.train.eval_every and ((step + 1) % cfg.train.eval_every == 0 or last):
                    loop.clock.phase("eval")
                    metrics["heldout_loss"] = engine.evaluate(heldout_rows).loss
                shown: dict[str, Any] = {
                    k: metrics[k] for k in ("loss", "heldout_loss", "grad_norm", "lr") if k in metrics
                }
                loop.finish_step(step, metrics, shown, int(metrics["num_tokens"]))
