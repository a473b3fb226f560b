"""Reading and changing raised attention nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec


def attentions(graph: fx.Graph) -> Iterator[fx.Node]:
    """Every ``attnopt::attention`` node, in graph order."""
    for n in list(graph.nodes):
        if n.op == "call_function" and n.target is torch.ops.attnopt.attention.default:
            yield n


def spec_of(node: fx.Node) -> AttentionSpec:
    return AttentionSpec.from_json(str(node.args[5]))


def tensors_read(node: fx.Node, program: Expr, place: Mapping[fx.Node, int]) -> tuple[tuple[fx.Node, ...], dict[int, int]]:
    """The tensors that a program of ``node``'s spec reads, and by its load slots which of them: in the graph's order (``place``), in which attentions that number
    their tensors differently still agree."""
    loads: Any = node.args[3]
    read = {x.value for x in program.leaves if x.op == "load" and isinstance(x.value, int)}
    order = sorted({loads[i] for i in read}, key=place.__getitem__)
    return tuple(order), {i: order.index(loads[i]) for i in read}


def size_nodes(node: fx.Node) -> dict[str, Any]:
    """What ``node`` is given for each of its spec's ``sizes``, by name."""
    given: Any = node.args[4]
    return dict(zip(spec_of(node).sizes, given, strict=True))
