"""A decoder captured without a cache becomes one whose keys and values stand in caches of a fixed length, which are inputs and outputs of the graph.

As in ``insert-kv-cache``, from which the proofs come, the captured graph over ids [B, S] is run at B = 1, over the tokens of all rows behind one another. Every
row is written and read at an index of its own. See docs/decisions/0027-static-caches.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import attnopt.kernels.static_cache  # noqa: F401 - registers the operators
from attnopt.analysis import nodes as N
from attnopt.analysis.layout import Refusal
from attnopt.analysis.self_attention import reads_context, seen_by_all, without_shifts
from attnopt.ir.spec import AttentionSpec
from attnopt.passes.attention_nodes import spec_of
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.cleanup import drop_unread
from attnopt.passes.edit import Editor, aten
from attnopt.passes.group_heads import site_name
from attnopt.passes.insert_kv_cache import PLAN, CacheLayer, PackedPlan, decoder_of, redirected, refused
from attnopt.passes.packed_inputs import sizes_from
from attnopt.passes.packed_output import packed_logits


@dataclass(frozen=True)
class InsertStaticCache:
    """``positions`` and ``output`` as in ``InsertKVCache``; ``max_length`` is M, the slots of a cache."""

    positions: tuple[str, ...] = ()
    output: int | None = None
    max_length: int = 0
    name: str = "insert-static-cache"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        """Rewrite, with the plan in the module's meta; or leave the module as it is, with the reason as a remark.

        The new graph takes input_ids [B, S], write_indices int64 [B] and, of each layer, caches of keys and values [B, Hkv, M, D or Dv], of which the first
        ``write_indices[b]`` slots are filled in row b. It gives logits [B, S, V] and the caches with S more. Tokens of padding stand behind those of their row: nothing
        sees them, and the next call writes over them.
        """
        graph = module.graph
        drop_unread(graph)
        try:
            tokens, flow, logits, places, found = decoder_of(module, self.output)
            specs = [_served(node, reads_context(flow, node)) for node in found]
        except Refusal as r:
            return refused(r)
        inputs = _Inputs(graph, tokens, self.max_length)
        written = [_cached(graph, node, spec, inputs) for node, spec in zip(found, specs, strict=True)]
        for node, source in flow.sources.items():
            redirected(graph, node, source, inputs.positions)
        if places:
            packed_logits(flow, graph, logits, places, inputs.every)
        output = graph.output_node()
        result: fx.Node = output.args[0] if places else logits  # type: ignore[assignment]
        edit = Editor(graph, output)
        B, S = N.value(inputs.ids).shape
        result = _made(edit, aten.reshape.default, (result, [*inputs.sizes, -1]), [B, S, N.value(result).shape[-1]])
        output.args = ((result, *(x for pair in written for x in pair[1])),)
        inputs.finish()
        limits = [n for n, _ in flow.limits]
        layers, vocabulary = tuple(x for x, _ in written), int(N.value(result).shape[-1])
        module.meta[PLAN] = PackedPlan(layers, vocabulary, min(limits, default=None), str(tokens.target), bool(places), layout="static")
        return PassResult(True)


def _served(node: fx.Node, crosses: bool) -> AttentionSpec:
    """The spec; raises Refusal where caches that hold more than what was written cannot serve it."""
    spec = without_shifts(spec_of(node))
    if crosses:
        raise Refusal("AO215", f"this attention ({spec}) reads another sequence; supported in a static cache are decoders of self-attention alone.", node)
    if seen_by_all(spec):
        raise Refusal("AO215", f"this attention ({spec}) sees first keys after the query, which may not be written yet; supported in a static cache is causal attention.", node)
    if spec.empty_rows in ("uniform", "program") and spec.rows_may_be_empty():
        text = f"a row without a visible key averages all keys in this attention ({spec}), those not written yet among them; supported are rows that see a key, are zero or NaN."
        raise Refusal("AO215", text, node)
    return spec


class _Inputs:
    """New placeholders behind the old ones, which ``finish`` removes; of the ids and the index at which each row is written, the tokens and positions of the packed graph.

    Fake values are made by hand: the rest of the graph keeps those of [B, S], and is run at [1, B * S].
    """

    def __init__(self, graph: fx.Graph, ids: fx.Node, max_length: int) -> None:
        self.graph, self.old_ids, self.max_length = graph, ids, max_length
        self.old = list(graph.find_nodes(op="placeholder"))
        self.last = self.old[-1]
        self.mode = N.value(ids).fake_mode
        B, S = (self.mode.shape_env.create_unbacked_symint() for _ in range(2))
        old = N.value(ids)
        self.ids = self._add("input_ids", [B, S], torch.int64)
        self.write_indices = self._add("write_indices", [B], torch.int64)
        self.anchor = self.last.next
        edit = Editor(graph, self.anchor)
        self.sizes = [edit.call(aten.sym_size.int, self.ids, d) for d in range(2)]
        tokens = _made(edit, aten.reshape.default, (self.ids, [1, -1]), old.shape)
        self.tokens = tokens if old.dtype is torch.int64 else edit.call(aten.to.dtype, tokens, old.dtype)
        steps = _made(edit, aten.arange.default, (self.sizes[1],), [S], {"dtype": torch.int64, "device": old.device})
        at = _made(edit, aten.add.Tensor, (edit.call(aten.unsqueeze.default, self.write_indices, 1), steps), [B, S])
        self.positions = _made(edit, aten.reshape.default, (at, [-1]), [old.shape[1]])
        self.every = _made(edit, aten.arange.default, (edit.call(aten.sym_size.int, self.positions, 0),), [old.shape[1]], {"dtype": torch.int64, "device": old.device})
        """int64 [B * S]: all places of the packed tokens."""
        self.caches = 0

    def cache(self, x: fx.Node) -> fx.Node:
        """A cache [B, H, M, D] for values like ``x`` [1, H, B * S, D]."""
        name = f"past_{self.caches // 2}_{('key', 'value')[self.caches % 2]}"
        self.caches += 1
        _, H, _, D = N.value(x).shape
        return self._add(name, [N.value(self.ids).shape[0], H, self.max_length, D], N.value(x).dtype)

    def finish(self) -> None:
        self.old_ids.replace_all_uses_with(self.tokens)
        drop_unread(self.graph)
        for node in self.old:
            if node.users:
                sizes_from(node, [self.tokens])
            self.graph.erase_node(node)
        self.graph._codegen = fx.graph.CodeGen()  # arguments one by one, a plain result

    def _add(self, name: str, shape: list[Any], dtype: torch.dtype) -> fx.Node:
        with self.graph.inserting_after(self.last):
            node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=N.value(self.old_ids).device)
        self.last = node
        return node


def _cached(graph: fx.Graph, node: fx.Node, spec: AttentionSpec, inputs: _Inputs) -> tuple[CacheLayer, tuple[fx.Node, fx.Node]]:
    """Write keys and values into caches, and read those in their place: what is cached, and the caches behind this call."""
    edit = Editor(graph, node)
    q, k, v = (_by_rows(edit, x, inputs) for x in node.args[:3])
    caches = [edit.call(torch.ops.attnopt.cache_update.default, inputs.cache(old), x, inputs.write_indices) for old, x in zip(node.args[1:3], (k, v), strict=True)]  # type: ignore[arg-type]
    read = edit.call(torch.ops.attnopt.static_attention.default, q, *caches, inputs.write_indices, node.args[3], spec.to_json())
    read.meta["attnopt_spec"] = spec
    _, Hq, _, Dv = N.value(node).shape
    flat = _made(edit, aten.reshape.default, (edit.call(aten.transpose.int, read, 1, 2), [1, -1, Hq, Dv]), [*N.value(node).shape[:1], N.value(node).shape[2], Hq, Dv])
    left, _ = spec.window
    (_, Hkv, _, D), Dv = N.value(k).shape, N.value(v).shape[-1]
    layer = CacheLayer(site_name(node), int(Hkv), int(D), int(Dv), None if left is None else left + 1, N.value(k).dtype)
    node.replace_all_uses_with(edit.call(aten.transpose.int, flat, 1, 2))
    graph.erase_node(node)
    return layer, (caches[0], caches[1])


def _by_rows(edit: Editor, x: Any, inputs: _Inputs) -> fx.Node:
    """[1, H, B * S, D] as [B, H, S, D], by way of the form [1, B * S, H, D] that projections give."""
    B, S = N.value(inputs.ids).shape
    _, H, _, D = N.value(x).shape
    apart = _made(edit, aten.reshape.default, (edit.call(aten.transpose.int, x, 1, 2), [*inputs.sizes, H, D]), [B, S, H, D])
    return edit.call(aten.transpose.int, apart, 1, 2)


def _made(edit: Editor, target: Any, args: tuple[Any, ...], shape: Any, kwargs: dict[str, Any] | None = None) -> fx.Node:
    """A call with a fake value of ``shape`` that is not computed."""
    with edit.graph.inserting_before(edit.anchor):
        node: fx.Node = edit.graph.call_function(target, args, kwargs or {})
    first = next((a for a in args if isinstance(a, fx.Node) and N.is_tensor(a)), None)
    like = {"dtype": N.value(first).dtype, "device": N.value(first).device} if first is not None else kwargs or {}
    mode = next(n for n in edit.graph.find_nodes(op="placeholder") if N.is_tensor(n))
    with N.value(mode).fake_mode:
        node.meta["val"] = torch.empty(tuple(shape), **like)
    return node
