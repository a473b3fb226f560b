"""What is known about one code, whatever model it is met in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """What ``attnopt explain CODE`` prints and ``docs/remarks/CODE.md`` holds."""

    title: str
    text: str
    """What it means."""
    cause: str
    """Why it is so: what attnopt cannot do here, or does."""
    hint: str
    """What to change; empty where nothing is to be done."""
    example: str
    """A whole script that ends with ``report = ...`` in which this code is. ``# <- here`` marks the line that it points to."""
    supported: str = ""
    """For what was missed: what would have been replaced."""
