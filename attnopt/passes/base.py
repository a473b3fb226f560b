"""What a pass is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import fx

from attnopt.remarks import Remark
from attnopt.report import Site

Tier = Literal["exact", "approximate"]


@dataclass
class PassResult:
    """Whether the graph was changed, what was remarked, and the sites that the pass found (only one pass finds any)."""

    modified: bool
    remarks: list[Remark] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    """Buffers whose values became part of the graph."""


class Pass(Protocol):
    """A frozen dataclass whose fields are its options. ``run`` rewrites the module's graph in place."""

    @property
    def name(self) -> str:
        """In kebab-case, as ``--disable-pass`` takes it."""

    @property
    def tier(self) -> Tier:
        """``exact`` computes the same function up to rounding; ``approximate`` is only run when asked for."""

    def run(self, module: fx.GraphModule) -> PassResult: ...
