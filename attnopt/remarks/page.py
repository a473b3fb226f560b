"""What is known about one code, whatever model it is met in."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

HERE = "# <- here"
"""Marks the line of an example that the remark points to."""

_HEAD = """\
import torch
from torch import nn

import attnopt


"""


@dataclass(frozen=True)
class Page:
    """What ``attnopt explain CODE`` prints and ``docs/remarks/CODE.md`` holds."""

    title: str
    text: str
    """What it means."""
    cause: str
    """Why it is so: what attnopt does here, or cannot do."""
    hint: str
    """What to change; empty where nothing is to be done."""
    example: str
    """A whole script that leaves a ``report`` with this code, the line that it points to marked with ``HERE``."""
    supported: str = ""
    """For what was missed: what would have been replaced."""


def script(text: str, head: str = _HEAD) -> str:
    """A script from an indented text, with the imports in front that most of them need."""
    return head + textwrap.dedent(text).strip() + "\n"
