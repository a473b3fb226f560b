"""What the search for attentions returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx

from attnopt.ir.expr import Expr
from attnopt.ir.index import View
from attnopt.ir.spec import AttentionSpec

if TYPE_CHECKING:
    from attnopt.analysis.rotary import Rotation


@dataclass(frozen=True)
class Operand:
    """A tensor of the graph and the views that bring it to [B, H, S, D]."""

    node: fx.Node
    views: tuple[View, ...]


@dataclass
class AttentionSite:
    """One attention of a graph and what it computes."""

    node: fx.Node
    """The softmax or the existing call: where the site stands in the user's code."""
    output: fx.Node
    """The node whose value the attention computes."""
    output_views: tuple[View, ...]
    """Views from [B, Hq, Sq, Dv] to the shape of ``output``."""
    q: Operand
    k: Operand
    v: Operand
    loads: tuple[fx.Node, ...]
    """Tensors that the spec reads by index, by slot."""
    sizes: tuple[Expr, ...]
    """Symbolic sizes that the spec reads, in the order of ``spec.sizes``."""
    spec: AttentionSpec
    region: frozenset[fx.Node]
    """The nodes that the attention replaces."""
    folded: frozenset[fx.Node] = frozenset()
    """Buffers whose values became part of the spec."""
    rotations: tuple[Rotation | None, Rotation | None] = (None, None)
    """The rotary embeddings of q and k, where one was recognised: the operands before them, and by what they were turned."""
    name: str = field(default="", compare=False)
    source: str = field(default="", compare=False)


@dataclass
class Rejection:
    """A softmax or a call that is not rewritten, and why: a remark's code, a sentence, and the offending node."""

    code: str
    message: str
    at: fx.Node
    node: fx.Node
    name: str = ""
    source: str = ""
