"""Nodes of the graph as text for remarks and reports, which outlive the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.remarks import NodeInfo


def describe(node: fx.Node, name: str = "") -> NodeInfo:
    """What made ``node``, its shape and dtype, and its own source line. ``name`` is what people know it by."""
    value = N.value(node)
    if not isinstance(value, torch.Tensor):
        return NodeInfo(_operator(node), name or node.name, source=N.source(node))
    shape = tuple(str(n) for n in N.shape(node))
    example = _example(value)
    return NodeInfo(
        _operator(node),
        name or node.name,
        shape,
        str(value.dtype).removeprefix("torch."),
        N.source(node),
        () if tuple(map(str, example)) == shape else example,
    )


def _operator(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return "parameter" if N.is_parameter(node) else "buffer"
    return N.op_name(node) or str(getattr(node.target, "__name__", node.target))


def _example(value: torch.Tensor) -> tuple[int, ...]:
    """The sizes that a captured tensor had in the example; empty when a size is known only at run time."""
    sizes: list[Any] = list(value.shape)
    symbolic = [n.node for n in sizes if isinstance(n, torch.SymInt)]
    return tuple(n.node.hint if isinstance(n, torch.SymInt) else n for n in sizes) if all(n.has_hint() for n in symbolic) else ()
