"""Sorting a site's variables into batch, head, query, key and feature.

A site arrives in the variables of its output's axes, whatever they are: heads flattened into the batch, grouped heads on
an axis of their own, sequence before heads. What tells them apart is where they occur: keys and values do not run along
the query axis nor along the heads of a group, and everything else is batch or head. Merged axes are split first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from attnopt.analysis import classify, views, visible
from attnopt.analysis import nodes as N
from attnopt.analysis.site import AttentionSite, Operand
from attnopt.analysis.views import Index
from attnopt.ir import expr as E
from attnopt.ir.dims import product
from attnopt.ir.expr import Expr
from attnopt.ir.index import IndexMap, View
from attnopt.ir.spec import AttentionSpec, Dims, Load, Weightless


class Refusal(Exception):
    """Raised inside the search: this anchor is not a site, for this reason."""

    def __init__(self, code: str, message: str, node: fx.Node | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.node = code, message, node


@dataclass
class RawSite:
    """A site in the variables of its output's axes. Each operand is a node and the index into it."""

    output: fx.Node
    out: Index
    key: Expr
    feature: Expr
    q: tuple[fx.Node, Index]
    k: tuple[fx.Node, Index]
    v: tuple[fx.Node, Index]
    logits: Expr
    empty: Weightless
    dropout: float
    region: frozenset[fx.Node]
    sink: Expr | None = None
    """The logit of a key that has no value."""
    underflows: bool = False
    """A row of finite fills gives what a row of -inf does."""
    scores: fx.Node | None = None
    """The product of queries and keys."""
    half: bool = False
    """Logits are rounded to float16."""


def arrange(raw: RawSite, node: fx.Node, folded: set[fx.Node]) -> AttentionSite:
    """The site in canonical variables, with the views that bring its operands to [B, H, S, D]."""
    _feature_axis(raw)
    q_index, k_index, v_index, logits = raw.q[1], raw.k[1], raw.v[1], raw.logits
    outer = [v for v in raw.out if not v.is_const]
    in_v = _variables(v_index)
    in_q, in_k = _variables(q_index), _variables(k_index)
    elsewhere = in_q | in_k | set(logits.variables)
    value_axes = [v for v in outer if v in in_v and v not in elsewhere]
    if len(value_axes) > 1:
        # an axis that only the values have, and that is no feature, is a batch axis along which q and k are shared
        value_axes = value_axes[-1:]
    dv = value_axes[0] if value_axes else None
    lead = [v for v in outer if v is not dv]

    # An index that the mask alone divides (a chunk, a block) is one axis; a batch that holds heads as well is two.
    split = _splits(lead, (*q_index, *k_index, *v_index)) | _splits([x for x in lead if x in in_k], [logits])
    back: dict[Expr, Expr] = {}  # pieces of split axes in terms of the output's axes
    wholes: dict[Expr, Expr] = {}
    for axis, (high, low) in split.items():
        d = low.extent
        assert d is not None
        whole = wholes[axis] = E.add(E.mul(high, d), low)
        q_index, k_index, v_index = (tuple(E.substitute(x, {axis: whole}) for x in i) for i in (q_index, k_index, v_index))
        logits = E.substitute(logits, {axis: whole})
        lead = [p for x in lead for p in ((high, low) if x is axis else (x,))]
        back |= {high: E.floordiv(axis, d), low: E.mod(axis, d)}

    shared = (_variables(k_index) | _variables(v_index)) - {raw.key, raw.feature}
    only_q = [v for v in lead if v not in shared]
    query = _query_axis(only_q, _variables(q_index), raw.key)
    if query is None and _variables(k_index) - {raw.feature} != _variables(v_index) - {dv}:
        by = "another product" if raw.scores is None else f"{N.said(raw.scores)}, another product"
        raise Refusal("AO212", f"the scores pass through {by}, before the softmax, which mixes them along an axis; supported are views and pointwise operators.", raw.scores)
    group = [v for v in only_q if v is not query]
    kv = [v for v in lead if v in shared]
    if group:
        kv_head, batch = (kv[-1:], kv[:-1]) if len(kv) > 1 else ([], kv)
    elif len(kv) > 1:
        # of several shared axes the heads are the last one whose number is fixed
        fixed = [v for v in kv if v.extent is not None and v.extent.is_const]
        kv_head = fixed[-1:] or kv[-1:]
        batch = [v for v in kv if v not in kv_head]
    else:
        kv_head, batch = [], kv
    heads = kv_head + group

    skv, dsize = _extent(raw.key), _extent(raw.feature)
    dims = Dims(
        B=product([_extent(v) for v in batch]),
        Hq=product([_extent(v) for v in heads]),
        Hkv=product([_extent(v) for v in kv_head]),
        Sq=E.ONE if query is None else _extent(query),
        Skv=skv,
        D=dsize,
        Dv=E.ONE if dv is None else _extent(dv),
    )
    kv_h = E.var("h", dims.Hkv)
    names = _merge(dims.b, batch) | _merge(dims.h, heads) | {raw.key: dims.k}
    kv_names = _merge(dims.b, batch) | _merge(kv_h, kv_head) | {raw.key: dims.k}
    if query is not None:
        names[query] = dims.q
    d_var, dv_var = E.var("d", dims.D), E.var("dv", dims.Dv)
    features = {raw.feature: d_var} | ({} if dv is None else {dv: dv_var})
    q = _operand(raw.q[0], q_index, names | features, (dims.b, dims.h, dims.q, d_var), "queries")
    k = _operand(raw.k[0], k_index, kv_names | features, (dims.b, kv_h, dims.k, d_var), "keys")
    v = _operand(raw.v[0], v_index, kv_names | features, (dims.b, kv_h, dims.k, dv_var), "values")

    logits = E.substitute(logits, names)
    sink = None if raw.sink is None else E.substitute(E.substitute(raw.sink, wholes), names)
    for part, what, allowed in ((logits, "score", (dims.b, dims.h, dims.q, dims.k)), (sink, "sink", (dims.b, dims.h, dims.q))):
        stray = set() if part is None else part.variables - set(allowed)
        if stray:
            axes = ", ".join(f"an axis of size {x.extent}" for x in sorted(stray, key=lambda x: str(x.value)))
            text = f"the {what} of {N.said(node)} depends on {axes}; supported are batch, head{', query and key' if dims.k in allowed else ' and query'}."
            raise Refusal("AO206", text, node)
    parts = visible.split(logits, raw.empty, sink, raw.underflows, visible.IN_HALF if raw.half else visible.ANYWHERE)
    (score, mask, empty_score, sink), loads = _slots((parts.score, parts.mask, parts.empty_score, sink))
    assert score is not None and mask is not None
    infos = tuple(Load(_load_name(n), N.kind(n) if N.is_tensor(n) else "float", "cumsum" if N.op_name(n) == "aten::cumsum" else "") for n in loads)
    spec = AttentionSpec(
        dims=dims,
        score=score,
        mask=mask,
        empty_rows=parts.empty_rows,
        empty_score=empty_score,
        weightless=parts.weightless,
        sink=sink,
        loads=infos,
        dropout=raw.dropout,
        traits=classify.traits(score, mask, dims, infos, sink),
    )
    sizes = sorted({x for p in spec.programs for x in p.leaves if x.op == "sym"}, key=lambda e: str(e.value))
    spec = spec.replace(sizes=tuple(str(x.value[0]) for x in sizes))

    def original(x: Expr) -> Expr:
        return back.get(x, x)

    exprs = tuple(_flatten([original(x) for x in axes], [_extent(x) for x in axes]) for axes in (batch, heads, [query] if query else [], [dv] if dv else []))
    out_vars = tuple(E.var(f"one{i}", 1) if x.is_const else x for i, x in enumerate(raw.out))
    output_views = IndexMap(out_vars, exprs).realise((dims.B, dims.Hq, dims.Sq, dims.Dv))
    if output_views is None:
        text = f"the axes of the output, {N.said(raw.output)}, do not factor into batch, head, query and feature; supported are outputs that views make of [B, H, S, D]."
        raise Refusal("AO206", text, raw.output)
    return AttentionSite(node, raw.output, tuple(output_views), q, k, v, loads, tuple(sizes), spec, raw.region, frozenset(folded))


def _extent(v: Expr) -> Expr:
    assert v.extent is not None
    return v.extent


def _variables(index: Sequence[Expr]) -> set[Expr]:
    return {v for i in index for v in i.variables}


def _splits(lead: Sequence[Expr], exprs: Sequence[Expr]) -> dict[Expr, tuple[Expr, Expr]]:
    """Axes that are read only as ``v // d`` and ``v % d``, as two variables each. Of several divisors, the one that most others divide:
    batches of four heads that share two are read by four and by two."""
    divisors: dict[Expr, set[Expr]] = {}
    seen: set[Expr] = set()
    stack = list(exprs)
    while stack:
        x = stack.pop()
        if x in seen:
            continue
        seen.add(x)
        stack.extend(x.args)
        if x.op in ("floordiv", "mod") and x.args[0] in lead and not x.args[1].variables:
            divisors.setdefault(x.args[0], set()).add(x.args[1])
    out: dict[Expr, tuple[Expr, Expr]] = {}
    for v, ds in divisors.items():
        fitting = [d for d in sorted(ds, key=lambda e: e.key) if E.mod(_extent(v), d) is E.ZERO]
        if fitting:
            d = max(fitting, key=lambda d: sum(E.mod(d, other) is E.ZERO for other in fitting))
            out[v] = (E.var(f"{v.value}h", E.floordiv(_extent(v), d)), E.var(f"{v.value}l", d))
    return out


def _query_axis(candidates: Sequence[Expr], in_q: set[Expr], key: Expr) -> Expr | None:
    """Which of the axes that keys and values do not have is the query's; the others are heads of a group."""
    if not candidates:
        return None

    def rank(item: tuple[int, Expr]) -> tuple[bool, bool, bool, int]:
        i, v = item
        return (v in in_q, _extent(v) is _extent(key), not _extent(v).is_const, i)

    return max(enumerate(candidates), key=rank)[1]


def _merge(whole: Expr, parts: Sequence[Expr]) -> dict[Expr, Expr]:
    """Each part of a row-major merged axis in terms of the whole."""
    out: dict[Expr, Expr] = {}
    rest = E.ZERO if _extent(whole) is E.ONE else whole
    for v in reversed(parts[1:]):
        out[v] = E.mod(rest, _extent(v))
        rest = E.floordiv(rest, _extent(v))
    if parts:
        out[parts[0]] = rest
    return out


def _flatten(parts: Sequence[Expr], extents: Sequence[Expr]) -> Expr:
    total = E.ZERO
    for v, n in zip(parts, extents, strict=True):
        total = E.add(E.mul(total, n), v)
    return total


def _operand(node: fx.Node, index: Index, names: dict[Expr, Expr], out: tuple[Expr, ...], what: str) -> Operand:
    exprs = tuple(E.substitute(x, names) for x in index)
    found: list[View] | None = IndexMap(out, exprs).realise(N.shape(node))
    if found is None:
        raise Refusal(
            "AO206",
            f"the {what}, {N.said(node)} read at [{', '.join(map(str, exprs))}], do not factor into batch, head, sequence and feature; "
            "supported are selecting, narrowing, reshaping, permuting and expanding.",
            node,
        )
    return Operand(node, tuple(found))


def _slots(programs: Sequence[Expr | None]) -> tuple[list[Expr | None], tuple[fx.Node, ...]]:
    """Loads of graph nodes as loads of numbered slots, in order of first use."""
    nodes: dict[fx.Node, int] = {}
    table: dict[Expr, Expr] = {}
    for x in E.postorder(*(p for p in programs if p is not None)):
        if x.op == "load":
            slot = nodes.setdefault(x.value, len(nodes))
            table[x] = E.load(slot, tuple(E.substitute(a, table) for a in x.args), x.kind)
    return [None if p is None else E.substitute(p, table) for p in programs], tuple(nodes)


def _load_name(node: fx.Node) -> str:
    name = str(node.target) if node.op in ("placeholder", "get_attr") else node.name
    return name.removeprefix("p_").removeprefix("b_")


def _feature_axis(raw: RawSite) -> None:
    """Refuse what is shaped like attention but mixes channels: the keys are the features of a projection."""
    node, index = raw.k
    where = _projected_axis(node, index)
    if where is not None and raw.key in where[1].variables:
        text = f"the keys, {N.said(node)}, run along the feature axis of {N.said(where[0])}: channels are mixed and not positions; supported are keys that run along positions."
        raise Refusal("AO211", text, node)
    if raw.key.extent is not None and raw.key.extent.is_const and not _extent(raw.feature).is_const:
        raise Refusal(
            "AO211",
            f"the axis of the keys, {N.said(node)}, has the fixed size {raw.key.extent}, and the axis that is summed the variable size {raw.feature.extent}: "
            "channels are mixed and not positions; supported are keys that run along positions.",
            node,
        )


_FEATURES_LAST = {"aten::linear", "aten::addmm", "aten::mm"}
_FEATURES_SECOND = {"aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution"}
_MIXING = {"aten::matmul", "aten::bmm", "aten::einsum", "aten::cat"}


def _projected_axis(node: fx.Node, index: Index) -> tuple[fx.Node, Expr] | None:
    """The projection that made an operand and the index along its feature axis, through views and pointwise operators."""
    stack, seen = [(node, index)], set[fx.Node]()
    while stack:
        node, index = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        name = N.op_name(node)
        moved = views.step(node, index)
        if moved is not None:
            stack.append(moved)
        elif name in _FEATURES_LAST:
            return node, index[-1]
        elif name in _FEATURES_SECOND:
            return node, index[1]
        elif name not in _MIXING:
            stack += [(x, index) for x in node.all_input_nodes if N.is_tensor(x) and N.shape(x) == N.shape(node)]
    return None
