"""What the user sees: lines, tables, a bar that moves. Progress goes to stderr, so that stdout holds results alone."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from common.schemas import TaskView

STILL_S = 10.0  # without a terminal, a wait is mentioned again this often
CLEAR_LINE = "\r\x1b[2K"


class Lines:
    """Tells what goes on, a line each; on a terminal the last one counts the seconds of a wait."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._waiting = ""
        self._since = 0.0  # time.monotonic()
        self._mentioned = 0.0  # seconds of the wait that the last line told

    def say(self, text: str) -> None:
        """Show a line."""
        self.clear()
        self._echo(text + "\n")

    def waiting(self, text: str) -> None:
        """Show what is being waited for; to be called again and again while it lasts."""
        now = time.monotonic()
        if text != self._waiting:
            self.clear()
            self._waiting, self._since, self._mentioned = text, now, -STILL_S
        waited_s = now - self._since
        line = f"Waiting: {text} …" + (f" {waited_s:.0f} s" if waited_s >= 1 else "")
        if self._live:
            self._echo(f"{CLEAR_LINE}{line}")
        elif waited_s - self._mentioned >= STILL_S:
            self._mentioned = waited_s
            self._echo(line + "\n")

    def clear(self) -> None:
        """Take back the line of a wait."""
        if self._live and self._waiting:
            self._echo(CLEAR_LINE)
        self._waiting = ""

    def _echo(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone, and whoever speaks has still to clean up
            click.echo(text, err=True, nl=False)


class TaskProgress:
    """A task's progress: a bar on a terminal, otherwise a line whenever something has changed."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._bar: Progress | None = None
        self._row: TaskID | None = None
        self._said = ""

    def __enter__(self) -> Self:
        if self._live:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} steps", markup=False),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._row = self._bar.add_task("submitted", total=1)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, view: TaskView) -> None:
        """Show a status."""
        text = str(view.status)
        if view.position:
            text += f", {view.position} ahead"
        if self._bar and self._row is not None:
            total = max(1, view.progress.steps)
            self._bar.update(self._row, description=text, completed=view.progress.step, total=total)
            return
        if view.status == "running":
            text += f", step {view.progress.step} of {view.progress.steps}"
        if text != self._said:
            click.echo(text, err=True)
            self._said = text


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print aligned columns to stdout, never cut or wrapped, so that they can be piped on."""
    from rich.cells import cell_len

    cells = [list(header), *([("-" if cell in (None, "") else str(cell)) for cell in row] for row in rows)]
    widths = [max(cell_len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def seconds(value: float | None) -> str | None:
    """Return a duration as people say it: 0.4 s, 12 s, 3 min, 2.5 h."""
    if value is None:
        return None
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
