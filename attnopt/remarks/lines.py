"""Which line of a call stack to show: the innermost one that the reader of a remark can change or look up."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Frame(NamedTuple):
    """One entry of a call stack."""

    file: str
    line: int
    function: str


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_INSTALLED = re.compile(r"/(?:site|dist)-packages/([^/]+)")


def frames_of(text: str) -> list[Frame]:
    """The frames of a printed stack, outermost first."""
    return [Frame(file, int(line), function) for file, line, function in _FRAME.findall(text)]


def own_line(frames: Sequence[Frame]) -> str:
    """file:line of the innermost frame (``frames``: outermost first) of the model's own code; empty when there is none.

    The model's own code is that of the innermost ``forward`` and of every file that is not installed. A helper of another
    library (one that reshapes, say) is passed over for the line that calls it, and so is PyTorch, unless all is PyTorch's.
    """
    frames = [f for f in frames if not f.file.startswith("<eval_with_key>")]  # the code of a graph
    outside = [f for f in frames if "/torch/" not in f.file] or frames
    if not outside:
        return ""
    home = next((f for f in reversed(outside) if f.function == "forward"), outside[0])
    package = _package(home.file)
    own = [f for f in outside if _package(f.file) in ("", package)]
    return f"{own[-1].file}:{own[-1].line}"


def _package(file: str) -> str:
    """The installed package that a file is of; empty for what is not installed."""
    found = _INSTALLED.search(file)
    return found[1] if found else ""
