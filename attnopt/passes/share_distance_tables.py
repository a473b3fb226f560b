"""Attentions with the same bias by distance over the same tensors read one table of it, worked out once for all of them.

Only for kernels that read such a table; alone, a kernel makes its own when it is called. Gradients do not go through the table: an attention computes those of the
tensors behind it from its spec, as it does without one, so the pass serves training too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import registry
from attnopt.kernels.distance_table_op import table_alone
from attnopt.kernels.programs import programs_of
from attnopt.passes.attention_nodes import attentions, size_nodes, spec_of, tensors_read
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.edit import Editor
from attnopt.passes.select_kernel import KERNEL


@dataclass(frozen=True)
class _Wanted:
    """A table that an attention would read: equal for all that can share it."""

    score: AttentionSpec
    loads: tuple[fx.Node, ...]
    sizes: tuple[Any, ...]
    margin: int


@dataclass(frozen=True)
class ShareDistanceTables:
    name: str = "share-distance-tables"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        graph = module.graph
        place = {n: i for i, n in enumerate(graph.nodes)}
        wanted = {node: tables for node in attentions(graph) if (tables := _wanted(node, place))}
        uses = Counter(table for tables in wanted.values() for table in tables)
        made: dict[_Wanted, fx.Node] = {}
        for node, tables in wanted.items():
            if any(uses[table] > 1 for table in tables):
                for table in tables:
                    made[table] = made.get(table) or _insert(graph, table, node)
                node.kwargs = {**node.kwargs, "tables": [made[table] for table in tables]}
        return PassResult(bool(made))


def _wanted(node: fx.Node, place: dict[fx.Node, int]) -> tuple[_Wanted, ...]:
    """The tables that the kernel chosen for ``node`` takes: all of its spec, or none."""
    spec = spec_of(node)
    q: Any = node.args[0]
    value = N.value(q)
    margin = registry.table_margin(node.meta[KERNEL][0], spec, device=value.device, dtype=value.dtype) if KERNEL in node.meta else None
    if margin is None:
        return ()
    size_of = size_nodes(node)
    found = []
    for part in programs_of(spec).parts:
        if not part.shareable:
            continue
        tensors, slots = tensors_read(node, part.expr, place)
        score = table_alone(spec, part, slots)
        if score is None:
            return ()
        found.append(_Wanted(score, tensors, tuple(size_of[name] for name in score.sizes), margin))
    return tuple(found)


def _insert(graph: fx.Graph, wanted: _Wanted, first: fx.Node) -> fx.Node:
    """The table, computed before the first attention that reads it."""
    edit = Editor(graph, first)
    d = wanted.score.dims
    extents = [edit.size(x) for x in (d.B, d.Hq, d.Sq, d.Skv)]
    return edit.call(
        torch.ops.attnopt.distance_table.default, wanted.loads[0], list(wanted.loads), list(wanted.sizes), *extents, wanted.score.to_json(), wanted.margin
    )
