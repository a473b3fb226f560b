"""Where an attention may stand: every softmax, in all its spellings, and every existing attention call.

A softmax anchor says which node holds the probabilities, which the logits, along which axis, and what an all-masked row
gives. ``exp(x) / sum(exp(x))`` divides before or after the product with the values: in the latter case the probabilities
are not normalised, and ``denominator`` is the sum that the product is divided by.

Softmax does not see what is subtracted from all logits of a row alike, so a shift of that form (the row's maximum, usually)
is left out. What is added to the sum of exponentials is one more logit without a key, a ``sink``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.ir import expr as E


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
    sink: fx.Node | float | None = None
    """A logit that only the sum of exponentials has: a number, or a node of size one along the axis."""
    underflows: bool = False
    """Exponentials are taken without a shift: a row of fills, finite ones too, sums to zero and gives what one of -inf does."""


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


def in_half(logits: fx.Node) -> bool:
    """Whether logits are rounded to float16, before casts to a wider dtype."""
    while N.value(logits).dtype is not torch.float16:
        if N.op_name(logits) not in _CASTS | {"aten::float"}:
            return False
        logits = N.arguments(logits)["self"]
    return True


def _plain(node: fx.Node, empty: Literal["nan", "zero"]) -> Anchor | None:
    args = N.arguments(node)
    x = args["self"]
    if not N.is_tensor(x):
        return None
    axis = N.axis(args["dim"], len(N.shape(x)))
    logits, shift = _without_shift(x, axis)
    return Anchor(node, logits, axis, empty, frozenset() if shift is None else frozenset({x}))


def _without_shift(x: fx.Node, axis: int) -> tuple[fx.Node, fx.Node | None]:
    """``x`` and the tensor, the same along ``axis``, that is subtracted to make it; ``x`` itself and None when none is."""
    if N.op_name(x) != "aten::sub":
        return x, None
    args = N.arguments(x)
    of, shift = args["self"], args["other"]
    if not (N.is_tensor(of) and N.is_tensor(shift)) or args.get("alpha", 1) != 1 or N.shape(of) != N.shape(x) or N.kind(of) != "float":
        return x, None
    extents = N.shape(shift)
    if len(extents) != len(N.shape(x)) or extents[axis] is not E.ONE or N.shape(x)[axis] is E.ONE:
        return x, None
    return of, shift


def _exp(node: fx.Node) -> Anchor | None:
    """exp(x) or exp(x - shift) over its sum, with or without a sink in it, exp(x - logsumexp(x)), exp(log_softmax(x))."""
    x = node.args[0]
    if not isinstance(x, fx.Node) or not N.is_tensor(x):
        return None
    if N.op_name(x) in ("aten::log_softmax", "aten::_log_softmax", "aten::special_log_softmax"):
        args = N.arguments(x)
        return Anchor(node, args["self"], N.axis(args["dim"], len(N.shape(x))), "nan", frozenset({x}))
    if N.op_name(x) == "aten::sub" and N.arguments(x).get("alpha", 1) == 1:
        args = N.arguments(x)
        normaliser = _row_reduction(args["other"], args["self"])
        if normaliser is not None and normaliser.op == "logsumexp":
            return Anchor(node, args["self"], normaliser.axis, "nan", frozenset({x, *normaliser.nodes}))
    for user in node.users:
        total = _total(user, node)
        if total is None:
            continue
        logits, shift = _without_shift(x, total.axis)
        interior = {node, *total.nodes} | ({x} if shift is not None else set())
        for below, sink in _denominators(total, shift):
            for quotient in below.users:
                if N.op_name(quotient) == "aten::div" and quotient.args[0] is node and quotient.args[1] is below and N.arguments(quotient).get("rounding_mode") is None:
                    return Anchor(quotient, logits, total.axis, "nan", frozenset(interior | {below}), sink=sink, underflows=shift is None)
        return Anchor(node, logits, total.axis, "nan", frozenset(interior), denominator=total.nodes[0], underflows=shift is None)
    return None


def _denominators(total: _Reduction, shift: fx.Node | None) -> Iterable[tuple[fx.Node, fx.Node | float | None]]:
    """What exponentials may be divided by to be probabilities: their sum, or their sum and a sink, with that sink."""
    for node in total.nodes:
        yield node, None
        for user in node.users:
            args = N.arguments(user)
            if N.op_name(user) == "aten::add" and args.get("alpha", 1) == 1:
                sink = _sink(args["other"] if args["self"] is node else args["self"], shift)
                if sink is not None and (isinstance(sink, float) or _is_row(sink, total.axis, len(N.shape(node)))):
                    yield user, sink


def _is_row(node: fx.Node, axis: int, rank: int) -> bool:
    """Whether ``node``, broadcast to ``rank`` axes, is the same all along ``axis``."""
    at = axis - (rank - len(N.shape(node)))
    return at < 0 or N.shape(node)[at] is E.ONE


def _sink(x: object, shift: fx.Node | None) -> fx.Node | float | None:
    """The logit whose exponential, with the row's shift taken off, is ``x``; None when x is not known to be one."""
    if isinstance(x, (int, float)):
        return math.log(x) if x > 0 and shift is None else None
    if not isinstance(x, fx.Node) or N.op_name(x) != "aten::exp":
        return None
    y = x.args[0]
    if not isinstance(y, fx.Node) or shift is None:
        return y if isinstance(y, fx.Node) else None
    if N.op_name(y) == "aten::neg" and y.args[0] is shift:
        return 0.0
    if N.op_name(y) in ("aten::sub", "aten::rsub"):
        args = N.arguments(y)
        a, b = (args["self"], args["other"]) if N.op_name(y) == "aten::sub" else (args["other"], args["self"])
        if b is shift and args.get("alpha", 1) == 1:
            return float(a) if isinstance(a, (int, float)) else a if N.is_tensor(a) else None
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
