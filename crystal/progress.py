"""What a long job shows on a terminal: one bar that fits the window, and text that prints as it stands.

Elsewhere (a file, a pipe, TERM=dumb) there is no bar: who reports says a line now and then instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

NARROW = 72  # columns below which numbers and elapsed time are left out, so that no line wraps


def has_bar(console: Console) -> bool:
    """Whether a bar can be drawn and redrawn there."""
    return console.is_terminal and not console.is_dumb_terminal


class Bar(Progress):
    """A progress bar with count, elapsed time and time left; `numbers` is a task's own text behind the count.

    The total may be None until it is known. What the columns are follows the width at each drawing, for a window
    may be resized.
    """

    def __init__(self, console: Console, transient: bool = False):
        what = TextColumn("{task.description}", markup=False)
        numbers = TextColumn("{task.fields[numbers]}", markup=False)
        left = TimeRemainingColumn(compact=True)
        self._narrow = (what, BarColumn(8), MofNCompleteColumn(), left)
        self._wide = (what, BarColumn(20), MofNCompleteColumn(), numbers, TimeElapsedColumn(), left)
        self._screen = console  # drawn once before Progress has one
        super().__init__(*self._wide, console=console, transient=transient, disable=not has_bar(console))

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        self.columns = self._wide if self._screen.width >= NARROW else self._narrow
        return super().make_tasks_table(tasks)
