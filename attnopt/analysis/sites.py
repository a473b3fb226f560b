"""Finding the attentions of a graph: each anchor becomes an ``AttentionSite`` or a ``Rejection`` with a reason and a node.

A site starts at a product of probabilities with values. Its output's axes are the variables in which everything is said:
the probabilities, the logits and every mask below them are lifted at those indices, so no spelling, layout or grouping
needs a case of its own. ``layout.py`` then sorts the variables into batch, head, query, key and feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnopt.analysis import anchors as A
from attnopt.analysis import nodes as N
from attnopt.analysis import views, visible
from attnopt.analysis.bodies import bodies, left_inside
from attnopt.analysis.contraction import Contraction, contraction
from attnopt.analysis.layout import RawSite, Refusal, arrange
from attnopt.analysis.lift import Lifter
from attnopt.analysis.scores import find_scores, of_tuple, output_index, variables, without_scale
from attnopt.analysis.site import AttentionSite, Rejection
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Weightless

Constants = Callable[[fx.Node], torch.Tensor | None]


def find_sites(graph: fx.Graph, constants: Constants = lambda _: None, written: frozenset[fx.Node] = frozenset()) -> list[AttentionSite | Rejection]:
    """Every attention of ``graph`` and every softmax that is none, in graph order, each named by where it stands."""
    finder = _Finder(graph, constants, written)
    order = {n: i for i, n in enumerate(graph.nodes)}
    found = [(s, s.node) for s in (*finder.softmaxes(), *finder.calls())]
    for call, body in bodies(graph):
        found += [(left_inside(s, call), call) for s in find_sites(body)]
    found.sort(key=lambda x: order[x[1]])
    return _named(found)


def _named(found: list[tuple[AttentionSite | Rejection, fx.Node]]) -> list[AttentionSite | Rejection]:
    """The sites, with names and lines: their own, or those of the node of the main graph by which they are reached."""
    counts: dict[str, int] = {}
    for s, reached in found:
        name = N.module_path(s.node) or N.module_path(reached) or "model"
        counts[name] = counts.get(name, 0) + 1
        s.name = name if counts[name] == 1 else f"{name}#{counts[name]}"
        s.source = N.source(s.node) or N.source(reached)
    return [s for s, _ in found]


class _Finder:
    def __init__(self, graph: fx.Graph, constants: Constants, written: frozenset[fx.Node]) -> None:
        self.graph = graph
        self.constants = constants
        self.written = written
        self.anchors = {a.probs: a for a in A.find(graph)}

    def lifter(self, of: fx.Node) -> Lifter:
        """For an attention that computes in the precision of ``of``."""
        return Lifter(self.constants, self.written, N.value(of).dtype is torch.float64)

    # -------------------------------------------------------------------------------------------- softmax

    def softmaxes(self) -> Iterable[AttentionSite | Rejection]:
        products: dict[fx.Node, list[_Product]] = {}
        for node in self.graph.nodes:
            for p in self._products(node):
                products.setdefault(p.anchor.probs, []).append(p)
        for anchor in self.anchors.values():
            try:
                yield self._site(anchor, products.get(anchor.probs, []))
            except Refusal as r:
                yield Rejection(r.code, r.message, r.node or anchor.probs, anchor.probs)

    def _products(self, node: fx.Node) -> Iterable[_Product]:
        """Contractions one side of which is the probabilities of an anchor, through views, casts and dropout.

        Exponentials are divided by their sum after the product: then the site's output is the quotient.
        """
        index = output_index(node)
        if index is None:
            return
        product, at = node, index
        below: fx.Node | None = None
        if _is_quotient(node):
            product, below = (x for x in node.args[:2] if isinstance(x, fx.Node))
            while (moved := views.step(product, at)) is not None:
                product, at = moved
        found = contraction(product, at, "k")
        if found is None:
            return
        for probs, p_index, values, v_index in (
            (found.left, found.left_index, found.right, found.right_index),
            (found.right, found.right_index, found.left, found.left_index),
        ):
            trail = self._to_probs(probs, p_index)
            if trail is not None and (below is None or trail[0].denominator is not None):
                yield _Product(found, *trail, values, v_index, index, node, below)

    def _to_probs(self, node: fx.Node, index: views.Index) -> tuple[A.Anchor, views.Index, float, bool, list[fx.Node]] | None:
        dropout, zeroed = 0.0, False
        trail: list[fx.Node] = []
        while node not in self.anchors:
            trail.append(node)
            name = N.op_name(node)
            moved = views.step(node, index)
            if moved is not None:
                node, index = moved
                continue
            if name in ("aten::to", "aten::_to_copy", "aten::type_as", "aten::float", "aten::half") and N.kind(node) == "float":
                node = N.arguments(node)["self"]
            elif name == "aten::dropout":
                args = N.arguments(node)
                if args["train"]:
                    dropout = 1 - (1 - dropout) * (1 - args["p"])
                node = args["input"]
            elif name == "aten::nan_to_num" and not N.arguments(node).get("nan"):
                zeroed = True
                node = N.arguments(node)["self"]
            else:
                return None
            if not N.is_tensor(node) or N.kind(node) != "float":
                return None
        return self.anchors[node], index, dropout, zeroed, trail

    def _site(self, anchor: A.Anchor, products: list[_Product]) -> AttentionSite:
        if not products:
            raise self._no_product(anchor)
        if N.shape(anchor.logits)[anchor.axis] is E.ONE:
            raise Refusal("AO202", f"the softmax of {N.said(anchor.logits)} runs along axis {anchor.axis} of size one, where it is always one; supported are several keys.", anchor.probs)
        if anchor.denominator is not None:
            products = self._normalised(anchor, products)
        if len(products) > 1:
            tensors = ", ".join(N.said(p.values) for p in products)
            raise Refusal("AO203", f"the probabilities are multiplied with {len(products)} tensors ({tensors}); supported is one.", products[1].form.node)
        p = products[0]
        key = p.form.summed
        start = E.sub(p.index[anchor.axis], key)
        if not start.is_const and not (variables(p.index) & variables(p.value_index)) - {key}:
            raise Refusal("AO204", f"the probabilities are mixed by {N.said(p.form.node)} before they meet the values; supported are views, casts, dropout and nan_to_num.", p.form.node)
        if not start.is_const:
            raise Refusal(
                "AO205",
                f"softmax runs along axis {anchor.axis} of {N.said(anchor.logits)}, and the product with the values, {N.said(p.form.node)}, "
                f"sums another axis, of size {key.extent}; supported is one axis for both.",
                p.form.node,
            )
        if any(key in x.leaves for i, x in enumerate(p.index) if i != anchor.axis):
            text = f"the summed axis, of size {key.extent}, appears in two axes of the probabilities {N.said(anchor.probs)}; supported is one."
            raise Refusal("AO205", text, p.form.node)
        if p.form.alpha is not E.FONE or p.form.addend is not None:
            what = N.said(p.form.addend) if p.form.addend is not None else f"the factor {p.form.alpha}"
            raise Refusal("AO204", f"the product of probabilities and values adds another tensor or a factor: {what}; supported is the product alone.", p.form.node)
        lifter = self.lifter(p.values)
        qk = find_scores(lifter, anchor, p.index, key)
        logits = lifter.lift(anchor.logits, p.index, qk.hook(lifter))
        sink = self._sink(lifter, anchor, p, start, qk.form.node)
        region = self._region(qk.form.node, p.output, anchor)
        self._closed(region, p.output)
        left_has_key = key in variables(qk.form.left_index)
        q, k = ((qk.form.right, qk.form.right_index), (qk.form.left, qk.form.left_index)) if left_has_key else ((qk.form.left, qk.form.left_index), (qk.form.right, qk.form.right_index))
        q, q_scale = without_scale(*q)
        k, k_scale = without_scale(*k)
        if q_scale * k_scale != 1.0:
            logits = E.substitute(logits, {E.score(): E.mul(E.const(q_scale * k_scale), E.score())})
        empty: Weightless = "zero" if p.zeroed or anchor.empty == "zero" else "nan"
        operands = (q, k, (p.values, p.value_index))
        raw = RawSite(
            p.output, p.out, key, qk.form.summed, *operands, logits, empty, p.dropout, frozenset(region), sink, anchor.underflows, qk.form.node, A.in_half(anchor.logits)
        )
        inside = [of_tuple(x.value) for e in (logits, sink) if e is not None for x in e.leaves if x.op == "load" and x.value in region]
        if inside:
            node = inside[0]
            raise Refusal("AO212", f"the scores pass through {N.said(node)} before the softmax; supported are views and pointwise operators.", node)
        return arrange(raw, anchor.probs, lifter.folded)

    def _sink(self, lifter: Lifter, anchor: A.Anchor, p: _Product, start: Expr, scores: fx.Node) -> Expr | None:
        """The logit that takes weight and has no value: one in the sum of exponentials only, or one of a column that the product leaves out."""

        def row(x: Expr) -> views.Index:
            return (*p.index[: anchor.axis], x, *p.index[anchor.axis + 1 :])

        if anchor.sink is not None:
            return E.const(anchor.sink) if isinstance(anchor.sink, float) else lifter.lift(anchor.sink, views.broadcast(row(E.ZERO), N.shape(anchor.sink)))
        normalised = N.shape(anchor.logits)[anchor.axis]
        assert p.form.summed.extent is not None
        end = E.add(start, p.form.summed.extent)
        left_out = [E.const(i) for i in range(min(int(start.value), 2))]
        after = _difference(normalised, end, anchor, p)
        if start.value < 0 or not after.is_const or len(left_out) + after.value > 1:
            raise Refusal(
                "AO205",
                f"softmax normalises over {normalised} keys and the product with the values ({N.said(p.form.node)}) uses {p.form.summed.extent} of them; "
                "supported are all, or all but one.",
                p.form.node,
            )
        left_out += [E.sub(normalised, E.ONE)] * int(after.value)
        if not left_out:
            return None
        sink = lifter.lift(anchor.logits, row(left_out[0]))
        if p.form.summed in sink.leaves or any(x is E.score() or (x.op == "load" and x.value is scores) for x in sink.leaves):
            raise Refusal(
                "AO205",
                f"softmax normalises over {normalised} keys, and the product with the values ({N.said(p.form.node)}) leaves out one that is a score or depends on the keys; "
                "supported is to leave out one logit beside the scores.",
                p.form.node,
            )
        return None if sink.is_const and sink.value <= visible.HIDDEN else E.as_float(sink)

    def _no_product(self, anchor: A.Anchor) -> Refusal:
        users = list(anchor.probs.users)
        lifter = self.lifter(anchor.logits)
        index = tuple(E.ZERO if n is E.ONE else E.var("k" if i == anchor.axis else f"i{i}", n) for i, n in enumerate(N.shape(anchor.logits)))
        try:
            find_scores(lifter, anchor, index, index[anchor.axis])
        except Refusal as r:
            if r.code == "AO212":  # an attention all the same, of a form that neither side of the softmax shows
                return r
            readers = ", ".join(sorted({N.op_name(u) or ("the model's output" if u.op == "output" else str(u.target)) for u in users})) or "nothing"
            return Refusal(
                "AO201",
                f"the softmax's result, {N.said(anchor.probs)}, is read by {readers} and not multiplied with values along axis {anchor.axis}; supported is a product that sums over that axis.",
                anchor.probs,
            )
        if any(u.op == "output" for u in users):
            return Refusal("AO203", f"the probabilities, {N.said(anchor.probs)}, are returned by the model; supported is that only the product with the values reads them.", anchor.probs)
        between = self._between(anchor)
        if between is None:
            return Refusal("AO204", f"nothing multiplies the probabilities, {N.said(anchor.probs)}, with values; supported is a product that reads them.", anchor.probs)
        return Refusal("AO204", f"between softmax and the values stands {N.said(between)}; supported are views, casts, dropout and nan_to_num.", between)

    def _between(self, anchor: A.Anchor) -> fx.Node | None:
        """The first reader of the probabilities, behind views, casts and dropout, that the search for their product does not look through."""
        stack = [anchor.probs]
        while stack:
            for u in stack.pop(0).users:
                index = output_index(u)
                if index is not None and N.kind(u) == "float" and (self._to_probs(u, index) or (None,))[0] is anchor:
                    stack.append(u)
                elif u.op != "output" and N.op_name(u) != "aten::sym_size":
                    return u
        return None

    def _normalised(self, anchor: A.Anchor, products: list[_Product]) -> list[_Product]:
        """The products that are divided by the sum of the exponentials, for ``exp(x) @ v / exp(x).sum()``."""
        out: list[_Product] = []
        for p in products:
            if p.below is None:
                continue
            below = self.lifter(p.values).lift(p.below, views.broadcast(p.out, N.shape(p.below)))
            expected = self.lifter(p.values).lift(anchor.denominator, tuple(E.ZERO if i == anchor.axis else x for i, x in enumerate(p.index)))  # type: ignore[arg-type]
            if below is expected:
                out.append(p)
        if not out:
            raise Refusal(
                "AO204",
                f"the exponentials, {N.said(anchor.probs)}, are multiplied with values and never divided by their sum along axis {anchor.axis}; "
                "supported is a division by it before or after the product.",
                products[0].form.node,
            )
        return out

    # -------------------------------------------------------------------------------------------- existing calls

    def calls(self) -> Iterable[AttentionSite | Rejection]:
        for node in A.calls(self.graph):
            try:
                yield self._call(node)
            except Refusal as r:
                yield Rejection(r.code, r.message, r.node or node, node)

    def _call(self, node: fx.Node) -> AttentionSite:
        args = N.arguments(node)
        q, k, v = args["query"], args["key"], args["value"]
        sq, sk, sv = N.shape(q), N.shape(k), N.shape(v)
        out = output_index(node)
        if out is None or len(sq) < 2:
            raise Refusal("AO208", f"the call's operands are {', '.join(N.said(x) for x in (q, k, v))}; supported are tensors of at least two axes.", node)
        key, d = E.var("k", sk[-2]), E.var("d", sq[-1])
        batch = out[:-2]
        shared = batch
        if args.get("enable_gqa") and len(batch) and sk[-3] is not sq[-3]:
            shared = (*batch[:-1], E.floordiv(batch[-1], E.floordiv(sq[-3], sk[-3])))
        q_index = (*views.broadcast(batch, sq[:-2]), out[-2], d)
        k_index = (*views.broadcast(shared, sk[:-2]), key, d)
        v_index = (*views.broadcast(shared, sv[:-2]), key, E.ZERO if sv[-1] is E.ONE else out[-1])
        scale = args.get("scale")
        if scale is None:
            if not sq[-1].is_const:
                text = f"the default scale needs a constant head size, and that of the queries, {N.said(q)}, is {sq[-1]}; supported is a fixed last axis, or scale= as a number."
                raise Refusal("AO208", text, node)
            factor: Expr | None = E.const(float(sq[-1].value) ** -0.5)
        else:
            factor = N.scalar(scale)
        if factor is None:
            raise Refusal("AO208", f"scale is {_number(scale)}, which is only known when the graph runs; supported is a constant.", node)
        lifter = self.lifter(q)
        logits = E.mul(factor, E.score())
        hidden = E.const(float("-inf"))
        if args.get("is_causal"):
            logits = E.where(E.le(key, out[-2]), logits, hidden)
        mask = args.get("attn_mask")
        if mask is not None:
            x = lifter.lift(mask, views.broadcast((*batch, out[-2], key), N.shape(mask)))
            logits = E.where(x, logits, hidden) if x.kind == "bool" else E.add(logits, E.as_float(x))
        dropout = args.get("dropout_p", 0.0)
        if not isinstance(dropout, (int, float)):
            raise Refusal("AO208", f"dropout_p is {_number(dropout)}, which is only known when the graph runs; supported is a constant.", node)
        raw = RawSite(node, out, key, d, (q, q_index), (k, k_index), (v, v_index), logits, "zero", float(dropout), frozenset({node}))
        return arrange(raw, node, lifter.folded)

    # -------------------------------------------------------------------------------------------- region

    def _region(self, first: fx.Node, last: fx.Node, anchor: A.Anchor) -> set[fx.Node]:
        """Every node that depends on ``first`` and that ``last`` depends on, both included."""
        down, stack = {first}, [first]
        while stack:
            for u in stack.pop().users:
                if u not in down:
                    down.add(u)
                    stack.append(u)
        up, stack = {last}, [last]
        while stack:
            for u in stack.pop().all_input_nodes:
                if u in down and u not in up:
                    up.add(u)
                    stack.append(u)
        return up

    def _closed(self, region: set[fx.Node], output: fx.Node) -> None:
        for n in region - {output}:
            for u in n.users:
                if u not in region:
                    who = "returned by the model" if u.op == "output" else f"also used by {N.said(u)}"
                    at = "" if u.op == "output" or not N.source(u) else f" at {N.source(u).rpartition('/')[2]}"
                    raise Refusal("AO203", f"a value inside the attention, {N.said(n)}, is {who}{at}; supported is that only the attention itself reads it.", n)


@dataclass(frozen=True)
class _Product:
    """A product of an anchor's probabilities, read at ``index``, with ``values`` at ``value_index``."""

    form: Contraction
    anchor: A.Anchor
    index: views.Index
    dropout: float
    zeroed: bool
    trail: list[fx.Node]
    values: fx.Node
    value_index: views.Index
    out: views.Index
    output: fx.Node
    """The product itself, or its quotient by ``below``; ``out`` is its index."""
    below: fx.Node | None


def _difference(normalised: Expr, end: Expr, anchor: A.Anchor, p: _Product) -> Expr:
    """How many more keys softmax sees than the product with the values, by the shapes' own relations where they are sums of sizes."""
    out = E.sub(normalised, end)
    axes = [i for i, x in enumerate(p.value_index) if x is p.form.summed]
    if out.is_const or len(axes) != 1:
        return out
    sees, has = N.value(anchor.logits).shape[anchor.axis], N.value(p.values).shape[axes[0]]
    start = E.sub(end, N.shape(p.values)[axes[0]])
    return next((E.const(n) for n in (0, 1) if start.is_const and statically_known_true(sees == has + int(start.value) + n)), out)


def _number(x: object) -> str:
    """An argument that is a number, by the name that it has in the graph."""
    return str(N.value(x)) if isinstance(x, fx.Node) else str(x)


def _is_quotient(node: fx.Node) -> bool:
    """A tensor divided by a tensor, elementwise and without rounding."""
    if N.op_name(node) != "aten::div" or N.arguments(node).get("rounding_mode") is not None:
        return False
    above, below = node.args[:2]
    return N.is_tensor(above) and N.is_tensor(below) and N.shape(above) == N.shape(node)  # type: ignore[arg-type]
