"""The part of a graph that is computed once for each request: the keys and values of another sequence, from an encoder's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.errors import ServingError
from attnopt.passes.cleanup import drop_unread
from attnopt.passes.edit import Editor, aten
from attnopt.passes.packed_inputs import sizes_from

Pair = tuple[fx.Node, fx.Node]


def context_module(module: fx.GraphModule, pairs: Sequence[Pair]) -> fx.GraphModule:
    """A module of its own that gives k [S, Hkv, D] and v [S, Hkv, Dv] of each attention in ``pairs``, one behind the other.

    Its inputs are those of the whole graph that these are made of, in their order, for one request: a batch of one. ``module`` stays as it is.
    """
    graph = fx.Graph()
    table: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, table)
    for old, new in table.items():
        new.meta, new.name = dict(old.meta), old.name
    end = graph.output(())
    edit = Editor(graph, end)
    results = [edit.call(aten.transpose.int, edit.call(aten.select.int, table[x], 0, 0), 0, 1) for pair in pairs for x in pair]
    end.args = (tuple(results),)
    drop_unread(graph)
    inputs = list(graph.find_nodes(op="placeholder"))
    read = [n for n in inputs if any(N.op_name(u) != "aten::sym_size" for u in n.users)]
    for node in inputs:
        if node not in read:
            sizes_from(node, read)
            graph.erase_node(node)
    found = fx.GraphModule(module, graph)
    found.training = module.training
    assert isinstance(found, torch.nn.Module)
    return found


def context_length(module: fx.GraphModule) -> Callable[..., int]:
    """A function of the inputs of a context module: how many tokens its keys and values have, from the shapes alone.

    Raises ServingError where the attentions read sequences of different lengths.
    """
    inputs = [N.value(n) for n in module.graph.find_nodes(op="placeholder")]
    lengths = {str(n): n for n in (N.value(x).shape[0] for x in module.graph.output_node().all_input_nodes)}
    if len(lengths) > 1:
        raise ServingError(f"The attentions of this model read other sequences of {' and '.join(lengths)} tokens; supported is one length for all.")
    (first,) = lengths.values()

    def length(*given: torch.Tensor) -> int:
        if isinstance(first, int):
            return first
        sizes = {n.node.expr: m for x, y in zip(inputs, given, strict=True) for n, m in zip(x.shape, y.shape, strict=True) if isinstance(n, torch.SymInt)}
        return int(first.node.expr.xreplace(sizes))

    return length
