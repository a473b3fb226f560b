"""A graph cut at the operators that a compiler must not look into, and what lies between compiled piece by piece.

Between two attentions of a decoder lie some forty small operations, which a compiler makes a few kernels of. The operators of the cache themselves stay outside: one
writes to tensors that are gigabytes large, and a compiler that is not sure of that copies them. Pieces that are alike, as those of a model's layers are, are compiled
once: their weights are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

OUTSIDE = (torch.ops.attnopt.cache_write.default, torch.ops.attnopt.paged_attention.default)
Compiler = Callable[[fx.GraphModule], Callable[..., Any]]


def in_pieces(gm: fx.GraphModule, compiler: Compiler) -> fx.GraphModule:
    """The same function, whose stretches between the operators ``OUTSIDE`` are what ``compiler`` makes of them. ``gm`` stays as it is; weights are looked up as before."""
    outer = fx.Graph()
    table: dict[fx.Node, fx.Node] = {}
    made: dict[str, Callable[..., Any]] = {}
    stretch: list[fx.Node] = []

    def flush() -> None:
        if stretch:
            _piece(outer, stretch, table, made, compiler)
            stretch.clear()

    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target not in OUTSIDE:
            stretch.append(node)
            continue
        if node.op not in ("placeholder", "get_attr"):
            flush()
        if node.op == "output":
            outer.output(fx.node.map_arg(node.args[0], table.__getitem__))
        else:
            table[node] = outer.node_copy(node, table.__getitem__)
    found = fx.GraphModule(gm, outer)
    found.training = gm.training
    return found


def _piece(outer: fx.Graph, nodes: Sequence[fx.Node], table: dict[fx.Node, fx.Node], made: dict[str, Callable[..., Any]], compiler: Compiler) -> None:
    """Put a call in place of ``nodes``. Names inside say nothing of the layer, so that pieces alike have the same text."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(x for n in nodes for x in n.all_input_nodes if x not in inside))
    outputs = [n for n in nodes if any(u not in inside for u in n.users)]
    graph = fx.Graph()
    names = {x: graph.placeholder(f"x{i}") for i, x in enumerate(inputs)}
    for i, n in enumerate(nodes):
        args: Any = fx.node.map_arg(n.args, names.__getitem__)
        kwargs: Any = fx.node.map_arg(n.kwargs, names.__getitem__)
        names[n] = graph.create_node("call_function", n.target, args, kwargs, name=f"y{i}")
    graph.output(tuple(names[n] for n in outputs))
    inner = fx.GraphModule({}, graph)
    function = made.get(inner.code)
    if function is None:
        function = made[inner.code] = _named(compiler(inner), f"piece_{len(made)}")
    call = outer.call_function(function, tuple(table[x] for x in inputs))
    for i, n in enumerate(outputs):
        table[n] = outer.call_function(_item, (call, i))


def _item(values: tuple[Any, ...], i: int) -> Any:
    return values[i]


def _named(f: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A plain function, since generated code calls it by a name."""

    def piece(*args: Any) -> Any:
        return f(*args)

    piece.__name__ = piece.__qualname__ = name
    return piece
