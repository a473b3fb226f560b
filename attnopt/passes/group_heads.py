"""Keys and values that were repeated for every query head of a group are read from the shared heads instead.

The index map of an operand, followed through its views, shows the repetition as ``h // groups``: wherever the chain has a
tensor that is indexed by that alone, it is the one to read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis import views
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.index import IndexMap, View
from attnopt.passes.attention_nodes import attentions, spec_of
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.edit import Editor
from attnopt.passes.raise_attention import SITE
from attnopt.remarks import Remark

_Source = tuple[fx.Node, tuple[View, ...]]


@dataclass(frozen=True)
class GroupHeads:
    name: str = "group-heads"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        result = PassResult(False)
        for node in attentions(module.graph):
            spec = spec_of(node)
            if not spec.dims.Hq.is_const or spec.groups != 1:
                continue
            k, v = node.args[1], node.args[2]
            assert isinstance(k, fx.Node) and isinstance(v, fx.Node)
            of_k, of_v = _sources(k), _sources(v)
            shared = sorted(set(of_k) & set(of_v))
            if not shared or shared[0] == spec.dims.Hq.value:
                continue
            heads = shared[0]
            edit = Editor(module.graph, node)
            new_k, new_v = edit.views(*of_k[heads]), edit.views(*of_v[heads])
            spec = spec.replace(dims=replace(spec.dims, Hkv=E.const(heads)))
            node.args = (node.args[0], new_k, new_v, *node.args[3:5], spec.to_json(), *node.args[6:])
            result.modified = True
            result.remarks.append(Remark("AO102", f"{spec.dims.Hq} query heads read {heads} KV heads.", site_name(node), N.source(node)))
        return result


def site_name(node: fx.Node) -> str:
    """The site that an attention node belongs to: its own mark, or that of the views of its result."""
    while SITE not in node.meta:
        users = list(node.users)
        if len(users) != 1:
            return ""
        node = users[0]
    return str(node.meta[SITE])


def _sources(operand: fx.Node) -> dict[int, _Source]:
    """For each number of KV heads that the operand [B, H, S, D] can be read with: the tensor to read and its views."""
    extents = N.shape(operand)
    b, h, s, d = out = tuple(E.var(name, n) for name, n in zip("bhsd", extents, strict=True))
    node, index = operand, tuple(E.ZERO if n is E.ONE else v for v, n in zip(out, extents, strict=True))
    found: dict[int, _Source] = {}
    while True:
        shared = _shared_heads(index, h)
        if shared is not None:
            kv, exprs = shared
            realised = IndexMap((b, kv, s, d), exprs).realise(N.shape(node))
            count = int(kv.extent.value) if kv.extent is not None else 0
            if realised is not None and (count not in found or len(realised) < len(found[count][1])):
                found[count] = (node, tuple(realised))
        moved = views.step(node, index)
        if moved is None:
            return found
        node, index = moved


def _shared_heads(index: tuple[Expr, ...], h: Expr) -> tuple[Expr, tuple[Expr, ...]] | None:
    """The index in terms of a KV head variable, if it reads the head only as ``h``, as ``h // g``, or not at all."""
    assert h.extent is not None
    reads = {x for e in index for x in _head_terms(e, h)}
    if not reads:
        kv = E.var("hk", 1)
        return kv, index
    if len(reads) != 1:
        return None
    (read,) = reads
    if read is h:
        kv = E.var("hk", h.extent)
    elif read.op == "floordiv" and read.args[0] is h and read.args[1].is_const and E.mod(h.extent, read.args[1]) is E.ZERO:
        kv = E.var("hk", E.floordiv(h.extent, read.args[1]))
    else:
        return None
    return kv, tuple(E.substitute(e, {read: kv}) for e in index)


def _head_terms(e: Expr, h: Expr) -> set[Expr]:
    """The smallest sub-expressions that hold ``h``: itself, or its quotients and remainders."""
    if e is h or (e.op in ("floordiv", "mod") and e.args[0] is h):
        return {e}
    return {x for a in e.args for x in _head_terms(a, h)}
