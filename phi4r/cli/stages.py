"""The stages of the pipeline: `phi4r curate`, `sft`, `rl`, `eval`, `generate`; and `quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from phi4r.cli.registry import (
    COMMANDS,
    CheckpointArgument,
    DryRunOption,
    InterruptedRunError,
    OnBadRowOption,
    RecipeArgument,
    RunDirOption,
    SeedOption,
    define,
    make_app,
)
from phi4r.configs.load import Loaded, load_pipeline, load_stage, prepare_run_dir, refuse_idle
from phi4r.core.errors import UserError
from phi4r.parallel.attempt import attempt
from phi4r.parallel.launch import find_target, run_handler

app = make_app()


def _overrides(ctx: typer.Context, stage: str, seed: str, on_bad_row: str) -> list[str]:
    """Dotted overrides plus the two that have short names."""
    section = "data" if stage == "sft" else "problems"
    short = [f"seed={seed}"] if seed else []
    short += [f"{section}.on_bad_row={on_bad_row}"] if on_bad_row else []
    return [*short, *ctx.obj]


def _run(stage: str, loaded: Loaded, run_dir: str, dry_run: bool, *arguments: Any) -> None:
    """Show the plan, or write config.json and run the stage's function on its ranks: main(config, *arguments,
    run_dir)."""
    from phi4r.commands import parts

    parts.check(loaded.config)
    folder = Path(run_dir or f"runs/{stage}_{loaded.recipe.name}")
    if dry_run:
        from phi4r.commands import dryrun

        dryrun.show(loaded, folder)
        return
    from phi4r.core.console import is_main_rank, say
    from phi4r.core.lock import run_lock

    refuse_idle(loaded)
    target, arguments = COMMANDS[stage].target, (loaded.config, *arguments, folder)
    parallel, is_main = loaded.config.parallel, is_main_rank()
    try:
        # curate runs in this process, and starts ranks where it needs a model: nothing there beats
        with attempt(0 if stage == "curate" else parallel.timeout_s), run_lock(folder, is_main):
            for change in prepare_run_dir(loaded.config, folder) if is_main else ():
                say(f"changed since the last start: {change}")
            if stage == "curate":
                find_target(target)(*arguments)
            else:
                run_handler(target, arguments, parallel, folder)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"interrupted; the same command with --run-dir {folder} goes on from there"
        ) from None


_SFT_EXAMPLES = """\
  phi4r sft tiny --run-dir runs/sft
  phi4r sft tiny --run-dir runs/sft --parallel.tp 2 --train.num_steps 400
  phi4r sft tiny --run-dir runs/gsm8k --data.path gsm8k.jsonl --data.seq_length 512
  phi4r sft phi4_sft --dry-run"""

_RL_EXAMPLES = """\
  phi4r rl tiny --run-dir runs/rl --init.checkpoint runs/sft
  phi4r rl phi4_grpo --dry-run --objective.kl_reference ref"""


@define(app, "sft", _SFT_EXAMPLES)
def sft(
    ctx: typer.Context,
    recipe: RecipeArgument,
    run_dir: RunDirOption = "",
    seed: SeedOption = "",
    on_bad_row: OnBadRowOption = "",
    dry_run: DryRunOption = False,
) -> None:
    loaded = load_stage("sft", recipe, _overrides(ctx, "sft", seed, on_bad_row))
    _run("sft", loaded, run_dir, dry_run)


@define(app, "rl", _RL_EXAMPLES)
def rl(
    ctx: typer.Context,
    recipe: RecipeArgument,
    run_dir: RunDirOption = "",
    seed: SeedOption = "",
    on_bad_row: OnBadRowOption = "",
    dry_run: DryRunOption = False,
    explain: Annotated[bool, typer.Option("--explain", help="Print the objective as formulas")] = False,
) -> None:
    loaded = load_stage("rl", recipe, _overrides(ctx, "rl", seed, on_bad_row))
    if explain:
        find_target("phi4r.rl.explain:main")(loaded.config)
        return
    _run("rl", loaded, run_dir, dry_run)


@define(app, "curate", "  phi4r curate tiny --run-dir runs/curate --curate.checkpoint runs/sft")
def curate(
    ctx: typer.Context,
    recipe: RecipeArgument,
    run_dir: RunDirOption = "",
    seed: SeedOption = "",
    on_bad_row: OnBadRowOption = "",
    dry_run: DryRunOption = False,
) -> None:
    loaded = load_stage("curate", recipe, _overrides(ctx, "curate", seed, on_bad_row))
    _run("curate", loaded, run_dir, dry_run)


_EVAL_EXAMPLES = """\
  phi4r eval runs/rl modchain --run-dir runs/eval --runs 8
  phi4r eval runs/rl modchain --run-dir runs/eval --eval.compare runs/sft
  phi4r eval runs/rl problems.jsonl --run-dir runs/eval --runs 50"""


@define(app, "eval", _EVAL_EXAMPLES)
def evaluate(
    ctx: typer.Context,
    checkpoint: CheckpointArgument,
    task: Annotated[
        str, typer.Argument(metavar="[TASK]", help="Task (name or package.module:name), or a problem file")
    ] = "",
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe whose [eval] tables are used")] = "",
    runs: Annotated[str, typer.Option("--runs", metavar="N", help="Same as --eval.runs")] = "",
    run_dir: RunDirOption = "",
    seed: SeedOption = "",
    on_bad_row: OnBadRowOption = "",
    dry_run: DryRunOption = False,
) -> None:
    short = [f"eval.runs={runs}"] if runs else []
    if task and (Path(task).exists() or Path(task).suffix in (".jsonl", ".parquet")):
        short += [f"problems.path={task}", "problems.task=math"]
    elif task:
        short.append(f"problems.task={task}")
    loaded = load_stage("eval", recipe or None, [*short, *_overrides(ctx, "eval", seed, on_bad_row)])
    name = Path(checkpoint).resolve().name
    _run("eval", loaded, run_dir or f"runs/eval_{name}", dry_run, checkpoint)


_GENERATE_EXAMPLES = """\
  phi4r generate runs/rl --prompt "7*9-6="
  phi4r generate runs/rl --problems problems.jsonl --samples 4 --run-dir runs/answers --sampling.engine vllm
  phi4r generate teacher --problems problems.jsonl --run-dir runs/traces --sampling.engine openai \\
      --sampling.url http://node7:8000/v1 --sampling.model teacher"""


@define(app, "generate", _GENERATE_EXAMPLES)
def generate(
    ctx: typer.Context,
    checkpoint: CheckpointArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="What the user says; the answer is printed")] = "",
    problems: Annotated[
        str, typer.Option("--problems", help="Problems to answer; RUN/answers.jsonl gets a line per answer")
    ] = "",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers to each")] = 1,
    run_dir: RunDirOption = "",
    system: Annotated[str, typer.Option("--system", help='"none", "reasoning" or any text')] = "none",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token")
    ] = 0.8,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0)] = 0.95,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="0: all tokens")] = 50,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
) -> None:
    """The model card recommends temperature 0.8, top-p 0.95, top-k 50."""
    if bool(prompt) == bool(problems):
        raise UserError("generate: give either --prompt or --problems")
    if prompt and run_dir:
        raise UserError("generate: --run-dir has no effect on --prompt, whose answer is printed")
    short = {
        "seed": seed, "generate.samples": samples, "problems.path": problems,
        "problems.system_message": system,
        "sampling.max_new_tokens": max_new_tokens, "sampling.temperature": temperature,
        "sampling.top_p": top_p, "sampling.top_k": top_k,
    }  # fmt: skip
    loaded = load_stage("generate", None, [*(f"{key}={value}" for key, value in short.items()), *ctx.obj])
    if problems:
        name = Path(checkpoint).resolve().name
        _run("generate", loaded, run_dir or f"runs/generate_{name}", False, checkpoint)
        return
    show = COMMANDS["generate"].target.replace(":main", ":show")
    run_handler(show, [loaded.config, checkpoint, prompt], loaded.config.parallel)


@define(
    app, "quickstart", "  phi4r quickstart\n  phi4r quickstart --run-dir runs/tp2 --parallel.tp 2 --seed 1"
)
def quickstart(
    ctx: typer.Context,
    run_dir: RunDirOption = "runs/quickstart",
    seed: SeedOption = "0",
    dry_run: DryRunOption = False,
) -> None:
    overrides = [f"seed={seed}", *ctx.obj]
    stages = load_pipeline("tiny", overrides)  # so that a wrong key ends the run before it begins
    if dry_run:
        from phi4r.commands import dryrun

        for name, loaded in stages.items():
            dryrun.show(loaded, Path(run_dir) / name)
        return
    from phi4r.core.lock import run_lock

    try:
        with run_lock(run_dir):
            main = find_target(COMMANDS["quickstart"].target)
            main(Path(run_dir), stages["sft"].config.seed, list(ctx.obj))
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"interrupted; `phi4r quickstart --run-dir {run_dir}` goes on from there"
        ) from None
