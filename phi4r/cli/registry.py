"""The commands of phi4r: what each is for, the module that defines it, the settings it takes and the function
that does it. Both modules are imported when the command runs, so that `phi4r --help` needs neither torch nor
rich."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand

from phi4r.core.errors import UserError


class Command(NamedTuple):
    """A command. stage: whose settings it takes ("*": all stages, "": only parallel.*, None: no settings are
    listed)."""

    help: str
    module: str
    stage: str | None
    target: str


STAGES, TOOLS, SLURM = "phi4r.cli.stages", "phi4r.cli.tools", "phi4r.cli.slurm"
COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "Run the whole pipeline on a tiny Phi-4 and write a report",
        STAGES,
        "*",
        "phi4r.commands.quickstart:main",
    ),
    "curate": Command(
        "Remove duplicates and leaks, keep the teachable problems", STAGES, "curate", "phi4r.curate.run:main"
    ),
    "plan": Command(
        "Which layouts fit a cluster, and how long a run takes", SLURM, None, "phi4r.plan.command:main"
    ),
    "data": Command("Packed, memory-mapped shards for training", TOOLS, None, "phi4r.data.build:main"),
    "sft": Command("Supervised fine-tuning on packed chat documents", STAGES, "sft", "phi4r.train.sft:main"),
    "rl": Command("GRPO: sample, verify, reward, step", STAGES, "rl", "phi4r.rl.train:main"),
    "serve": Command(
        "A vLLM server for an RL run whose trainer is on another node",
        SLURM,
        "rl",
        "phi4r.sampling.vllm.serve:main",
    ),
    "eval": Command(
        "Measure accuracy with intervals over problems and samples", STAGES, "eval", "phi4r.evaluate.run:main"
    ),
    "generate": Command(
        "Generate a response and stream it, or one per problem",
        STAGES,
        "generate",
        "phi4r.commands.generate:main",
    ),
    "score": Command("Log-probs of given token sequences", TOOLS, "", "phi4r.commands.score:main"),
    "convert": Command(
        "Convert between Hugging Face folders and phi4r checkpoints", TOOLS, "", "phi4r.convert.hf:main"
    ),
    "replay": Command(
        "Re-run the step at which a run gave up, row by row", TOOLS, "", "phi4r.commands.replay:main"
    ),
    "checkpoint": Command(
        "List, verify, remove and export checkpoints", "phi4r.cli.checkpoint", None, "phi4r.train.manage:ls"
    ),
    "verify": Command(
        "Check responses against gold answers", TOOLS, None, "phi4r.commands.verify:run_verify"
    ),
    "reward": Command(
        "Every part of the reward, for audits", TOOLS, None, "phi4r.commands.verify:run_reward"
    ),
    "rollouts": Command("Read the samples of an RL run", TOOLS, None, "phi4r.commands.rollouts:show"),
    "launch": Command("Submit a stage to SLURM, if it fits", SLURM, None, "phi4r.slurm.submit:main"),
    "status": Command("State, step, time left and restarts of a run", SLURM, None, "phi4r.slurm.status:main"),
    "logs": Command("What a rank of a run printed", SLURM, None, "phi4r.slurm.logs:main"),
    "merge": Command(
        "Put the parts of a job array's evaluation together", SLURM, None, "phi4r.evaluate.merge:main"
    ),
    "report": Command(
        "Draw a run: curves, utilisation, accuracy, on one page", TOOLS, None, "phi4r.evaluate.report:main"
    ),
    "profile": Command(
        "Where the time of an SFT step goes: a trace and a summary",
        TOOLS,
        "sft",
        "phi4r.commands.profile:main",
    ),
    "bench": Command(
        "Benchmark kernels, data and rollouts against alternatives", TOOLS, None, "phi4r.commands.bench:main"
    ),
    "doctor": Command(
        "What this machine has, and what would be used", TOOLS, None, "phi4r.commands.doctor:main"
    ),
}


class InterruptedRunError(Exception):
    """Ctrl-C; for a command that can be continued the message says how."""


class StageCommand(TyperCommand):
    """A command whose --help ends with the reference of its settings."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Usage, options, then every key with its type, default and meaning."""
        from phi4r.configs.reference import reference_text

        super().format_help(ctx, formatter)
        formatter.write(reference_text(COMMANDS[str(ctx.info_name)].stage or ""))


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
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run folder")]


def make_app(help: str = "") -> typer.Typer:
    """A group of commands, as all of ours are set up."""
    return typer.Typer(help=help, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


def define(app: typer.Typer, name: str, examples: str = "", **settings: Any) -> Any:
    """Register a command under its row of COMMANDS; one with settings gets them into its --help."""
    row = COMMANDS[name]
    cls = TyperCommand if row.stage is None else StageCommand
    text = row.help + "." + (f"\n\n\b\nExamples:\n{examples}" if examples else "")
    return app.command(name, cls=cls, help=text, short_help=row.help, **settings)


def options_of(cls: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of a dataclass that has a default: --the-field, with the text
    under it as help and its metadata (metavar, min) as typer's. The command takes them as keywords."""
    from phi4r.configs.schema import docs_of

    hints, docs = typing.get_type_hints(cls), docs_of(cls)
    options = {
        entry.name: inspect.Parameter(
            entry.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=entry.default,
            annotation=Annotated[
                hints[entry.name],
                typer.Option("--" + entry.name.replace("_", "-"), help=docs[entry.name], **entry.metadata),
            ],
        )
        for entry in dataclasses.fields(cls)
        if entry.default is not dataclasses.MISSING
    }

    def add(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True).parameters.values()
        kept = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters = [*kept, *options.values()]
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return function

    return add


def call(ctx: typer.Context, target: str, *arguments: Any, **options: Any) -> Any:
    """Call the function that a command without settings stands for."""
    from phi4r.parallel.launch import find_target

    if ctx.obj:
        raise UserError(f"`{ctx.command_path}` takes no settings, got --{ctx.obj[0]}")
    return find_target(target)(*arguments, **options)
