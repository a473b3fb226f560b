"""The logits of a graph over packed tokens: those of the wanted rows alone, picked before the projection to the vocabulary."""

from __future__ import annotations

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis.layout import Refusal
from attnopt.analysis.rows import has_symbols, index_of
from attnopt.analysis.token_flow import TokenFlow
from attnopt.ir import expr as E
from attnopt.passes.edit import Editor, aten

_PER_TOKEN = {"aten::linear", "aten::to", "aten::matmul", "aten::layer_norm"}


def logits_of(flow: TokenFlow, graph: fx.Graph, place: int | None) -> fx.Node:
    """The result that holds a score of each word of the vocabulary for each token, or for the last one; raises Refusal where there is none, or several."""
    results = graph.output_node().args[0]
    leaves = list(results) if isinstance(results, (list, tuple)) else [results]
    nodes = [x for x in (leaves if place is None else [leaves[place]]) if isinstance(x, fx.Node) and N.is_tensor(x)]
    found = [x for x in dict.fromkeys(nodes) if x in flow.rows and N.kind(x) == "float" and _fits(flow, x)]
    if len(found) != 1:
        said = ", ".join(N.said(x) for x in nodes) or "no tensor"
        raise Refusal("AO217", f"the model's results are {said}; supported is one that holds logits [B, S, V] of all tokens, or [B, 1, V] or [B, V] of the last.", graph.output_node())
    return found[0]


def _fits(flow: TokenFlow, x: fx.Node) -> bool:
    index, row = index_of(x), flow.rows[x]
    if row.token is None or not N.shape(x)[-1].is_const or index[-1] in row.variables:
        return False
    if len(index) == 3 and row.token is E.add(E.mul(index[0], flow.S), index[1]):
        return True
    last = E.add(E.mul(index[0], flow.S), E.sub(flow.S, E.ONE))
    return row.token is last and all(n is E.ONE for n in N.shape(x)[1:-1])


def packed_logits(flow: TokenFlow, graph: fx.Graph, logits: fx.Node, places: list[fx.Node], rows: fx.Node) -> None:
    """Make logits [N, V] of the tokens that ``rows`` [N] names the only result. ``places`` is what ``last_places`` gave."""
    output = graph.output_node()
    result = logits
    if not places:
        below, reader = _lowest(flow, logits)
        picked = Editor(graph, reader or output).call(aten.index_select.default, below, 1, rows)
        if reader is None:
            result = picked
        else:
            reader.replace_input_with(below, picked)
        result = Editor(graph, output).call(aten.select.int, result, 0, 0)
    for node in places:
        # what follows has one row for each wanted token, in place of the batch
        x = _source(flow, node)
        edit = Editor(graph, node)
        new = edit.call(aten.index_select.default, edit.call(aten.select.int, x, 0, 0), 0, rows)
        if len(N.shape(node)) == len(N.shape(x)):
            new = edit.call(aten.unsqueeze.default, new, 1)
        node.replace_all_uses_with(new)
        if node is logits:
            result = new
    while len(N.shape(result)) > 2:
        result = Editor(graph, output).call(aten.select.int, result, 1, 0)
    output.args = (result,)


def _lowest(flow: TokenFlow, logits: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """How far up the rows can be picked: the value [B, S, ...] to pick of, and its reader; the reader is None for the logits themselves."""
    node, reader = logits, None
    while True:
        operands = [x for x in node.all_input_nodes if N.is_tensor(x)]
        moving = [x for x in operands if not flow.rows[x].is_static]
        pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
        if len(moving) != 1 or not (pointwise or N.op_name(node) in _PER_TOKEN) or len(operands) != len(node.all_input_nodes):
            return node, reader
        (x,) = moving
        if len(N.shape(x)) != 3 or N.shape(x)[:2] != N.shape(logits)[:2] or any(has_symbols(o) for o in operands if o is not x):
            return node, reader
        node, reader = x, node
        if len(x.users) > 1:
            return node, reader


def last_places(flow: TokenFlow, logits: fx.Node) -> list[fx.Node]:
    """Where the graph takes the last token of each sequence, for logits of that one alone; raises Refusal where the wanted rows cannot be taken instead."""
    if index_of(logits)[1] in flow.rows[logits].variables:
        return []
    found, seen, stack = [], {logits}, [logits]
    while stack:
        node = stack.pop()
        if node in flow.last and not flow.is_last(_source(flow, node)):
            x = _source(flow, node)
            if len(N.shape(x)) < 2 or flow.rows[x].token is not E.add(E.mul(index_of(x)[0], flow.S), index_of(x)[1]):
                raise Refusal("AO217", f"the last tokens are taken of {N.said(x)}; supported is a value [B, S, ...].", node)
            found.append(node)
            continue
        for x in node.all_input_nodes:
            if not N.is_tensor(x):
                text = f"{N.said(node)}, behind the choice of the last token, has {N.value(x)} in its shape; supported is what keeps the batch as first axis."
                raise Refusal("AO217", text, node)
            if flow.rows[x].token is not None and x not in seen:
                seen.add(x)
                stack.append(x)
    return found


def _source(flow: TokenFlow, node: fx.Node) -> fx.Node:
    """The operand that holds the tokens of which ``node`` picks."""
    return next(x for x in node.all_input_nodes if N.is_tensor(x) and flow.rows[x].token is not None)
