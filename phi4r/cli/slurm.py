"""`phi4r launch`, `status`, `logs`, `merge`, `report` and `serve`: the commands for users of a
SLURM cluster, and for looking at a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from phi4r.core.errors import UserError

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run folder")]


def _no_overrides(ctx: typer.Context) -> None:
    if ctx.obj:
        raise UserError(f"`phi4r {ctx.info_name}` takes no settings, got --{ctx.obj[0]}")


def launch(
    ctx: typer.Context,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="curate, sft, rl, eval or bench")],
    words: Annotated[
        list[str], typer.Argument(metavar="RECIPE|CHECKPOINT [TASK]", help="As for `phi4r STAGE`")
    ],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes of the job")] = 1,
    rollout_nodes: Annotated[
        int,
        typer.Option("--rollout-nodes", min=0, help="rl: more nodes, for vLLM servers (a heterogeneous job)"),
    ] = 0,
    servers_per_node: Annotated[
        int,
        typer.Option("--servers-per-node", min=0, help="vLLM servers on a rollout node (default: one a GPU)"),
    ] = 0,
    time: Annotated[
        str,
        typer.Option(
            "--time", metavar="T", help="Time limit: minutes, H:M:S, D-H:M:S (default: the script's)"
        ),
    ] = "",
    run_dir: Annotated[
        str, typer.Option("--run-dir", metavar="D", help="Run folder, shared by all nodes")
    ] = "",
    gpus_per_node: Annotated[
        int, typer.Option("--gpus-per-node", min=0, help="GPUs to ask for (default: as many as ranks)")
    ] = 0,
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="h100|h200", help="Kind of GPU, for `phi4r plan`")
    ] = "h100",
    after: Annotated[
        str, typer.Option("--after", metavar="JOB", help="Start when that job has succeeded")
    ] = "",
    array: Annotated[
        int,
        typer.Option("--array", min=0, metavar="N", help="eval: N jobs with runs of their own, and a merge"),
    ] = 0,
    recipe: Annotated[str, typer.Option("--recipe", help="eval: recipe whose [eval] tables are used")] = "",
    runs: Annotated[str, typer.Option("--runs", metavar="N", help="eval: same as --eval.runs")] = "",
    sbatch: Annotated[
        str, typer.Option("--sbatch", metavar="'...'", help="More options for sbatch, as one word")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show and check everything; submit nothing")
    ] = False,
    parsable: Annotated[
        bool, typer.Option("--parsable", help="Print the job's id only, for scripts")
    ] = False,
) -> None:
    from phi4r.slurm import submit

    overrides = [*([f"eval.runs={runs}"] if runs else []), *ctx.obj]
    request = submit.LaunchRequest(
        stage=stage,
        words=words,
        overrides=overrides,
        run_dir=run_dir,
        recipe=recipe,
        nodes=nodes,
        rollout_nodes=rollout_nodes,
        servers_per_node=servers_per_node,
        time=time,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        after=after,
        array=array,
        sbatch=sbatch,
    )
    submit.main(request, dry_run=dry_run, parsable=parsable)


def status(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="Run folder (default: all your jobs)")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="For programs")] = False,
) -> None:
    from phi4r.slurm import status as module

    _no_overrides(ctx)
    module.main(run, as_json)


def logs(
    ctx: typer.Context,
    run: RunArgument,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Whose log")] = 0,
    job: Annotated[bool, typer.Option("--job", help="The job script's log instead")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on, through restarts, until it ends")
    ] = False,
) -> None:
    from phi4r.slurm import logs as module

    _no_overrides(ctx)
    module.main(Path(run), None if job else rank, follow)


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
    from phi4r.configs.load import load_stage
    from phi4r.configs.stages import RLConfig
    from phi4r.parallel.launch import find_target

    # Job scripts hand the words of `phi4r rl` to both; `seed` and `on_bad_row` say nothing to a server.
    config = load_stage("rl", recipe, ctx.obj).config
    assert isinstance(config, RLConfig)
    if number is None:
        number = int(os.environ.get("SLURM_PROCID", "0"))
    find_target("phi4r.sampling.vllm.serve:main")(config.vllm, Path(run_dir), number, host)


def merge(ctx: typer.Context, folder: RunArgument) -> None:
    from phi4r.parallel.launch import find_target

    _no_overrides(ctx)
    find_target("phi4r.evaluate.merge:main")(Path(folder))


def report(ctx: typer.Context, run: RunArgument) -> None:
    from phi4r.parallel.launch import find_target

    _no_overrides(ctx)
    find_target("phi4r.evaluate.report:main")(Path(run))
