"""Which values of a graph are written in place, read off the operators' schemas."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node


def written(n: Node) -> list[Node]:
    """The operands that a node writes into."""
    if not isinstance(n.target, torch._ops.OpOverload) or not n.target._schema.is_mutable:
        return []
    pairs = zip(n.target._schema.arguments, n.args, strict=False)
    return [x for a, x in pairs if a.alias_info is not None and a.alias_info.is_write and isinstance(x, Node)]


def base(n: Node) -> Node:
    """The node whose memory ``n`` may be a view of; ``n`` itself when it has memory of its own."""
    while n.args and isinstance(n.args[0], Node):
        takes_part = n.target is operator.getitem or (isinstance(n.target, torch._ops.OpOverload) and n.target._schema.arguments[0].alias_info is not None)
        if not takes_part:
            return n
        n = n.args[0]
    return n


def written_bases(graph: Graph) -> set[Node]:
    """The nodes whose memory some node of the graph writes into."""
    return {base(x) for n in graph.nodes for x in written(n)}


def changing(graph: Graph) -> set[Node]:
    """The nodes whose value depends on when it is read: all views of memory that is written."""
    bases = written_bases(graph)
    return {n for n in graph.nodes if base(n) in bases} if bases else set()
