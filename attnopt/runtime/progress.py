"""A progress bar with live statistics, on standard error."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column

from attnopt.runtime.statistics import Statistics


class ProgressBar:
    """``total`` tokens may be generated; a request that ends early counts as whole. With ``transient`` the bar goes away at the end."""

    def __init__(self, total: int, console: Console | None = None, transient: bool = False) -> None:
        self._progress = Progress(
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TextColumn("{task.description}", table_column=Column(overflow="ellipsis", no_wrap=True, ratio=1)),
            console=console or Console(stderr=True),
            transient=transient,
            expand=True,
            # what is written to standard output while the bar stands goes above it on a terminal, and stays where it was sent elsewhere
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._progress.add_task("starting", total=total)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, done: int, statistics: Statistics) -> None:
        self._progress.update(self._task, completed=done, description=str(statistics))
