"""What goes on while one waits: a line with a bar on standard error, and nothing where that is no terminal."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Stages:
    """Called as ``stages("comparing: ragged padding", 3, 12)``: what stands before the colon is the stage, a line of its own.

    A stage without a total only shows that it runs.
    """

    def __init__(self, console: Console) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeElapsedColumn())
        self._progress = Progress(
            *columns,
            console=console,
            transient=True,
            disable=not console.is_terminal,
            # standard output that goes elsewhere is not drawn into; capture puts a stream of its own in the place of standard error, and the bar must not see itself in it
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=False,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, text: str, done: int = 0, total: int = 0) -> None:
        stage = text.partition(":")[0]
        if stage not in self._tasks:
            for task in self._tasks.values():  # a new stage begins when the last has ended
                known = self._progress.tasks[task].total or 1
                self._progress.update(task, total=known, completed=known)
            self._tasks[stage] = self._progress.add_task(stage, total=None, count="")
        self._progress.update(self._tasks[stage], description=text, total=total or None, completed=done, count=f"{done}/{total}" if total else "")
