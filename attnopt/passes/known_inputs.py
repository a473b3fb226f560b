"""Inputs whose values are known for a request without padding: a mask of padding holds ones, and positions count from zero.

Packed tokens have no padding between requests, so such inputs disappear: the passes that follow see the ones and the count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis.padding import padding_inputs
from attnopt.analysis.site import AttentionSite
from attnopt.analysis.sites import find_sites
from attnopt.ir import expr as E
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.edit import Editor, aten
from attnopt.passes.packed_inputs import sizes_from
from attnopt.passes.raise_attention import constant_of
from attnopt.remarks import Remark


@dataclass(frozen=True)
class KnownInputs:
    """``positions`` names the inputs that hold positions ([B, S], [1, S] or [S]); masks of padding are found by what attentions do with them."""

    positions: tuple[str, ...] = ()
    name: str = "known-inputs"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        result = PassResult(False)
        graph = module.graph
        inputs = [n for n in graph.find_nodes(op="placeholder") if N.is_tensor(n)]
        known = [n for n in inputs if str(n.target) in self.positions]
        if len(inputs) - len(known) > 1:
            known += padding_inputs(s for s in find_sites(graph, constant_of(module)) if isinstance(s, AttentionSite))
        for node in known:
            counted = str(node.target) in self.positions
            others = [x for x in inputs if x not in known and set(_symbols(node)) <= set(_symbols(x))]
            if not others:
                continue
            sizes_from(node, others)
            if not node.users:
                continue
            edit = Editor(graph, next(n for n in graph.nodes if node in n.all_input_nodes))
            node.replace_all_uses_with(_count(edit, node, others[0]) if counted else _ones(edit, node, others[0]))
            result.modified = True
            text = "counts each token's position from zero" if counted else "says which tokens are padding; packed tokens have none"
            result.remarks.append(Remark("AO105", f"{N.said(node)} {text}."))
        return result


def _symbols(node: fx.Node) -> list[E.Expr]:
    return [n for n in N.shape(node) if not n.is_const]


def _ones(edit: Editor, node: fx.Node, like: fx.Node) -> fx.Node:
    value = N.value(node)
    if N.shape(like) == N.shape(node):
        return edit.call(aten.ones_like.default, like, dtype=value.dtype, device=value.device)
    one = edit.call(aten.scalar_tensor.default, 1, dtype=value.dtype, device=value.device)
    return edit.call(aten.expand.default, one, [edit.size(n) for n in N.shape(node)])


def _count(edit: Editor, node: fx.Node, like: fx.Node) -> fx.Node:
    length = N.shape(node)[-1]
    edit.call(aten.sym_size.int, like, N.shape(like).index(length))
    size = edit.size(length)
    with edit.graph.inserting_before(edit.anchor):
        count = edit.graph.call_function(aten.arange.default, (size,), {"dtype": N.value(node).dtype, "device": N.value(node).device})
    with N.value(node).fake_mode:
        count.meta["val"] = torch.empty(N.value(node).shape[-1:], dtype=N.value(node).dtype, device=N.value(node).device)
    return edit.call(aten.expand.default, count, [edit.size(n) for n in N.shape(node)])
