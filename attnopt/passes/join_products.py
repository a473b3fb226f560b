"""Products over parts of the keys become one product over all of them.

A block sparse attention multiplies queries with several groups of keys, concatenates the scores, and sums the products of
the parts of the probabilities with the values of each group. That is one attention over the concatenated keys and values.
A sum of two products, as of positions apart from contents, is one product over the concatenated features::

    cat([f(q @ k1), g(q @ k2)], -1)            ->  s = q @ cat([k1, k2]);  cat([f(s[..., :n]), g(s[..., n:])], -1)
    p[..., :n] @ v1 + p[..., n:] @ v2           ->  p @ cat([v1, v2])
    softmax(f(q1 @ k1 + q2 @ k2))               ->  softmax(f(cat([q1, q2], -1) @ cat([k1, k2], -1)))
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis import views
from attnopt.analysis.contraction import Contraction, contraction
from attnopt.analysis.views import Index
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.index import View
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.edit import ORIGINAL, Editor, aten


@dataclass(frozen=True)
class JoinProducts:
    name: str = "join-products"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        graph = module.graph
        changed = False
        for node in list(graph.nodes):
            changed |= _join_scores(graph, node) or _join_values(graph, node) or _join_features(graph, node)
        if changed:
            graph.eliminate_dead_code()
        return PassResult(changed)


_Operand = tuple[fx.Node, list[View]]


def _outer(node: fx.Node) -> Index:
    """A variable for each axis of ``node`` but the last, the same for all parts."""
    return tuple(E.ZERO if n is E.ONE else E.var(f"o{i}", n) for i, n in enumerate(N.shape(node)[:-1]))


# ------------------------------------------------------------------------------------------------ scores


def _join_scores(graph: fx.Graph, node: fx.Node) -> bool:
    """``node`` concatenates scores along its last axis, each part made of a product with the same queries."""
    if N.op_name(node) not in ("aten::cat", "aten::concat"):
        return False
    args = N.arguments(node)
    parts = list(args["tensors"])
    rank = len(N.shape(node))
    if len(parts) < 2 or rank < 3 or N.axis(args["dim"], rank) != rank - 1 or any(len(N.shape(p)) != rank for p in parts):
        return False
    forms = [_product_in(p) for p in parts]
    keys: list[_Operand] = []
    queries: tuple[fx.Node, Index] | None = None
    for form in forms:
        found = None if form is None else _sides(form, _outer(node))
        if form is None or found is None or (queries is not None and found[0] != queries):
            return False
        queries = found[0]
        keys.append(found[1])
    assert queries is not None
    products = [f.node for f in forms if f is not None]
    if len(set(products)) != len(products):
        return False
    features = forms[0].summed if forms[0] is not None else E.ZERO
    q = views.source(*queries, (*_outer(node), features))
    order = {n: i for i, n in enumerate(graph.nodes)}
    reader = min((u for p in products for u in p.users), key=order.__getitem__)
    if q is None or any(order[x] >= order[reader] for x, _ in (q, *keys)):
        return False  # some keys are made of the first scores
    edit = Editor(graph, reader)
    batch = [edit.size(n) for n in N.shape(node)[:-2]]
    joined = edit.call(aten.cat.default, [_expanded(edit, k, batch) for k in keys], rank - 2)
    scores = edit.matmul(edit.views(*q), edit.call(aten.transpose.int, joined, -1, -2))
    start: Expr = E.ZERO
    for p in products:
        end = E.add(start, N.shape(p)[-1])
        p.replace_all_uses_with(edit.call(aten.slice.Tensor, scores, rank - 1, edit.size(start), edit.size(end)))
        start = end
    return True


def _product_in(part: fx.Node) -> Contraction | None:
    """The one product among what ``part`` is made of by elementwise operators; the others have operands of other shapes, or none."""
    stack, found = [part], list[Contraction]()
    while stack:
        node = stack.pop()
        if not N.is_tensor(node) or N.shape(node) != N.shape(part) or len(node.users) != 1:
            continue
        key = E.var("k", N.shape(node)[-1])
        form = contraction(node, (*_outer(node), key), "d")
        if form is not None:
            found.append(form)
        elif N.op_name(node) in _ELEMENTWISE:
            stack.extend(node.all_input_nodes)
    return found[0] if len(found) == 1 else None


_ELEMENTWISE = {f"aten::{n}" for n in ("add", "sub", "mul", "div", "masked_fill", "where", "to", "tanh", "dropout", "clamp")}


def _sides(form: Contraction, outer: Index) -> tuple[tuple[fx.Node, Index], _Operand] | None:
    """The queries and, as views to [..., keys, features], the keys of a product of both."""
    key = E.var("k", N.shape(form.node)[-1])
    if form.alpha is not E.FONE or form.addend is not None:
        return None
    sides = [(form.left, form.left_index), (form.right, form.right_index)]
    if key.extent is E.ONE:  # an axis of size one has no variable: the keys are the side without the queries' axis
        with_key = [s for s in sides if not any(outer[-1] in i.variables for i in s[1])]
    else:
        with_key = [s for s in sides if any(key in i.variables for i in s[1])]
    if len(with_key) != 1:
        return None
    (keys,) = with_key
    (queries,) = [s for s in sides if s is not keys]
    if any(outer[-1] in i.variables for i in keys[1]) and outer[-1] is not E.ZERO:
        return None
    found = views.source(*keys, (*outer[:-1], key, form.summed))
    return None if found is None else (queries, found)


# ------------------------------------------------------------------------------------------------ values


def _join_values(graph: fx.Graph, node: fx.Node) -> bool:
    """``node`` is the last of the additions of products that each take a slice of the same tensor's last axis."""
    if N.op_name(node) != "aten::add" or any(N.op_name(u) == "aten::add" and N.shape(u) == N.shape(node) and _parts(u) for u in node.users):
        return False
    parts = _parts(node)
    if parts is None or len(parts) < 2:
        return False
    probabilities = parts[0].weights
    parts = sorted(parts, key=lambda p: int(p.start.value))
    ends = [E.add(p.start, p.key) for p in parts]
    whole = [E.ZERO, *ends] == [*(p.start for p in parts), N.shape(probabilities)[-1]]
    if not whole or any(p.weights is not probabilities for p in parts):
        return False
    edit = Editor(graph, node)
    batch = [edit.size(n) for n in N.shape(node)[:-2]]
    values = edit.call(aten.cat.default, [_expanded(edit, p.values, batch) for p in parts], len(N.shape(node)) - 2)
    new = edit.matmul(probabilities, values)
    new.meta[ORIGINAL] = node.name
    node.replace_all_uses_with(new)
    return True


@dataclass(frozen=True)
class _Part:
    weights: fx.Node
    start: Expr
    key: Expr
    """How many keys the slice has."""
    values: _Operand


def _parts(node: fx.Node) -> list[_Part] | None:
    """The summands of a tree of additions, if each is such a product."""
    if N.op_name(node) == "aten::add" and N.is_tensor(node.args[0]) and N.is_tensor(node.args[1]) and N.arguments(node).get("alpha", 1) == 1:
        left, right = (_parts(x) if N.shape(x) == N.shape(node) and len(x.users) == 1 else None for x in node.args[:2] if isinstance(x, fx.Node))
        return None if left is None or right is None else [*left, *right]
    found = _part(node)
    return None if found is None else [found]


def _part(node: fx.Node) -> _Part | None:
    if not N.is_tensor(node) or len(N.shape(node)) < 3:
        return None
    outer = _outer(node)
    form = contraction(node, (*outer, E.var("v", N.shape(node)[-1])), "k")
    if form is None or form.alpha is not E.FONE or form.addend is not None:
        return None
    weights = form.left
    if form.left_index != (*outer, form.summed) or N.op_name(weights) != "aten::slice":
        return None
    args = N.arguments(weights)
    whole = args["self"]
    rank = len(outer) + 1
    if N.axis(args["dim"], rank) != rank - 1 or args["step"] != 1 or not N.is_tensor(whole):
        return None
    start = N.scalar(args["start"] or 0)
    if start is not None and start.is_const and start.value < 0:
        start = E.add(N.shape(whole)[-1], start)
    values = views.source(form.right, form.right_index, (*outer[:-1], form.summed, E.var("v", N.shape(node)[-1])))
    if start is None or not start.is_const or start.value < 0 or values is None or form.summed.extent is None:
        return None
    return _Part(whole, start, form.summed.extent, values)


# ------------------------------------------------------------------------------------------------ features


def _join_features(graph: fx.Graph, node: fx.Node) -> bool:
    """``node`` adds two products of queries and keys, of which a softmax is taken later."""
    if N.op_name(node) != "aten::add" or not N.is_tensor(node) or N.arguments(node).get("alpha", 1) != 1 or len(N.shape(node)) < 3:
        return False
    outer = _outer(node)
    parts: list[tuple[_Operand, _Operand]] = []
    for x in node.args[:2]:
        if not isinstance(x, fx.Node) or not N.is_tensor(x) or N.shape(x) != N.shape(node) or len(x.users) != 1:
            return False
        form = contraction(x, (*outer, E.var("k", N.shape(x)[-1])), "d")
        found = None if form is None or min(len(N.shape(form.left)), len(N.shape(form.right))) < 3 else _sides(form, outer)
        queries = None if form is None or found is None else views.source(*found[0], (*outer, form.summed))
        if found is None or queries is None:
            return False
        parts.append((queries, found[1]))
    if not _reaches_softmax(node):
        return False
    edit = Editor(graph, node)
    batch = [edit.size(n) for n in N.shape(node)[:-2]]
    q, k = (edit.call(aten.cat.default, [_expanded(edit, p[i], batch) for p in parts], -1) for i in (0, 1))
    node.replace_all_uses_with(edit.matmul(q, edit.call(aten.transpose.int, k, -1, -2)))
    return True


def _reaches_softmax(node: fx.Node, steps: int = 12) -> bool:
    """Whether a softmax is taken of what elementwise operators and views make of ``node``."""
    here = {node}
    for _ in range(steps):
        here = {u for n in here for u in n.users if N.is_tensor(u) and (N.op_name(u) in _ELEMENTWISE or N.op_name(u) in views.RULES or "softmax" in N.op_name(u))}
        if any("softmax" in N.op_name(n) for n in here):
            return True
    return False


# ------------------------------------------------------------------------------------------------ all


def _expanded(edit: Editor, operand: _Operand, batch: list[int | fx.Node]) -> fx.Node:
    """An operand at the full batch: what is concatenated has to be."""
    x = edit.views(*operand)
    return edit.call(aten.expand.default, x, [*batch, -1, -1])
