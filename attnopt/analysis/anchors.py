"""Where an attention may stand: every softmax, in all its spellings, and every existing attention call.

A softmax anchor says which node holds the probabilities, which the logits, along which axis, and what an all-masked row
gives. ``exp(x) / sum(exp(x))`` divides before or after the product with the values: in the latter case the probabilities
are not normalised, and ``denominator`` is the sum that the product is divided by.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from attnopt.analysis import nodes as N


@dataclass(frozen=True)
class Anchor:
    probs: fx.Node
    logits: fx.Node
    axis: int
    """The normalised axis of ``logits``, counted from the left."""
    empty: Literal["nan", "zero"] = "nan"
    """What a row of -inf gives."""
    interior: frozenset[fx.Node] = field(default_factory=frozenset)
    """Nodes of the spelling itself between logits and probabilities."""
    denominator: fx.Node | None = None


_SOFTMAX = {"aten::softmax", "aten::_softmax", "aten::special_softmax"}
_CASTS = {"aten::to", "aten::_to_copy", "aten::detach", "aten::alias"}


def find(graph: fx.Graph) -> list[Anchor]:
    """All softmax anchors, in graph order. A node is the logits of at most one."""
    out: list[Anchor] = []
    for node in graph.nodes:
        name = N.op_name(node)
        found: Anchor | None = None
        if name in _SOFTMAX:
            found = _plain(node, "nan")
        elif name == "aten::_safe_softmax":
            found = _plain(node, "zero")
        elif name == "aten::exp":
            found = _exp(node)
        if found is not None:
            out.append(found)
    return out


def calls(graph: fx.Graph) -> list[fx.Node]:
    """Existing attention calls."""
    return [n for n in graph.nodes if N.op_name(n) == "aten::scaled_dot_product_attention"]


def _plain(node: fx.Node, empty: Literal["nan", "zero"]) -> Anchor | None:
    args = N.arguments(node)
    x = args["self"]
    if not N.is_tensor(x):
        return None
    return Anchor(node, x, N.axis(args["dim"], len(N.shape(x))), empty)


def _exp(node: fx.Node) -> Anchor | None:
    """exp(x) or exp(x - max) over its sum, exp(x - logsumexp(x)), exp(log_softmax(x))."""
    x = node.args[0]
    if not isinstance(x, fx.Node) or not N.is_tensor(x):
        return None
    rank = len(N.shape(x))
    if N.op_name(x) in ("aten::log_softmax", "aten::_log_softmax", "aten::special_log_softmax"):
        args = N.arguments(x)
        return Anchor(node, args["self"], N.axis(args["dim"], rank), "nan", frozenset({x}))
    logits, interior, axis = x, set[fx.Node](), None
    if N.op_name(x) == "aten::sub" and N.arguments(x).get("alpha", 1) == 1:
        args = N.arguments(x)
        shift = _row_reduction(args["other"], args["self"])
        if shift is not None:
            logits, interior, axis = args["self"], {x, *shift.nodes}, shift.axis
            if shift.op == "logsumexp":
                return Anchor(node, logits, axis, "nan", frozenset(interior))
    for user in node.users:
        total = _total(user, node)
        if total is None or (axis is not None and total.axis != axis):
            continue
        chain = {node, *total.nodes}
        for quotient in {u for n in chain for u in n.users} - chain:
            if N.op_name(quotient) == "aten::div" and quotient.args[0] is node and quotient.args[1] in chain and N.arguments(quotient).get("rounding_mode") is None:
                return Anchor(quotient, logits, total.axis, "nan", frozenset(interior | chain))
        return Anchor(node, logits, total.axis, "nan", frozenset(interior | set(total.nodes)), denominator=total.nodes[0])
    return None


@dataclass(frozen=True)
class _Reduction:
    op: str
    axis: int
    nodes: tuple[fx.Node, ...]
    """The reduction and what is made of it (values of max, unsqueeze), last one first."""


def _row_reduction(node: object, of: object) -> _Reduction | None:
    """max, amax or logsumexp of ``of`` along one axis, kept as an axis of size one."""
    trail: list[fx.Node] = []
    restored: int | None = None
    while isinstance(node, fx.Node):
        trail.append(node)
        name = N.op_name(node)
        if name in _CASTS or (name == "getitem" and node.args[1] == 0):
            node = node.args[0]
        elif name == "aten::unsqueeze":
            restored = N.axis(node.args[1], len(N.shape(node)))  # type: ignore[arg-type]
            node = node.args[0]
        elif name in ("aten::max", "aten::amax", "aten::logsumexp"):
            args = N.arguments(node)
            return _reduction(name.removeprefix("aten::"), args, of, restored, trail)
        else:
            return None
    return None


def _total(node: fx.Node, of: fx.Node) -> _Reduction | None:
    """sum of ``of`` along one axis, kept as an axis of size one."""
    if N.op_name(node) != "aten::sum":
        return None
    args = N.arguments(node)
    found = _reduction("sum", args, of, None, [node])
    if found is not None:
        return found
    for user in node.users:
        if N.op_name(user) == "aten::unsqueeze":
            return _reduction("sum", args, of, N.axis(user.args[1], len(N.shape(user))), [user, node])  # type: ignore[arg-type]
    return None


def _reduction(op: str, args: dict[str, object], of: object, restored: int | None, trail: list[fx.Node]) -> _Reduction | None:
    if args.get("self") is not of or not isinstance(of, fx.Node):
        return None
    dim = args.get("dim")
    which = [dim] if isinstance(dim, int) else list(dim) if isinstance(dim, (list, tuple)) else []
    if len(which) != 1:
        return None
    axis = N.axis(which[0], len(N.shape(of)))
    if not args.get("keepdim") and restored != axis:
        return None
    return _Reduction(op, axis, tuple(trail))
