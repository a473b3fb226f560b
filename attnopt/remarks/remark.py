"""One remark, and the node of the graph that it is about, in words that outlive the graph."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from attnopt.remarks.analysis import ANALYSIS
from attnopt.remarks.applied import APPLIED
from attnopt.remarks.errors import ERRORS
from attnopt.remarks.missed import MISSED
from attnopt.remarks.page import Page
from attnopt.remarks.serving import SERVING

Level = Literal["applied", "missed", "analysis", "error"]
_LEVELS: dict[str, Level] = {"1": "applied", "2": "missed", "3": "analysis", "9": "error"}

PAGES: dict[str, Page] = {**APPLIED, **MISSED, **SERVING, **ANALYSIS, **ERRORS}
"""Every code that can be printed."""

NOT_ATTENTION = frozenset({"AO201", "AO202", "AO211"})
"""Codes that say of a softmax that it is no attention: a classifier's, a router's. Nothing was missed there."""


@dataclass(frozen=True)
class NodeInfo:
    """A node of the captured graph as text: which operator made it, of what shape and dtype, and on which line."""

    operator: str
    """``aten::matmul`` and so on; ``input``, ``parameter`` or ``buffer`` for what the graph was given."""
    name: str
    """Its name in the graph."""
    shape: tuple[str, ...] = ()
    """Sizes, those that vary by the name of their symbol."""
    dtype: str = ""
    """``float32`` and so on; empty for what is no tensor."""
    source: str = ""
    """file:line of the user's code that made it, which often is another line than that of the softmax."""
    example: tuple[int, ...] = ()
    """Its sizes in the example that was captured; empty where they are not known, or are the shape."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: sizes are lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        tensor = f", {self.dtype}[{', '.join(self.shape)}]" if self.dtype else ""
        example = f", in the example [{', '.join(map(str, self.example))}]" if self.example else ""
        return f"{self.operator} {self.name!r}{tensor}{example}"


@dataclass(frozen=True)
class Remark:
    """One remark: a code of the table, a sentence with actual and supported values, where it stands, and a hint."""

    code: str
    message: str
    site: str = ""
    """Module path of the attention it is about; empty for the whole model."""
    source: str = ""
    """file:line in the user's code."""
    hint: str = ""
    """What to do here, where that is more than the code's page says."""
    node: NodeInfo | None = None
    """The offending node of the graph."""

    def __post_init__(self) -> None:
        if self.code not in PAGES:
            raise KeyError(f"{self.code} is not in the table of remarks")

    @property
    def level(self) -> Level:
        return _LEVELS[self.code[2]]

    @property
    def title(self) -> str:
        return PAGES[self.code].title

    @property
    def advice(self) -> str:
        """What to change: the remark's own hint, else that of its page."""
        return self.hint or PAGES[self.code].hint

    def to_dict(self) -> dict[str, Any]:
        node = None if self.node is None else self.node.to_dict()
        return {**asdict(self), "node": node, "level": self.level, "title": self.title}

    def __str__(self) -> str:
        where = f" [{self.site}]" if self.site else ""
        return f"{self.code}{where} {self.message}" + (f" ({self.advice})" if self.advice else "")
