"""Each attention that the analysis finds becomes one ``attnopt::attention`` operator that carries its meaning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from attnopt.analysis import latent, rotary
from attnopt.analysis import nodes as N
from attnopt.analysis.alias import is_view, written
from attnopt.analysis.lift import Lifter
from attnopt.analysis.site import AttentionSite, Rejection
from attnopt.analysis.sites import Constants, find_sites
from attnopt.ir import expr as E
from attnopt.ir.printing import render
from attnopt.kernels import ops as _ops  # registers attnopt::attention
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.describe import describe
from attnopt.passes.edit import ORIGINAL, Editor, aten
from attnopt.remarks import Remark
from attnopt.report import Site

assert _ops is not None

SITE = "attnopt_site"
"""Key in a node's meta: the name of the site whose value the node holds."""


@dataclass(frozen=True)
class RaiseAttention:
    """``skip`` names sites to leave in their original form."""

    skip: frozenset[str] = frozenset()
    name: str = "raise-attention"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        result = PassResult(False)
        graph = module.graph
        members, unstable = written(graph)
        for found in find_sites(graph, constant_of(module), members):
            site = Site(found.name, found.source, "missed")
            result.sites.append(site)
            if isinstance(found, AttentionSite):
                found = _unstable(found, unstable) or found
            if isinstance(found, Rejection):
                site.why = found.message
                site.remarks.append(Remark(found.code, found.message, found.name, found.source, node=describe(found.at)))
                continue
            for annotate in (rotary.annotate, latent.annotate):
                annotate(found, Lifter(constant_of(module), members))
            site.spec = found.spec
            site.loads = [describe(n, load.name) for n, load in zip(found.loads, found.spec.loads, strict=True)]
            if found.name in self.skip:
                site.status = "reverted"
                continue
            _replace(graph, found)
            site.status = "replaced"
            result.folded += sorted(str(n.target) for n in found.folded)
            site.remarks.append(Remark("AO101", f"{found.spec}.", found.name, found.source))
            if N.op_name(found.node) == "aten::scaled_dot_product_attention" and N.arguments(found.node).get("attn_mask") is not None:
                site.remarks.append(Remark("AO103", f"the mask is {render(found.spec.mask, found.spec.load_names)}.", found.name, found.source))
            for i, load in enumerate(found.spec.loads):
                if N.is_tensor(found.loads[i]) and _is_dense(found, i):
                    text = f"{load.name} is read as a dense tensor of shape [{', '.join(site.loads[i].shape)}], for each query and key."
                    site.remarks.append(Remark("AO303", text, found.name, found.source, node=site.loads[i]))
            result.modified = True
        graph.eliminate_dead_code()
        return result


def _unstable(site: AttentionSite, unstable: frozenset[fx.Node]) -> Rejection | None:
    """Why a site cannot read its operands where it stands: one of them is written in place after something read it."""
    for n in (*site.loads, site.q.node, site.k.node, site.v.node):
        if n in unstable:
            write = _last_write(n)
            read = describe(n)
            text = f"{read.dtype}[{', '.join(read.shape)}] of {read.operator}, which the attention reads, is written in place by {N.op_name(write)} after something read it; supported are tensors that nothing writes after they were read."
            return Rejection("AO207", text, write, site.node, site.name, site.source)
    return None


def _last_write(node: fx.Node) -> fx.Node:
    """The last operator that writes the memory of ``node`` in place."""
    mutable = {n for n in node.graph.nodes if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable}
    base = node
    while (source := next((a for a in base.all_input_nodes if N.is_tensor(a)), None)) is not None and (is_view(base) or base in mutable):
        base = source
    same, stack = {base}, [base]
    while stack:
        for user in stack.pop().users:
            if user not in same and (is_view(user) or (user in mutable and user.all_input_nodes[0] in same)):
                same.add(user)
                stack.append(user)
    writes: list[fx.Node] = [n for n in node.graph.nodes if n in same & mutable]
    return writes[-1]


def constant_of(module: fx.GraphModule) -> Constants:
    """The value of a get_attr node that is a buffer or a constant, never of a parameter."""

    def value(node: fx.Node) -> torch.Tensor | None:
        found: object = module
        for part in str(node.target).split("."):
            found = getattr(found, part, None)
        if isinstance(found, torch.Tensor) and not isinstance(found, torch.nn.Parameter) and not found.requires_grad:
            return found
        return None

    return value


def _is_dense(site: AttentionSite, slot: int) -> bool:
    """Whether a load runs along both queries and keys by itself."""
    d = site.spec.dims
    return any(x.op == "load" and x.value == slot and {d.q, d.k} <= set(x.args) for p in site.spec.programs for x in E.postorder(p))


def _replace(graph: fx.Graph, site: AttentionSite) -> None:
    edit = Editor(graph, site.output)
    q, k, v = (edit.views(o.node, o.views) for o in (site.q, site.k, site.v))
    loads = [n if N.is_tensor(n) else edit.call(aten.scalar_tensor.default, n, dtype=torch.float32) for n in site.loads]
    sizes = [edit.size(x) for x in site.sizes]
    out = edit.call(torch.ops.attnopt.attention.default, q, k, v, loads, sizes, site.spec.to_json(), "reference")
    out = edit.views(out, site.output_views)
    dtype = N.value(site.output).dtype
    if N.value(out).dtype is not dtype:
        out = edit.call(aten.to.dtype, out, dtype)
    out.meta[SITE] = site.name
    out.meta[ORIGINAL] = site.output.meta.get(ORIGINAL, site.output.name)
    site.output.replace_all_uses_with(out)
