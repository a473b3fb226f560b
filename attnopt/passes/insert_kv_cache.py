"""A decoder captured without a cache becomes one that reads keys and values from a paged cache, for the packed tokens of many requests.

The captured graph is a function of ids [B, S]. It is run at B = 1 with S = T packed tokens of all requests, which is the same function
of each token wherever the analysis (``token_flow``) has proven that tokens are treated one by one. What knows of more than one token
is rewritten: attentions write their keys and values to the cache and read those of their own request, and where the graph
computes positions, it reads them from an input. See docs/decisions/0015-packed-tokens.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis.latent import starts_with
from attnopt.analysis.layout import Refusal
from attnopt.analysis.self_attention import reads_context, row_of_attention, seen_by_all, without_shifts
from attnopt.analysis.token_flow import Source, TokenFlow, flow_of
from attnopt.ir import expr as E
from attnopt.passes.attention_nodes import attentions, spec_of
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.cleanup import drop_unread
from attnopt.passes.context import context_module
from attnopt.passes.describe import describe
from attnopt.passes.edit import ORIGINAL, Editor, aten
from attnopt.passes.group_heads import site_name
from attnopt.passes.packed_inputs import PackedInputs
from attnopt.passes.packed_output import last_places, logits_of, packed_logits
from attnopt.passes.raise_attention import SITE, constant_of
from attnopt.passes.select_kernel import KERNEL
from attnopt.remarks import Remark

PLAN = "attnopt_packed"
"""Key in the module's meta: the ``PackedPlan``."""
CONTEXT = "attnopt_context"
"""Key in the module's meta: the module that makes keys and values of another sequence, where there is one."""


@dataclass(frozen=True)
class CacheLayer:
    """What one attention keeps of a token: keys [Hkv, D] and values [Hkv, Dv] of a dtype, for ``window`` tokens (None: for all).

    Dv is 0 where the values are the first features of the keys, and are read from there.
    """

    name: str
    Hkv: int
    D: int
    Dv: int
    window: int | None
    dtype: torch.dtype
    cross: bool = False
    """Kept of the tokens of another sequence, once for each request; see ``PackedPlan.context``."""


@dataclass(frozen=True)
class PackedPlan:
    """How the rewritten graph is called: with ``PackedInputs``' tensors, then each layer's k_cache and v_cache; it gives logits [rows, vocabulary]."""

    layers: tuple[CacheLayer, ...]
    vocabulary: int
    max_positions: int | None
    """How many positions a table of the model has; None where positions are computed."""
    ids: str
    """The captured graph's input that holds the ids."""
    last_only: bool
    """The original gives logits of the last token alone."""
    prefix: int = 0
    """So many first tokens of a request see each other, later ones too: one call computes them all, or what is kept of them is wrong."""
    context: tuple[str, ...] = ()
    """The captured graph's inputs that another sequence is made of, by the module at ``CONTEXT``: its k and v for each layer that is ``cross``."""
    layout: str = "paged"
    """``contiguous``: each request has one page, so ``block_table`` has one column; ``paged``: as many as it needs. ``static``: see ``InsertStaticCache``."""


@dataclass(frozen=True)
class InsertKVCache:
    """``positions`` names the inputs that hold positions (known-inputs takes them out), ``output`` is the place of the logits among the results (None: the one that fits).

    The graph is the same for both ``layout``s: a contiguous cache is one of a page for each request, which the kernels see by the block table's one column.
    """

    positions: tuple[str, ...] = ()
    output: int | None = None
    backend: str = "auto"
    layout: str = "paged"
    name: str = "insert-kv-cache"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        """Rewrite, with the plan in the module's meta; or leave the module as it is, with the reason as a remark."""
        graph = module.graph
        drop_unread(graph)
        try:
            tokens, flow, logits, places, served = decoder_of(module, self.output)
        except Refusal as r:
            return refused(r)
        result = PassResult(True)
        crossing = [n for n in served if reads_context(flow, n)]
        context = context_module(module, [(n.args[1], n.args[2]) for n in crossing]) if crossing else None  # type: ignore[misc]
        inputs = PackedInputs(graph, tokens, bool(crossing))
        prefix = max((seen_by_all(without_shifts(spec_of(n))) or 0 for n in served if n not in crossing), default=0)
        layers = [self._cached(graph, node, inputs, node in crossing, result) for node in served]
        for node, source in flow.sources.items():
            redirected(graph, node, source, inputs.positions)
            text = f"{N.said(node)} is {_formula(source)}; it is computed from the positions of the packed tokens."
            result.remarks.append(Remark("AO106", text, source=N.source(node)))
        packed_logits(flow, graph, logits, places, inputs.rows)
        inputs.finish()
        drop_unread(graph)
        limits = [n for n, _ in flow.limits]
        names = () if context is None else tuple(str(n.target) for n in context.graph.find_nodes(op="placeholder"))
        limit = min(limits) if limits else None
        plan = PackedPlan(tuple(layers), int(N.value(logits).shape[-1]), limit, str(tokens.target), bool(places), prefix, names, self.layout)
        module.meta[PLAN] = plan
        if context is not None:
            module.meta[CONTEXT] = context
        return result

    def _cached(self, graph: fx.Graph, node: fx.Node, inputs: PackedInputs, cross: bool, result: PassResult) -> CacheLayer:
        """Write keys and values where the slots say, and read those of each request in their place."""
        spec = without_shifts(spec_of(node))
        edit = Editor(graph, node)
        q, k, v = (edit.call(aten.transpose.int, edit.call(aten.select.int, x, 0, 0), 0, 1) for x in node.args[:3])
        name = site_name(node)
        if cross:
            block_table, seqlens_k = inputs.cross
        else:
            block_table, seqlens_k = inputs.block_table, inputs.seqlens_k
        within = not cross and starts_with(node.args[1], node.args[2])  # type: ignore[arg-type]
        stored = edit.call(aten.slice.Tensor, v, 2, 0, 0) if within else v
        k_cache, v_cache = inputs.cache(k), inputs.cache(stored)
        if not cross:
            edit.call(torch.ops.attnopt.cache_write.default, k, stored, k_cache, v_cache, inputs.slots)
        values = edit.call(aten.slice.Tensor, k_cache, 3, 0, int(N.value(v).shape[-1])) if within else v_cache
        arguments = (k_cache, values, block_table, inputs.cu_seqlens_q, seqlens_k)
        read = edit.call(torch.ops.attnopt.paged_attention.default, q, *arguments, node.args[3], [], spec.to_json(), self.backend)
        read.meta |= {KERNEL: ("paged", f"keys and values are read from a {self.layout} cache"), "attnopt_spec": spec}
        out = edit.call(aten.unsqueeze.default, edit.call(aten.transpose.int, read, 0, 1), 0)
        out.meta |= {key: node.meta[key] for key in (SITE, ORIGINAL) if key in node.meta}
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        left, _ = spec.window
        (_, Hkv, D), Dv = N.value(k).shape, N.value(stored).shape[-1]
        layer = CacheLayer(name, int(Hkv), int(D), int(Dv), None if left is None or cross else left + 1, N.value(k).dtype, cross)
        whose = "each token of another sequence, computed once for each request," if cross else "each token"
        window = "" if layer.window is None else f", of the last {layer.window} tokens"
        what = f"keys [{Hkv}, {D}], whose first {N.value(v).shape[-1]} features are the values," if within else f"keys [{Hkv}, {D}] and values [{Hkv}, {Dv}]"
        result.remarks.append(Remark("AO104", f"{what} of {whose} are kept in a {self.layout} cache{window}.", name, N.source(node)))
        return layer


def decoder_of(module: fx.GraphModule, output: int | None) -> tuple[fx.Node, TokenFlow, fx.Node, list[fx.Node], list[fx.Node]]:
    """The ids, the proof for them, the logits (``output`` as in the pass), where the last token of each sequence is taken, and the attentions to cache. Raises Refusal."""
    graph = module.graph
    tokens, flow = _tokens_and_flow(module)
    logits = logits_of(flow, graph, output)
    places = last_places(flow, logits)
    served = [n for n in attentions(graph) if n in flow.needed]
    if not served:
        raise Refusal("AO215", "the model has no attention that was understood, so there is nothing to cache; supported is a decoder of causal self-attention.", logits)
    return tokens, flow, logits, places, served


def refused(r: Refusal) -> PassResult:
    """The module stays as it is, with the reason as a remark."""
    assert r.node is not None
    return PassResult(False, [Remark(r.code, r.message, source=N.source(r.node), node=describe(r.node))])


def _tokens_and_flow(module: fx.GraphModule) -> tuple[fx.Node, TokenFlow]:
    """The input that holds the ids, and the proof for it; of several that could, the one that has a proof. Raises Refusal."""
    graph = module.graph
    used = [n for n in graph.find_nodes(op="placeholder") if N.is_tensor(n) and any(N.op_name(u) != "aten::sym_size" for u in n.users)]
    ids = [n for n in used if N.kind(n) == "int" and len(N.shape(n)) == 2]
    if not ids:
        said = ", ".join(N.said(n) for n in used) or "none"
        text = f"the inputs that the model reads are {said}; supported are one of token ids [B, S], and positions, padding and another sequence beside it."
        raise Refusal("AO217", text, graph.output_node())
    refusal: Refusal | None = None
    for tokens in ids:
        B, S = N.shape(tokens)
        if B.op != "sym" or S.op != "sym" or B is S:
            text = f"the ids, {N.said(tokens)}, were captured with a fixed size; supported are open batch and length (dynamic_shapes='auto')."
            refusal = Refusal("AO217", text, tokens)
            continue
        try:
            return tokens, flow_of(graph, tokens, constant_of(module), row_of_attention)
        except Refusal as r:
            refusal = r
    assert refusal is not None
    raise refusal


def _formula(source: Source) -> str:
    position = "the position" if source.slope == 1 else f"{source.slope} times the position"
    position += f" plus {source.offset}" if source.offset > 0 else f" minus {-source.offset}" if source.offset < 0 else ""
    return position if source.table is None else f"the entry at {position} of {N.said(source.table)}"


def redirected(graph: fx.Graph, node: fx.Node, source: Source, positions: fx.Node) -> None:
    """The same values from the ``positions`` [T] of the packed tokens, in place of the axis that they run along."""
    edit = Editor(graph, node)
    at = positions
    if source.slope != 1:
        at = edit.call(aten.mul.Tensor, at, source.slope)
    if source.offset:
        at = edit.call(aten.add.Tensor, at, source.offset)
    if source.table is not None:
        new = edit.call(aten.index_select.default, source.table, source.table_axis, at)
    else:
        if N.value(at).dtype is not N.value(node).dtype:
            at = edit.call(aten.to.dtype, at, N.value(node).dtype)
        shape = N.shape(node)
        length = edit.size(shape[source.axis])
        new = edit.call(aten.reshape.default, at, [length if d == source.axis else 1 for d in range(len(shape))]) if len(shape) > 1 else at
        if any(n is not E.ONE for d, n in enumerate(shape) if d != source.axis):
            new = edit.call(aten.expand.default, new, [edit.size(n) for n in shape])
    node.replace_all_uses_with(new)


