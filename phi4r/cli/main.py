"""The command line. One table says what a command is for and which function does it; that function's module
is imported when the command runs, so that `phi4r --help` needs neither torch nor rich.

Exit codes: 0 done, 2 bad input (one line on stderr), 130 interrupted, 1 anything else (a traceback).
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

import phi4r
from phi4r.cli.checkpoint import checkpoint_app, replay
from phi4r.cli.prepare import data_app, plan, profile
from phi4r.cli.slurm import launch, logs, merge, report, serve, status
from phi4r.commands.bench import ENTRIES
from phi4r.core.errors import UserError

if TYPE_CHECKING:
    from phi4r.configs.load import Loaded
    from phi4r.configs.sections import ParallelConfig


class Command(NamedTuple):
    """A command: one line of help, the stage whose keys it takes ("*": all stages, "": only parallel.*), its
    function."""

    help: str
    stage: str | None
    target: str


COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "Run the whole pipeline on a tiny Phi-4 and write a report", "*", "phi4r.commands.quickstart:main"
    ),
    "curate": Command(
        "Remove duplicates and leaks, keep the teachable problems", "curate", "phi4r.curate.run:main"
    ),
    "plan": Command("Which layouts fit a cluster, and how long a run takes", None, "phi4r.plan.command:main"),
    "data": Command("Packed, memory-mapped shards for training", None, "phi4r.data.build:main"),
    "sft": Command("Supervised fine-tuning on packed chat documents", "sft", "phi4r.train.sft:main"),
    "rl": Command("GRPO: sample, verify, reward, step", "rl", "phi4r.rl.train:main"),
    "serve": Command(
        "A vLLM server for an RL run whose trainer is on another node", "rl", "phi4r.sampling.vllm.serve:main"
    ),
    "eval": Command(
        "Measure accuracy with intervals over problems and samples", "eval", "phi4r.evaluate.run:main"
    ),
    "generate": Command(
        "Generate a response and stream it, or one per problem",
        "generate",
        "phi4r.commands.generate:main",
    ),
    "score": Command("Log-probs of given token sequences", "", "phi4r.commands.score:main"),
    "convert": Command(
        "Convert between Hugging Face folders and phi4r checkpoints", "", "phi4r.convert.hf:main"
    ),
    "replay": Command(
        "Do the step at which a run gave up again, row by row", "", "phi4r.commands.replay:main"
    ),
    "checkpoint": Command("List, verify, remove and export checkpoints", None, "phi4r.train.manage:ls"),
    "verify": Command("Check responses against gold answers", None, "phi4r.commands.verify:run_verify"),
    "reward": Command("Every part of the reward, for audits", None, "phi4r.commands.verify:run_reward"),
    "show": Command("Read the samples of an RL run", None, "phi4r.commands.rollouts:show"),
    "launch": Command("Submit a stage to SLURM, if it fits", None, "phi4r.slurm.submit:main"),
    "status": Command("State, step, time left and restarts of a run", None, "phi4r.slurm.status:main"),
    "logs": Command("What a rank of a run printed", None, "phi4r.slurm.logs:main"),
    "merge": Command("Put the parts of a job array's evaluation together", None, "phi4r.evaluate.merge:main"),
    "report": Command(
        "Draw a run: curves, utilisation, accuracy, on one page", None, "phi4r.evaluate.report:main"
    ),
    "profile": Command(
        "Where the time of an SFT step goes: a trace and a summary", "sft", "phi4r.commands.profile:main"
    ),
    "bench": Command("Measure speed beside what one would use instead", None, "phi4r.commands.bench:main"),
    "doctor": Command("What this machine has, and what would be used", None, "phi4r.commands.doctor:main"),
}

EPILOG = "Start with `phi4r quickstart`. `phi4r COMMAND --help` lists the settings of a command."


class InterruptedRunError(Exception):
    """Ctrl-C; for a command that can be continued the message says how."""


class OrderedGroup(TyperGroup):
    """Commands in the table's order."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The table's names, `show` under its group's name."""
        return ["rollouts" if name == "show" else name for name in COMMANDS]


class StageCommand(TyperCommand):
    """A command whose --help goes on with the reference of its configuration keys."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Usage, options, then every key with its type, default and meaning."""
        from phi4r.configs.reference import reference_text

        super().format_help(ctx, formatter)
        text = reference_text(COMMANDS[str(ctx.info_name)].stage or "")
        formatter.write(text)


app = typer.Typer(
    name="phi4r",
    cls=OrderedGroup,
    help="phi4r: Phi-4-reasoning on megatron-core. curate -> SFT -> GRPO -> evaluate.",
    epilog=EPILOG,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
rollouts_app = typer.Typer(help="Read the samples of an RL run", rich_markup_mode=None)

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="tiny, phi4_sft, phi4_grpo; a .toml file; or an earlier run's folder"
    ),
]
RunDirOption = Annotated[
    str, typer.Option("--run-dir", metavar="D", help="Run folder; the same one continues (default: runs/...)")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved settings and the plan; do nothing")
]
SeedOption = Annotated[str, typer.Option("--seed", metavar="N", help="Seed of every random choice")]
OnBadRowOption = Annotated[
    str, typer.Option("--on-bad-row", metavar="stop|skip", help="What to do with a malformed input row")
]
InputArgument = Annotated[str, typer.Argument(metavar="IN.jsonl", help="Input, a JSON object a line")]
OutputArgument = Annotated[str, typer.Argument(metavar="OUT.jsonl", help="Output, a line per input line")]
CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="phi4r checkpoint, run folder or Hugging Face folder")
]


def _command(name: str, examples: str = "", **settings: Any) -> Any:
    """Register a command under its table entry; the ones with configuration keys get them into their
    --help."""
    row = COMMANDS[name]
    cls = StageCommand if row.stage is not None else TyperCommand
    text = row.help + "." + (f"\n\n\b\nExamples:\n{examples}" if examples else "")
    return app.command(name, cls=cls, help=text, short_help=row.help, **settings)


# --- stages


def _stage_overrides(ctx: typer.Context, stage: str, seed: str, on_bad_row: str) -> list[str]:
    """Dotted overrides plus the two that have short names."""
    section = "data" if stage == "sft" else "problems"
    short = [f"seed={seed}"] if seed else []
    short += [f"{section}.on_bad_row={on_bad_row}"] if on_bad_row else []
    return [*short, *ctx.obj]


def _run_stage(stage: str, loaded: Loaded, run_dir: str, dry_run: bool, *arguments: Any) -> None:
    """Show the plan, or write config.json and run the stage's function on its ranks: main(config, *arguments,
    run_dir)."""
    folder = Path(run_dir or f"runs/{stage}_{loaded.recipe.name}")
    if dry_run:
        from phi4r.commands import dryrun

        dryrun.show(loaded, folder)
        return
    from phi4r.configs.load import prepare_run_dir
    from phi4r.core.console import is_main_rank, say
    from phi4r.core.lock import run_lock
    from phi4r.parallel.attempt import attempt
    from phi4r.parallel.launch import find_target, run_handler

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


@_command("sft", _SFT_EXAMPLES)
def sft(
    ctx: typer.Context,
    recipe: RecipeArgument,
    run_dir: RunDirOption = "",
    seed: SeedOption = "",
    on_bad_row: OnBadRowOption = "",
    dry_run: DryRunOption = False,
) -> None:
    from phi4r.configs.load import load_stage

    loaded = load_stage("sft", recipe, _stage_overrides(ctx, "sft", seed, on_bad_row))
    _run_stage("sft", loaded, run_dir, dry_run)


@_command("rl", _RL_EXAMPLES)
def rl(
    ctx: typer.Context,
    recipe: RecipeArgument,
    run_dir: RunDirOption = "",
    seed: SeedOption = "",
    on_bad_row: OnBadRowOption = "",
    dry_run: DryRunOption = False,
    explain: Annotated[bool, typer.Option("--explain", help="Print the objective as formulas")] = False,
) -> None:
    from phi4r.configs.load import load_stage
    from phi4r.parallel.launch import find_target

    loaded = load_stage("rl", recipe, _stage_overrides(ctx, "rl", seed, on_bad_row))
    if explain:
        find_target("phi4r.rl.explain:main")(loaded.config)
        return
    _run_stage("rl", loaded, run_dir, dry_run)


@_command("curate", "  phi4r curate tiny --run-dir runs/curate --curate.checkpoint runs/sft")
def curate(
    ctx: typer.Context,
    recipe: RecipeArgument,
    run_dir: RunDirOption = "",
    seed: SeedOption = "",
    on_bad_row: OnBadRowOption = "",
    dry_run: DryRunOption = False,
) -> None:
    from phi4r.configs.load import load_stage

    loaded = load_stage("curate", recipe, _stage_overrides(ctx, "curate", seed, on_bad_row))
    _run_stage("curate", loaded, run_dir, dry_run)


_EVAL_EXAMPLES = """\
  phi4r eval runs/rl modchain --run-dir runs/eval --runs 8
  phi4r eval runs/rl modchain --run-dir runs/eval --eval.compare runs/sft
  phi4r eval runs/rl problems.jsonl --run-dir runs/eval --runs 50"""


@_command("eval", _EVAL_EXAMPLES)
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
    from phi4r.configs.load import load_stage

    short = [f"eval.runs={runs}"] if runs else []
    if task and (Path(task).exists() or Path(task).suffix in (".jsonl", ".parquet")):
        short += [f"problems.path={task}", "problems.task=math"]
    elif task:
        short.append(f"problems.task={task}")
    loaded = load_stage("eval", recipe or None, [*short, *_stage_overrides(ctx, "eval", seed, on_bad_row)])
    name = Path(checkpoint).resolve().name
    _run_stage("eval", loaded, run_dir or f"runs/eval_{name}", dry_run, checkpoint)


@_command("quickstart", "  phi4r quickstart\n  phi4r quickstart --run-dir runs/tp2 --parallel.tp 2 --seed 1")
def quickstart(
    ctx: typer.Context,
    run_dir: RunDirOption = "runs/quickstart",
    seed: SeedOption = "0",
    dry_run: DryRunOption = False,
) -> None:
    from phi4r.configs.load import load_pipeline

    overrides = [f"seed={seed}", *ctx.obj]
    stages = load_pipeline("tiny", overrides)  # so that a wrong key ends the run before it begins
    if dry_run:
        from phi4r.commands import dryrun

        for name, loaded in stages.items():
            dryrun.show(loaded, Path(run_dir) / name)
        return
    from phi4r.core.lock import run_lock
    from phi4r.parallel.launch import find_target

    try:
        with run_lock(run_dir):
            quickstart = find_target(COMMANDS["quickstart"].target)
            quickstart(Path(run_dir), stages["sft"].config.seed, list(ctx.obj))
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"interrupted; `phi4r quickstart --run-dir {run_dir}` goes on from there"
        ) from None


# --- tools


def _parallel(ctx: typer.Context) -> ParallelConfig:
    from phi4r.configs.load import load_parallel

    return load_parallel(ctx.obj)


def _no_overrides(ctx: typer.Context) -> None:
    if ctx.obj:
        raise UserError(f"`phi4r {ctx.info_name}` takes no settings, got --{ctx.obj[0]}")


_GENERATE_EXAMPLES = """\
  phi4r generate runs/rl --prompt "7*9-6="
  phi4r generate runs/rl --problems problems.jsonl --samples 4 --run-dir runs/answers --sampling.engine vllm
  phi4r generate teacher --problems problems.jsonl --run-dir runs/traces --sampling.engine openai \\
      --sampling.url http://node7:8000/v1 --sampling.model teacher"""


@_command("generate", _GENERATE_EXAMPLES)
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
    from phi4r.configs.load import load_stage
    from phi4r.parallel.launch import run_handler

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
        _run_stage("generate", loaded, run_dir or f"runs/generate_{name}", False, checkpoint)
        return
    show = COMMANDS["generate"].target.replace(":main", ":show")
    run_handler(show, [loaded.config, checkpoint, prompt], loaded.config.parallel)


@_command("score", "  phi4r score runs/sft in.jsonl out.jsonl --parallel.tp 2")
def score(
    ctx: typer.Context, checkpoint: CheckpointArgument, input: InputArgument, output: OutputArgument
) -> None:
    """{"tokens": [n ids]} -> {"logprobs": [n - 1 floats]}."""
    from phi4r.parallel.launch import run_handler

    parallel = _parallel(ctx)
    run_handler(COMMANDS["score"].target, [checkpoint, Path(input), Path(output), parallel], parallel)


_CONVERT_EXAMPLES = """\
  phi4r convert hf-to-phi4r HF_FOLDER checkpoints/phi-4
  phi4r convert phi4r-to-hf runs/sft HF_FOLDER"""


@_command("convert", _CONVERT_EXAMPLES)
def convert(
    ctx: typer.Context,
    direction: Annotated[str, typer.Argument(metavar="hf-to-phi4r|phi4r-to-hf")],
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder to read")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="Folder to write")],
) -> None:
    from phi4r.parallel.launch import find_target

    if direction not in ("hf-to-phi4r", "phi4r-to-hf"):
        raise UserError(f"convert: expected hf-to-phi4r or phi4r-to-hf, got {direction!r}")
    parallel = _parallel(ctx)
    # No ranks: a checkpoint has no layout in it, so the layout is only checked.
    find_target(COMMANDS["convert"].target)(direction, Path(source), Path(destination), parallel)


_command(
    "plan",
    "  phi4r plan phi4_sft --nodes 4 --gpu h100\n  phi4r plan phi4_grpo --nodes 16 --response-tokens 8000",
)(plan)
_command("profile", "  phi4r profile tiny --run-dir runs/profile --steps 3 --parallel.tp 2")(profile)
_command(
    "launch",
    "  phi4r launch sft phi4_sft --nodes 4 --time 24:00:00 --run-dir /shared/runs/sft --dry-run\n"
    "  phi4r launch rl phi4_grpo --nodes 4 --rollout-nodes 2 --servers-per-node 4 --run-dir /shared/runs/rl\n"
    "  phi4r launch eval /shared/runs/rl modchain --array 10 --runs 5 --run-dir /shared/runs/eval",
)(launch)
_command(
    "serve", "  phi4r serve phi4_grpo --run-dir /shared/runs/rl --vllm.options='--tensor-parallel-size 2'"
)(serve)
_command("status", "  phi4r status\n  phi4r status /shared/runs/sft")(status)
_command("logs", "  phi4r logs /shared/runs/sft -f\n  phi4r logs /shared/runs/sft --rank 17")(logs)
_command("merge", "  phi4r merge /shared/runs/eval")(merge)
_command("report", "  phi4r report runs/rl")(report)
_command("replay", "  phi4r replay runs/sft --parallel.dp 2")(replay)
app.add_typer(data_app, name="data", short_help=COMMANDS["data"].help)
app.add_typer(checkpoint_app, name="checkpoint", short_help=COMMANDS["checkpoint"].help)


@_command("verify")
def verify(
    ctx: typer.Context,
    input: InputArgument,
    output: OutputArgument,
    on_bad_row: OnBadRowOption = "stop",
    audit: Annotated[
        bool, typer.Option("--audit", help="Check each answer by a second, independent method too")
    ] = False,
) -> None:
    from phi4r.core.console import say
    from phi4r.parallel.launch import find_target

    _no_overrides(ctx)
    run = find_target(COMMANDS["verify"].target)
    report = run(Path(input), Path(output), on_bad_row=_checked(on_bad_row), audit=audit)
    say(f"verify: {report.summary()}")


@_command("reward")
def reward(
    ctx: typer.Context, input: InputArgument, output: OutputArgument, on_bad_row: OnBadRowOption = "stop"
) -> None:
    from phi4r.core.console import say
    from phi4r.parallel.launch import find_target

    _no_overrides(ctx)
    run = find_target(COMMANDS["reward"].target)
    say(f"reward: {run(Path(input), Path(output), on_bad_row=_checked(on_bad_row)).summary()}")


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
    from phi4r.parallel.launch import find_target

    _no_overrides(ctx)
    show = find_target(COMMANDS["show"].target)
    show(
        run_dir,
        step=step,
        problem=problem,
        outcome=outcome,
        limit=limit,
        sort=sort,
        full=full,
        as_json=as_json,
    )


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
    from phi4r.parallel.launch import find_target

    _no_overrides(ctx)
    find_target("phi4r.rl.audit:show_audit")(Path(run_dir), limit=limit, seed=seed, as_json=as_json)


app.add_typer(rollouts_app, name="rollouts", short_help=COMMANDS["show"].help)


_BENCH_EXAMPLES = """\
  phi4r bench attention --tokens 32768 --mixes dense lognormal
  phi4r bench data --help
  phi4r bench plot attention"""
# Everything after the entry is the entry's own, --help included.
_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}


@_command("bench", _BENCH_EXAMPLES, context_settings=_PASS_ON)
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
    from phi4r.parallel.launch import find_target

    _no_overrides(ctx)
    raise typer.Exit(find_target(COMMANDS["bench"].target)(entry, ctx.args))


@_command("doctor")
def doctor(ctx: typer.Context) -> None:
    from phi4r.parallel.launch import find_target

    _no_overrides(ctx)
    find_target(COMMANDS["doctor"].target)()


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version")] = False) -> None:
    if version:
        typer.echo(f"phi4r {phi4r.__version__}")
        raise typer.Exit


# --- entry point


# typer carries its own copy of click; this is the ancestor of everything it raises about a command line.
_USAGE_ERROR: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def _run(words: Sequence[str]) -> int:
    overrides: list[str] = []
    rest = list(words) or ["--help"]
    if any(word.startswith("--") and "." in word for word in words):
        from phi4r.configs.load import split_overrides

        rest, overrides = split_overrides(words)
    try:
        code = app(rest, prog_name="phi4r", standalone_mode=False, obj=overrides)
    except _USAGE_ERROR as error:
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        raise UserError(error.format_message() + hint) from None
    except typer.Abort:
        raise InterruptedRunError("interrupted") from None
    if code == 130:  # how typer passes on a Ctrl-C that no stage has put into words
        raise InterruptedRunError("interrupted")
    return code if isinstance(code, int) else 0


def _flush_output() -> bool:
    """Whether whoever reads our output has got all of it. If they have gone away, Python's own flush at the
    end must not complain either. (typer sees to output that does not fit into the buffer.)"""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code; the one place where errors become messages."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    name = "phi4r" if rank == "0" else f"phi4r (rank {rank})"
    try:
        code = _run(sys.argv[1:] if words is None else words)
        code = code if _flush_output() else 1
    except UserError as error:
        _flush_output()
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except (InterruptedRunError, KeyboardInterrupt) as error:
        print(f"{name}: {str(error) or 'interrupted'}", file=sys.stderr)
        code = 130
    except Exception as error:  # noqa: BLE001  (anything else is our bug: show it whole, exit 1)
        if type(error).__name__ == "RankError":
            print(f"{name}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
