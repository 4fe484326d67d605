"""What people see: one console on rank 0, a progress bar with ETA and metrics, tables.

On a terminal the bar is rich's; anywhere else (a log file, CI) there are plain lines with percent and ETA.
rich is imported when something is first shown.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def is_main_rank() -> bool:
    """Whether this process has the console: rank 0, or a process that is no rank at all."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


@functools.cache
def console() -> Console:
    """The console (stdout). Silent on ranks other than 0."""
    from rich.console import Console

    return Console(quiet=not is_main_rank(), highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line of plain text on rank 0: square brackets are not markup, long lines are not broken."""
    console().print(text, markup=False)


def format_value(value: object) -> str:
    """A metric for people: 4 significant digits, whole numbers with thousands separators."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """Seconds as 0:42, 3:05 or 1:02:07."""
    total = max(0, round(seconds))
    hours, minutes, rest = total // 3600, total // 60 % 60, total % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> Table:
    """A rich table; columns whose cells are all numbers are set flush right."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=title or None,
        caption=note or None,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_header=any(columns),
    )
    for position, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[position], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(format_value(cell)) for cell in row))
    return table


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> None:
    """Print a table on rank 0."""
    console().print(make_table(title, columns, rows, note), soft_wrap=False)


class Progress:
    """Progress over `total` steps with ETA and metrics, as a context manager.

    `start`: steps that were done before (a resumed run); they count for the percentage but not for the ETA.
    `every`: steps between the plain lines that replace the bar when the output is not a terminal; the first
    and last step always get one.
    """

    def __init__(self, description: str, total: int, start: int = 0, every: int = 1) -> None:
        self.description = description
        self.total = total
        self.start = start
        self.every = max(1, every)
        self.done = start
        self._began = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        if console().is_terminal and is_main_rank():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[clock]}"),
                TextColumn("{task.fields[metrics]}"),
                console=console(),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.description, total=self.total, completed=self.start, metrics="", clock=""
            )
        return self

    @property
    def eta_s(self) -> float | None:
        """Seconds left at this run's own pace; None before its first step."""
        own = self.done - self.start
        return None if own <= 0 else (time.monotonic() - self._began) / own * (self.total - self.done)

    def update(self, done: int, metrics: Mapping[str, object] | None = None) -> None:
        """`done` of `total` steps are finished; `metrics` are shown beside the bar in the order given."""
        self.done = done
        shown = "  ".join(f"{name} {format_value(value)}" for name, value in (metrics or {}).items())
        eta = "" if self.eta_s is None else f"ETA {format_seconds(self.eta_s)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, metrics=shown, clock=eta)
        elif done % self.every == 0 or done in (self.start + 1, self.total):
            percent = 100 * done // max(1, self.total)
            line = f"{self.description} {done}/{self.total} {percent}%  {shown}  {eta}"
            say(line.rstrip())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
