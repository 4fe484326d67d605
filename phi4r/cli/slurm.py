"""A cluster, before and during a run: `phi4r plan`, `launch`, `serve`, `status`, `logs` and `merge`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from phi4r.cli.registry import COMMANDS, RunArgument, call, define, make_app, options_of
from phi4r.configs.load import load_stage, read_recipe
from phi4r.configs.stages import RLConfig
from phi4r.core.errors import UserError
from phi4r.parallel.launch import find_target
from phi4r.plan import command as planning
from phi4r.slurm import submit

app = make_app()

RL_SECTIONS = ("problems", "rollout", "reward", "objective")


@define(
    app,
    "plan",
    "  phi4r plan phi4_sft --nodes 4 --gpu h100\n  phi4r plan phi4_grpo --nodes 16 --response-tokens 8000",
)
@options_of(planning.Options)
def plan(
    ctx: typer.Context,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="As for sft and rl: a recipe or an earlier run's folder")
    ],
    stage: Annotated[
        str, typer.Option("--stage", metavar="sft|rl", help="Default: what the recipe has settings for")
    ] = "",
    **options: Any,
) -> None:
    if stage not in ("", "sft", "rl"):
        raise UserError(f"--stage: expected sft or rl, got {stage!r}")
    loaded = load_stage(stage or _stage_of(recipe), recipe, list(ctx.obj))
    planning.main(loaded, planning.Options(**options))


def _stage_of(recipe: str) -> str:
    """The stage a recipe is for: sft where it says anything about data, rl where it speaks of rollouts
    only."""
    found = read_recipe(recipe)
    if found.resolved_stage:
        return found.resolved_stage
    sections = {section for section, _ in found.shared}
    return "rl" if "data" not in sections and sections & set(RL_SECTIONS) else "sft"


@define(
    app,
    "launch",
    "  phi4r launch sft phi4_sft --nodes 4 --time 24:00:00 --run-dir /shared/runs/sft --dry-run\n"
    "  phi4r launch rl phi4_grpo --nodes 4 --rollout-nodes 2 --servers-per-node 4 --run-dir /shared/runs/rl\n"
    "  phi4r launch eval /shared/runs/rl modchain --array 10 --runs 5 --run-dir /shared/runs/eval",
)
@options_of(submit.LaunchRequest)
def launch(
    ctx: typer.Context,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="curate, sft, rl, eval or bench")],
    words: Annotated[
        list[str], typer.Argument(metavar="RECIPE|CHECKPOINT [TASK]", help="As for `phi4r STAGE`")
    ],
    runs: Annotated[str, typer.Option("--runs", metavar="N", help="eval: same as --eval.runs")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show and check everything; submit nothing")
    ] = False,
    parsable: Annotated[
        bool, typer.Option("--parsable", help="Print the job's id only, for scripts")
    ] = False,
    **options: Any,
) -> None:
    overrides = [*([f"eval.runs={runs}"] if runs else []), *ctx.obj]
    request = submit.LaunchRequest(stage, words, overrides, **options)
    submit.main(request, dry_run=dry_run, parsable=parsable)


@define(
    app,
    "serve",
    "  phi4r serve phi4_grpo --run-dir /shared/runs/rl --vllm.options='--tensor-parallel-size 2'",
)
def serve(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The trainer's")],
    run_dir: Annotated[str, typer.Option("--run-dir", metavar="D", help="The trainer's run folder")],
    number: Annotated[
        int | None,
        typer.Option("--number", min=0, help="Which of vllm.num_servers it is (default: $SLURM_PROCID)"),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Listen here (default: where $MASTER_ADDR is reached from)")
    ] = "",
    seed: Annotated[str, typer.Option("--seed", hidden=True)] = "",
    on_bad_row: Annotated[str, typer.Option("--on-bad-row", hidden=True)] = "",
) -> None:
    # Job scripts hand the words of `phi4r rl` to both; `seed` and `on_bad_row` say nothing to a server.
    config = load_stage("rl", recipe, ctx.obj).config
    assert isinstance(config, RLConfig)
    if number is None:
        number = int(os.environ.get("SLURM_PROCID", "0"))
    find_target(COMMANDS["serve"].target)(config.vllm, Path(run_dir), number, host)


@define(app, "status", "  phi4r status\n  phi4r status /shared/runs/sft")
def status(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="Run folder (default: all your jobs)")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="For programs")] = False,
) -> None:
    call(ctx, COMMANDS["status"].target, run, as_json)


@define(app, "logs", "  phi4r logs /shared/runs/sft -f\n  phi4r logs /shared/runs/sft --rank 17")
def logs(
    ctx: typer.Context,
    run: RunArgument,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Whose log")] = 0,
    job: Annotated[bool, typer.Option("--job", help="The job script's log instead")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on, through restarts, until it ends")
    ] = False,
) -> None:
    call(ctx, COMMANDS["logs"].target, Path(run), None if job else rank, follow)


@define(app, "merge", "  phi4r merge /shared/runs/eval")
def merge(ctx: typer.Context, folder: RunArgument) -> None:
    call(ctx, COMMANDS["merge"].target, Path(folder))
