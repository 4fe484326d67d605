"""Tools around the pipeline: generation, scoring, conversion, data, verdicts, samples, measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phi4r.cli.registry import (
    COMMANDS,
    CheckpointArgument,
    InputArgument,
    OnBadRowOption,
    OutputArgument,
    RunArgument,
    call,
    define,
    make_app,
)
from phi4r.commands.bench import ENTRIES
from phi4r.configs.load import load_parallel, load_stage
from phi4r.core.console import say
from phi4r.core.errors import UserError
from phi4r.parallel.launch import find_target, run_handler

app = make_app()
data_app = make_app(COMMANDS["data"].help)
rollouts_app = make_app(COMMANDS["rollouts"].help)
app.add_typer(data_app, name="data")
app.add_typer(rollouts_app, name="rollouts")


# --- a model


@define(app, "score", "  phi4r score runs/sft in.jsonl out.jsonl --parallel.tp 2")
def score(
    ctx: typer.Context, checkpoint: CheckpointArgument, input: InputArgument, output: OutputArgument
) -> None:
    """{"tokens": [n ids]} -> {"logprobs": [n - 1 floats]}."""
    parallel = load_parallel(ctx.obj)
    run_handler(COMMANDS["score"].target, [checkpoint, Path(input), Path(output), parallel], parallel)


_CONVERT_EXAMPLES = """\
  phi4r convert hf-to-phi4r HF_FOLDER checkpoints/phi-4
  phi4r convert phi4r-to-hf runs/sft HF_FOLDER"""


@define(app, "convert", _CONVERT_EXAMPLES)
def convert(
    ctx: typer.Context,
    direction: Annotated[str, typer.Argument(metavar="hf-to-phi4r|phi4r-to-hf")],
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder to read")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="Folder to write")],
) -> None:
    if direction not in ("hf-to-phi4r", "phi4r-to-hf"):
        raise UserError(f"convert: expected hf-to-phi4r or phi4r-to-hf, got {direction!r}")
    parallel = load_parallel(ctx.obj)
    # No ranks: a checkpoint has no layout in it, so the layout is only checked.
    find_target(COMMANDS["convert"].target)(direction, Path(source), Path(destination), parallel)


@define(app, "replay", "  phi4r replay runs/sft --parallel.dp 2")
def replay(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder of the run that gave up")],
) -> None:
    """The batch and the weights are in RUN/replay; the settings are the run's, but for those given here."""
    stage = find_target("phi4r.train.manage:stage_to_replay")(Path(run))
    config = load_stage(stage, run, list(ctx.obj)).config
    run_handler(COMMANDS["replay"].target, [config, Path(run)], config.parallel)


@define(app, "profile", "  phi4r profile tiny --run-dir runs/profile --steps 3 --parallel.tp 2")
def profile(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="As for sft: its model, layout and data")],
    run_dir: Annotated[str, typer.Option("--run-dir", metavar="D", help="Folder to write")] = "runs/profile",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps that are recorded")] = 3,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps before them")] = 2,
) -> None:
    config = load_stage("sft", recipe, [*ctx.obj, f"train.num_steps={steps + warmup}"]).config
    run_handler(
        COMMANDS["profile"].target, [config, steps, warmup, Path(run_dir)], config.parallel, Path(run_dir)
    )


_BENCH_EXAMPLES = """\
  phi4r bench attention --tokens 32768 --mixes dense lognormal
  phi4r bench data --help
  phi4r bench plot attention"""
# Everything after the entry is the entry's own, --help included.
_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}


@define(app, "bench", _BENCH_EXAMPLES, context_settings=_PASS_ON)
def bench(
    ctx: typer.Context,
    entry: Annotated[
        str,
        typer.Argument(
            metavar="ENTRY",
            help=f"One of {', '.join(ENTRIES)}",
        ),
    ],
) -> None:
    raise typer.Exit(call(ctx, COMMANDS["bench"].target, entry, ctx.args))


@define(app, "doctor")
def doctor(ctx: typer.Context) -> None:
    call(ctx, COMMANDS["doctor"].target)


# --- data, verdicts, samples


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
    config = load_stage("sft", recipe, list(ctx.obj)).config
    build = find_target(COMMANDS["data"].target)
    options = find_target("phi4r.data.build:Options")
    build(config, Path(out), options(workers=workers, mixture=mixture))


@define(app, "verify")
def verify(
    ctx: typer.Context,
    input: InputArgument,
    output: OutputArgument,
    on_bad_row: OnBadRowOption = "stop",
    audit: Annotated[
        bool, typer.Option("--audit", help="Check each answer by a second, independent method too")
    ] = False,
) -> None:
    options = {"on_bad_row": _checked(on_bad_row), "audit": audit}
    report = call(ctx, COMMANDS["verify"].target, Path(input), Path(output), **options)
    say(f"verify: {report.summary()}")


@define(app, "reward")
def reward(
    ctx: typer.Context, input: InputArgument, output: OutputArgument, on_bad_row: OnBadRowOption = "stop"
) -> None:
    checked = _checked(on_bad_row)
    report = call(ctx, COMMANDS["reward"].target, Path(input), Path(output), on_bad_row=checked)
    say(f"reward: {report.summary()}")


def _checked(on_bad_row: str) -> str:
    if on_bad_row not in ("stop", "skip"):
        raise UserError(f"--on-bad-row: expected stop or skip, got {on_bad_row!r}")
    return on_bad_row


@rollouts_app.command(
    "show", help="Print samples of an RL run: prompt, thinking, answer, every part of the reward."
)
def rollouts_show(
    ctx: typer.Context,
    run_dir: Annotated[str, typer.Argument(metavar="D", help="Run folder of `phi4r rl`")],
    step: Annotated[int | None, typer.Option("--step", help="Step to read (default: the newest)")] = None,
    problem: Annotated[
        str | None, typer.Option("--problem", help="Id of a problem, through all steps")
    ] = None,
    outcome: Annotated[
        str | None, typer.Option("--outcome", help="correct, wrong, no_answer, timeout or error")
    ] = None,
    sort: Annotated[str, typer.Option("--sort", help="file, reward or length")] = "file",
    limit: Annotated[int, typer.Option("--limit", help="Samples to print (0: all)")] = 8,
    full: Annotated[bool, typer.Option("--full", help="Whole texts")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for programs")] = False,
) -> None:
    chosen = {"step": step, "problem": problem, "outcome": outcome, "limit": limit, "sort": sort}
    call(ctx, COMMANDS["rollouts"].target, run_dir, **chosen, full=full, as_json=as_json)


@rollouts_app.command(
    "audit", help="Print answers on which the verifier and its second, independent check disagree."
)
def rollouts_audit(
    ctx: typer.Context,
    run_dir: Annotated[str, typer.Argument(metavar="D", help="Run folder of `phi4r rl` or `phi4r eval`")],
    limit: Annotated[int, typer.Option("--limit", help="Cases to draw from all logged ones (0: all)")] = 8,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of that draw")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for programs")] = False,
) -> None:
    call(ctx, "phi4r.commands.rollouts:show_audit", Path(run_dir), limit=limit, seed=seed, as_json=as_json)


@define(app, "report", "  phi4r report runs/rl")
def report(ctx: typer.Context, run: RunArgument) -> None:
    call(ctx, COMMANDS["report"].target, Path(run))
