"""`phi4r checkpoint ...`: look after the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phi4r.cli.registry import COMMANDS, call, make_app

app = make_app()
checkpoint_app = make_app(COMMANDS["checkpoint"].help)
app.add_typer(checkpoint_app, name="checkpoint")

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run folder of `phi4r sft` or `phi4r rl`")]


@checkpoint_app.command("ls", help="A run's checkpoints: size, a metric, the layout they were saved on.")
def checkpoint_ls(
    ctx: typer.Context,
    run: RunArgument,
    metric: Annotated[str, typer.Option("--metric", help="Metric to show")] = "loss",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list for programs")] = False,
) -> None:
    call(ctx, "phi4r.train.manage:ls", Path(run), metric=metric, as_json=as_json)


@checkpoint_app.command("verify", help="Read every byte and compare checksums; names damaged files.")
def checkpoint_verify(
    ctx: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint, or run folder: all of them")],
) -> None:
    call(ctx, "phi4r.train.manage:verify", Path(path))


@checkpoint_app.command("rm", help="Delete checkpoints of a run.")
def checkpoint_rm(
    ctx: typer.Context,
    run: RunArgument,
    steps: Annotated[list[int], typer.Argument(metavar="STEP...", help="Steps, as `ls` shows them")],
) -> None:
    call(ctx, "phi4r.train.manage:rm", Path(run), steps)


@checkpoint_app.command("export", help="Write a Hugging Face folder, one tensor at a time.")
def checkpoint_export(
    ctx: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint, or run folder: its newest")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="New folder")],
) -> None:
    call(ctx, "phi4r.convert.hf:main", "phi4r-to-hf", Path(path), Path(destination))
