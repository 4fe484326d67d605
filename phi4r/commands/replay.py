"""`phi4r replay RUN`: do the step again at which a run gave up because loss or gradient were not finite.

The run has left its weights and the batch in RUN/replay (`phi4r.train.health`). Each row is run by itself,
forward and backward, at a learning rate of 0: the table says which rows are to blame, and which module's
output, or which parameter's gradient, was the first that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from phi4r.configs.stages import RLConfig, SFTConfig
from phi4r.core.console import print_table, say
from phi4r.core.errors import UserError
from phi4r.core.io import atomic_write_json
from phi4r.data.packing import PackedRow
from phi4r.parallel.layout import distributed_session, init_layout
from phi4r.rl.batch import policy_loss
from phi4r.train.checkpoint import load_checkpoint
from phi4r.train.engine import Engine, TokenLoss, sft_loss
from phi4r.train.folders import find_latest, read_manifest, replay_folder
from phi4r.train.health import load_batch

REPORT = "report.json"


def main(cfg: SFTConfig | RLConfig, run_dir: Path) -> None:
    """Replay on every rank of `cfg.parallel`, which may differ from the run's; rank 0 prints the table and
    writes RUN/replay/report.json."""
    folder = replay_folder(run_dir)
    with distributed_session():
        layout = init_layout(cfg.parallel, cfg.seed)
        checkpoint = find_latest(folder)
        if checkpoint is None:
            raise UserError(f"{folder}: holds no whole checkpoint")
        rows, info = load_batch(folder)
        model = read_manifest(checkpoint).model
        engine = Engine(model, cfg.parallel, layout, cfg.train, cfg.optimizer)
        load_checkpoint(checkpoint, engine.chunks)
        engine.sync_optimizer()
        loss: TokenLoss = sft_loss
        if isinstance(cfg, RLConfig):
            loss = policy_loss(cfg.objective, on_policy=cfg.objective.updates_per_rollout == 1)
        temperature = float(info["temperature"])
        report = []
        for index in range(len(rows)):
            report.append({"row": index, **_replay(engine, rows[index : index + 1], loss, temperature)})
        whole = _replay(engine, rows, loss, temperature)
        if layout.is_main:
            atomic_write_json(folder / REPORT, {**info, "rows": report, "whole": whole})
            _show(run_dir, info, report, whole)


def _replay(engine: Engine, rows: Sequence[PackedRow], loss: TokenLoss, temperature: float) -> dict[str, Any]:
    with _first_nonfinite(engine) as found:
        result = engine.train_step(rows, loss, 0.0, temperature=temperature, with_entropy=True)
    gradients = [
        f"gradient of {name}"
        for model in reversed(engine.models)
        for name, parameter in reversed(list(model.named_parameters()))
        if not bool(torch.isfinite(parameter.main_grad).all())
    ]
    found = [*found, *gradients]  # where the outputs are finite: the gradient nearest to the loss
    names: list[Any] = [found]
    if dist.get_world_size() > 1:
        names = [None] * dist.get_world_size()
        dist.all_gather_object(names, found)
    named = [f"{name} (rank {rank})" for rank, part in enumerate(names) for name in part[:1]]
    return {
        "documents": sum(len(np.unique(row.doc_index[row.doc_index >= 0])) for row in rows),
        "tokens": sum(row.num_tokens for row in rows),
        "loss": _number(result.loss),
        "grad_norm": _number(result.grad_norm),
        "finite": result.applied,
        "first_nonfinite": named[0] if named else "",
    }


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


@contextmanager
def _first_nonfinite(engine: Engine) -> Iterator[list[str]]:
    """A list that fills with the modules of this rank whose output is not finite, in the order they ran."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(module: Any, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple | list) else [output]
            for tensor in tensors:
                if isinstance(tensor, torch.Tensor) and not bool(torch.isfinite(tensor.detach()).all()):
                    found.append(name)
                    return

        return look

    handles = [
        module.register_forward_hook(hook(name))
        for model in engine.models
        for name, module in model.named_modules()
        if name and not any(module.children())  # leaves: they say best where it began
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _show(run_dir: Path, info: dict[str, Any], report: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    columns = ["row", "documents", "tokens", "loss", "grad_norm", "first_nonfinite"]
    table = [[row[name] for name in columns] for row in report]
    print_table(f"step {info['step']} of {run_dir}, row by row", columns, table)
    bad = [str(row["row"]) for row in report if not row["finite"]]
    if bad:
        say(f"not finite: row {', '.join(bad)}")
    elif whole["finite"]:
        say("every row and the whole step are finite here: not reproduced")
    else:
        say("every row is finite by itself, the whole step is not: a sum overflows")
