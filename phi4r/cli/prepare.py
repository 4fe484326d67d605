"""`phi4r plan`, `phi4r data build`, `phi4r profile`: commands for what comes before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phi4r.core.errors import UserError

data_app = typer.Typer(help="Packed shards for training", rich_markup_mode=None)

RL_SECTIONS = ("problems", "rollout", "reward", "objective")


def plan(
    ctx: typer.Context,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="As for sft and rl: a recipe or an earlier run's folder")
    ],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes")] = 4,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1, help="GPUs of a node")] = 8,
    gpu: Annotated[str, typer.Option("--gpu", metavar="h100|h200", help="Kind of GPU")] = "h100",
    stage: Annotated[
        str, typer.Option("--stage", metavar="sft|rl", help="Default: what the recipe has settings for")
    ] = "",
    tokens: Annotated[
        float, typer.Option("--tokens", min=0, help="Tokens to train on (0: train.num_steps decides)")
    ] = 0.0,
    document_tokens: Annotated[
        int, typer.Option("--document-tokens", min=0, help="Mean length of documents (0: one fills a row)")
    ] = 0,
    response_tokens: Annotated[
        int,
        typer.Option("--response-tokens", min=0, help="Mean response of RL (0: a quarter of the longest)"),
    ] = 0,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Layouts to list")] = 8,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="RL with vLLM servers: simulate modes and splits of the nodes")
    ] = False,
    sync_seconds: Annotated[
        float, typer.Option("--sync-seconds", min=0, help="Weights to the servers (0: an estimate)")
    ] = 0.0,
    plot: Annotated[
        str, typer.Option("--plot", metavar="FILE", help="Draw the simulation, as PNG, SVG or PDF")
    ] = "",
) -> None:
    from phi4r.configs.load import load_stage
    from phi4r.plan.command import Options, main

    if stage not in ("", "sft", "rl"):
        raise UserError(f"--stage: expected sft or rl, got {stage!r}")
    loaded = load_stage(stage or _stage_of(recipe), recipe, list(ctx.obj))
    options = Options(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        tokens=tokens,
        document_tokens=document_tokens,
        response_tokens=response_tokens,
        limit=limit,
        simulate=simulate,
        sync_seconds=sync_seconds,
        plot=plot,
    )
    main(loaded, options)


@data_app.command("build", help="JSONL or Parquet to packed shards; data.path and the rest as for sft.")
def data_build(
    ctx: typer.Context,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Its data, tokenizer and seed are used, as sft uses them")
    ],
    out: Annotated[str, typer.Option("--out", metavar="D", help="Folder to write; the same one continues")],
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes")] = 1,
    mixture: Annotated[
        str, typer.Option("--mixture", metavar="'A=2, B=0.5'", help="Epochs per cluster (others: 1)")
    ] = "",
) -> None:
    from phi4r.configs.load import load_stage
    from phi4r.parallel.launch import find_target

    config = load_stage("sft", recipe, list(ctx.obj)).config
    build = find_target("phi4r.data.build:main")
    options = find_target("phi4r.data.build:Options")
    build(config, Path(out), options(workers=workers, mixture=mixture))


def profile(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="As for sft: its model, layout and data")],
    run_dir: Annotated[str, typer.Option("--run-dir", metavar="D", help="Folder to write")] = "runs/profile",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps that are recorded")] = 3,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps before them")] = 2,
) -> None:
    from phi4r.configs.load import load_stage
    from phi4r.parallel.launch import run_handler

    config = load_stage("sft", recipe, [*ctx.obj, f"train.num_steps={steps + warmup}"]).config
    run_handler(
        "phi4r.commands.profile:main", [config, steps, warmup, Path(run_dir)], config.parallel, Path(run_dir)
    )


def _stage_of(recipe: str) -> str:
    """The stage a recipe is for: sft where it says anything about data, rl where it speaks of rollouts
    only."""
    from phi4r.configs.load import read_recipe

    found = read_recipe(recipe)
    if found.resolved_stage:
        return found.resolved_stage
    sections = {section for section, _ in found.shared}
    return "rl" if "data" not in sections and sections & set(RL_SECTIONS) else "sft"
