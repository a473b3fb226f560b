"""Inputs that say which tokens are padding become ones: a batch of packed tokens has no padding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis.padding import padding_inputs
from attnopt.analysis.site import AttentionSite
from attnopt.analysis.sites import find_sites
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.edit import Editor, aten
from attnopt.passes.raise_attention import constant_of
from attnopt.remarks import Remark


@dataclass(frozen=True)
class DropPadding:
    name: str = "drop-padding"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        result = PassResult(False)
        graph = module.graph
        inputs = [n for n in graph.find_nodes(op="placeholder") if N.is_tensor(n)]
        if len(inputs) < 2:
            return result
        found = padding_inputs(s for s in find_sites(graph, constant_of(module)) if isinstance(s, AttentionSite))
        for node in found:
            like = next((x for x in inputs if x not in found and N.shape(x) == N.shape(node)), None)
            if like is None:
                continue
            for user in [u for u in node.users if N.op_name(u) == "aten::sym_size"]:
                user.replace_input_with(node, like)
            if not node.users:
                continue
            edit = Editor(graph, next(n for n in graph.nodes if node in n.all_input_nodes))
            value = N.value(node)
            ones = edit.call(aten.ones_like.default, like, dtype=value.dtype, device=value.device)
            node.replace_all_uses_with(ones)
            result.modified = True
            result.remarks.append(Remark("AO105", f"{N.said(node)} says which tokens are padding; packed tokens have none."))
        return result

