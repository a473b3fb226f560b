"""Projections that read the same input on their way to an attention become one operator.

``attnopt::merged_linear`` computes them as one matrix product where their weights lie back to back in memory, and one by
one where they do not; parameters stay what and where they were. See docs/decisions/0007-merged-projections.md.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis import views
from attnopt.ir import expr as E
from attnopt.kernels import linear as _linear  # registers attnopt::merged_linear
from attnopt.passes.attention_nodes import attentions
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.edit import Editor

assert _linear is not None


@dataclass(frozen=True)
class _Projection:
    """``node = x @ weight.T + bias``, with weight and bias as they stand in the module."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


@dataclass(frozen=True)
class MergeProjections:
    """``devices``: where to merge. On a CPU one wide product was measured to be no faster than several narrow ones."""

    devices: tuple[str, ...] = ("cuda",)
    name: str = "merge-projections"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        result = PassResult(False)
        found = _projections(module.graph)
        groups: dict[tuple[Any, ...], list[_Projection]] = {}
        for node in module.graph.nodes:
            p = _projection(node) if node in found else None
            if p is not None and N.value(p.weight).device.type in self.devices:
                groups.setdefault((p.x, N.value(p.weight).dtype, N.value(p.weight).device), []).append(p)
        for group in groups.values():
            if len({str(p.weight.target) for p in group}) == len(group) > 1:
                _merge(module.graph, group)
                result.modified = True
        return result


def merged(graph: fx.Graph) -> tuple[tuple[str, ...], ...]:
    """The names of weights, and of biases, that would be computed together if they lay back to back."""
    found: list[tuple[str, ...]] = []
    for node in graph.nodes:
        if node.target is torch.ops.attnopt.merged_linear.default:
            for group in node.args[1:3]:
                if all(isinstance(g, fx.Node) and g.op == "get_attr" for g in group):
                    found.append(tuple(str(g.target) for g in group))
    return tuple(dict.fromkeys(found))


def _projections(graph: fx.Graph) -> set[fx.Node]:
    """Projections that lead to an attention's q, k or v with at most one other between, as low-rank ones do."""
    near = _behind(x for a in attentions(graph) for x in a.args[:3] if isinstance(x, fx.Node))
    return near | _behind(p.x for n in near if (p := _projection(n)) is not None)


def _behind(starts: Iterable[fx.Node]) -> set[fx.Node]:
    """The nearest projections above some nodes."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = list(starts)
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if _projection(n) is not None:
            found.add(n)
        elif n.target is not torch.ops.attnopt.attention.default:
            stack += n.all_input_nodes
    return found


def _projection(node: fx.Node) -> _Projection | None:
    """A linear layer, or a product with a transposed weight."""
    name, args = N.op_name(node), N.arguments(node)
    if name == "aten::linear":
        x, weight, bias = args["input"], args["weight"], args["bias"]
    elif name in ("aten::matmul", "aten::mm") and N.is_tensor(args["self"]):
        x, weight, bias = args["self"], _transposed(args["mat2" if name == "aten::mm" else "other"]), None
    else:
        return None
    held = [w for w in (weight, bias) if w is not None]
    if weight is None or not isinstance(x, fx.Node) or any(w.op != "get_attr" for w in held) or len(N.shape(weight)) != 2:
        return None
    return _Projection(node, x, weight, bias)


def _transposed(node: fx.Node) -> fx.Node | None:
    """The matrix that ``node`` is the transpose of."""
    if len(N.shape(node)) != 2:
        return None
    rows, columns = (E.var(name, n) for name, n in zip("ij", N.shape(node), strict=True))
    at: tuple[fx.Node, views.Index] = (node, (rows, columns))
    while (moved := views.step(*at)) is not None:
        at = moved
    return at[0] if at[1] == (columns, rows) else None


def _merge(graph: fx.Graph, group: list[_Projection]) -> None:
    edit = Editor(graph, group[0].node)

    def here(held: fx.Node) -> fx.Node:
        with graph.inserting_before(edit.anchor):
            new: fx.Node = graph.get_attr(str(held.target))
        new.meta = dict(held.meta)
        return new

    weights = [here(p.weight) for p in group]
    biases = [None if p.bias is None else here(p.bias) for p in group]
    whole = edit.call(torch.ops.attnopt.merged_linear.default, group[0].x, weights, biases)
    parts = [edit.call(operator.getitem, whole, i) for i in range(len(group))]
    for p, part in zip(group, parts, strict=True):
        part.meta = {**p.node.meta, "val": part.meta["val"]}
        p.node.replace_all_uses_with(part)
        name = p.node.name
        graph.erase_node(p.node)
        part.name = name  # the same value under the same name, so that what reads it is compared with the original alone
