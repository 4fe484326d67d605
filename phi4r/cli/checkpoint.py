"""`phi4r checkpoint ...` and `phi4r replay`: the commands that look after what a run left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from phi4r.core.errors import UserError

checkpoint_app = typer.Typer(help="List, verify, remove and export checkpoints", rich_markup_mode=None)


def _call(ctx: typer.Context, target: str, *arguments: Any, **options: Any) -> None:
    from phi4r.parallel.launch import find_target

    if ctx.obj:
        raise UserError(f"`phi4r checkpoint {ctx.info_name}` takes no settings, got --{ctx.obj[0]}")
    find_target(target)(*arguments, **options)


RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run folder of `phi4r sft` or `phi4r rl`")]


@checkpoint_app.command("ls", help="A run's checkpoints: size, a metric, the layout they were saved on.")
def checkpoint_ls(
    ctx: typer.Context,
    run: RunArgument,
    metric: Annotated[str, typer.Option("--metric", help="Metric to show")] = "loss",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list for programs")] = False,
) -> None:
    _call(ctx, "phi4r.train.manage:ls", Path(run), metric=metric, as_json=as_json)


@checkpoint_app.command("verify", help="Read every byte and compare checksums; names damaged files.")
def checkpoint_verify(
    ctx: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint, or run folder: all of them")],
) -> None:
    _call(ctx, "phi4r.train.manage:verify", Path(path))


@checkpoint_app.command("rm", help="Delete checkpoints of a run.")
def checkpoint_rm(
    ctx: typer.Context,
    run: RunArgument,
    steps: Annotated[list[int], typer.Argument(metavar="STEP...", help="Steps, as `ls` shows them")],
) -> None:
    _call(ctx, "phi4r.train.manage:rm", Path(run), steps)


@checkpoint_app.command("export", help="Write a Hugging Face folder, one tensor at a time.")
def checkpoint_export(
    ctx: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint, or run folder: its newest")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="New folder")],
) -> None:
    _call(ctx, "phi4r.convert.hf:main", "phi4r-to-hf", Path(path), Path(destination))


def replay(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder of the run that gave up")],
) -> None:
    """The batch and the weights are in RUN/replay; the settings are the run's, but for those given here."""
    from phi4r.configs.load import load_stage
    from phi4r.parallel.launch import find_target, run_handler

    stage = find_target("phi4r.train.manage:stage_to_replay")(Path(run))
    config = load_stage(stage, run, list(ctx.obj)).config
    run_handler("phi4r.commands.replay:main", [config, Path(run)], config.parallel)
