"""The command line: `phi4r COMMAND ...`.

Exit codes: 0 done, 2 bad input (one line on stderr), 130 interrupted, 1 anything else (a traceback).
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import phi4r
from phi4r.cli.registry import COMMANDS, InterruptedRunError
from phi4r.core.errors import UserError

EPILOG = "Start with `phi4r quickstart`. `phi4r COMMAND --help` lists the settings of a command."


class CommandTable(TyperGroup):
    """The commands of `COMMANDS`; a command's module is imported when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, None where there is none."""
        row = COMMANDS.get(cmd_name)
        if row is None:
            return None
        return typer.main.get_group(importlib.import_module(row.module).app).commands[cmd_name]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The table's lines, which need no module."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, row.help) for name, row in COMMANDS.items()])


app = typer.Typer(
    name="phi4r",
    cls=CommandTable,
    help="phi4r: Phi-4-reasoning on megatron-core. curate -> SFT -> GRPO -> evaluate.",
    epilog=EPILOG,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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
