"""Raised attentions become calls of the chosen kernel: PyTorch's own operator where it says it all, else our own with the kernel's name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import sdpa
from attnopt.passes.attention_nodes import attentions, spec_of
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.edit import ORIGINAL, Editor, aten
from attnopt.passes.raise_attention import SITE
from attnopt.passes.select_kernel import BACKWARD, KERNEL


@dataclass(frozen=True)
class Lower:
    name: str = "lower"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        result = PassResult(False)
        for node in attentions(module.graph):
            kernel = node.meta.get(KERNEL, ("reference", ""))[0]
            spec = spec_of(node)
            if kernel == "sdpa" and sdpa.is_one_call(spec):
                _call_sdpa(module.graph, node, spec)
            else:
                node.args = (*node.args[:6], "/".join(x for x in (kernel, node.meta.get(BACKWARD)) if x is not None))
            result.modified = True
        return result


def _call_sdpa(graph: fx.Graph, node: fx.Node, spec: AttentionSpec) -> None:
    q, k, v = node.args[:3]
    edit = Editor(graph, node)
    options = {"enable_gqa": True} if spec.groups > 1 else {}
    new = edit.call(aten.scaled_dot_product_attention.default, q, k, v, None, spec.dropout, spec.mask is not E.TRUE, scale=spec.scale, **options)
    new.meta |= {key: node.meta[key] for key in (SITE, ORIGINAL, KERNEL) if key in node.meta}
    new.meta["attnopt_spec"] = spec
    node.replace_all_uses_with(new)
    graph.erase_node(node)
