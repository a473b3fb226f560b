"""Lines of the user's code, read when they are to be shown."""

from __future__ import annotations

import linecache
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = 1
"""Lines shown before and after the one that is meant, unless they are empty."""


@dataclass(frozen=True)
class Quote:
    """A line of a file with its neighbours. ``first`` is the number of the first of ``lines``, ``number`` that of the one meant."""

    file: str
    number: int
    first: int
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The line itself."""
        return self.lines[self.number - self.first].strip()

    def shown(self) -> list[str]:
        """Each line with its number, the one meant marked."""
        width = len(str(self.first + len(self.lines) - 1))
        return [f"{'>' if i == self.number else ' '} {i:{width}} | {line}".rstrip() for i, line in enumerate(self.lines, self.first)]

    def to_dict(self) -> dict[str, Any]:
        return {"file": self.file, "line": self.number, "text": self.text, "first": self.first, "lines": list(self.lines)}


def quote(source: str) -> Quote | None:
    """The line that a ``file:line`` names, without common indentation; None where no such file or line can be read."""
    file, _, line = source.rpartition(":")
    if not file or not line.isdigit():
        return None
    linecache.checkcache(file)
    everything = linecache.getlines(file)
    number = int(line)
    if not 1 <= number <= len(everything):
        return None
    first, last = max(1, number - CONTEXT), min(len(everything), number + CONTEXT)
    while first < number and not everything[first - 1].strip():
        first += 1
    while last > number and not everything[last - 1].strip():
        last -= 1
    return Quote(file, number, first, tuple(textwrap.dedent("".join(everything[first - 1 : last])).splitlines()))


def shown_path(source: str) -> str:
    """A file:line, relative to the working folder when it lies below it, from the package on when it is an installed one."""
    path, _, line = source.rpartition(":")
    if "site-packages/" in path:
        return f"{path.rpartition('site-packages/')[2]}:{line}"
    here = str(Path.cwd()) + os.sep
    return source.removeprefix(here)
