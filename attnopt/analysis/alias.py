"""Which values share memory, and which of them are written in place."""

from __future__ import annotations

import torch
from torch import fx

from attnopt.analysis import nodes as N

_MAY_ALIAS = {f"aten::{n}" for n in ("reshape", "contiguous", "to", "flatten", "type_as", "float", "expand_as", "_to_copy", "dropout")}
"""Composite operators that return their input itself, or a view, in some cases."""


def is_view(node: fx.Node) -> bool:
    """Whether the node's value may share memory with one of its inputs."""
    name = N.op_name(node)
    if name == "getitem":
        return is_view(node.args[0])  # type: ignore[arg-type]
    if name in _MAY_ALIAS:
        return True
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return any(r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns)


def _is_write(node: fx.Node) -> bool:
    target = node.target
    return node.op == "call_function" and isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def written(graph: fx.Graph) -> tuple[frozenset[fx.Node], frozenset[fx.Node]]:
    """Nodes whose memory is written in place: (all of them, those that are also read before the last write).

    The first must not be computed again from their inputs; the second must not even be read at another place.
    """
    root: dict[fx.Node, fx.Node] = {}
    order: dict[fx.Node, int] = {}
    for i, n in enumerate(graph.nodes):
        order[n] = i
        source = next((a for a in n.all_input_nodes if N.is_tensor(a)), None)
        root[n] = root[source] if source is not None and (is_view(n) or _is_write(n)) else n
    last: dict[fx.Node, int] = {}
    for n in graph.nodes:
        if _is_write(n) and n.all_input_nodes:
            last[root[n.all_input_nodes[0]]] = order[n]
    members = frozenset(n for n in graph.nodes if root[n] in last)
    unstable = {r for r in last for n in members if root[n] is r and any(not _is_write(u) and not is_view(u) and order[u] < last[r] for u in n.users)}
    return members, frozenset(n for n in members if root[n] in unstable)
