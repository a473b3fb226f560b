"""Graphs inside a graph: the functions that operators such as a conditional or a loop run. What they hold is seen, and left."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis.site import AttentionSite, Rejection


def bodies(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Graph]]:
    """Each operator of ``graph`` that runs functions, with each of their graphs."""
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            for held in node.all_input_nodes:
                function = _attribute(graph, held)
                if isinstance(function, fx.GraphModule):
                    yield node, function.graph


def _attribute(graph: fx.Graph, node: fx.Node) -> object:
    found: object = graph.owning_module if node.op == "get_attr" else None
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found


def left_inside(found: AttentionSite | Rejection, call: fx.Node) -> Rejection:
    """What was found in a function that ``call`` runs, as missed for that reason, unless there is a nearer one."""
    if isinstance(found, Rejection):
        return found
    text = (
        f"the attention of {N.said(found.node)} stands in a function that {N.said(call)} runs; "
        "supported are attentions outside of such functions, and in those of torch.no_grad, of autocast that is switched off and of a checkpoint without context_fn."
    )
    return Rejection("AO213", text, found.node, found.node)
