"""View-like operators: which element of its input an element of the output is.

``step(node, index)`` gives the input node and the index in it, for an index into the node's own output. One table, one
function an operator; nothing here looks at values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.ir import dims
from attnopt.ir import expr as E
from attnopt.ir.bounds import nonnegative
from attnopt.ir.expr import Expr
from attnopt.ir.index import IndexMap, View

Index = tuple[Expr, ...]
Rule = Callable[[fx.Node, dict[str, Any], Index], tuple[fx.Node, Index] | None]
Step = Callable[[fx.Node, Index], tuple[fx.Node, Index] | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        RULES.update({f"aten::{n}": f for n in names})
        return f

    return register


def step(node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """One step towards the tensor that ``node`` is a view of; None when it is not one."""
    name = N.op_name(node)
    if name == "getitem":
        return _part(node, index)
    found = RULES.get(name)
    if found is None:
        return None
    args = N.arguments(node)
    source = args["tensors"][0] if name == "aten::einsum" else args.get("self")
    if not isinstance(source, fx.Node) or not N.is_tensor(source) or not N.is_tensor(node):
        return None
    return found(source, args, index) if name not in _NEEDS_OUTPUT else found(source, {**args, "out": node}, index)


def source(node: fx.Node, index: Index, out: Sequence[Expr], step: Step = step) -> tuple[fx.Node, list[View]] | None:
    """The tensor furthest up of which ``node[index]`` is a view, and the views of it that give the axes ``out``; None where there is none.

    ``step`` may see through more than views do.
    """
    variables = tuple(E.var(f"one{i}", 1) if x.is_const else x for i, x in enumerate(out))
    best: tuple[fx.Node, list[View]] | None = None
    while True:
        found = IndexMap(variables, index).realise(N.shape(node))
        if found is not None:
            best = node, found
        moved = step(node, index)
        if moved is None:
            return best
        node, index = moved


_NEEDS_OUTPUT = {f"aten::{n}" for n in ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "squeeze", "tile", "repeat")}


@rule("contiguous", "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "positive", "view_copy", "requires_grad_")
def _same(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index]:
    return x, index


@rule("permute")
def _permute(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index]:
    order = [N.axis(d, len(index)) for d in args["dims"]]
    return x, tuple(index[order.index(i)] for i in range(len(order)))


@rule("transpose", "swapaxes", "swapdims")
def _transpose(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index]:
    a, b = (N.axis(args[n], len(index)) for n in (("dim0", "dim1") if "dim0" in args else ("axis0", "axis1")))
    out = list(index)
    out[a], out[b] = out[b], out[a]
    return x, tuple(out)


@rule("mT")
def _flip_last(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index]:
    return x, (*index[:-2], index[-1], index[-2])


@rule("t", "numpy_T")
def _reverse(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index]:
    return x, index[::-1]


@rule("einsum")
def _einsum(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index] | None:
    """Of one operand, no axis of which is summed or taken twice: another order of axes."""
    letters, _, out = args["equation"].replace(" ", "").partition("->")
    if len(args["tensors"]) != 1 or sorted(letters) != sorted(out) or len(set(letters)) != len(letters) or "." in letters:
        return None
    return x, tuple(index[out.index(ch)] for ch in letters)


@rule("movedim", "moveaxis")
def _movedim(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index]:
    source, to = ([a] if isinstance(a, int) else list(a) for a in (args["source"], args["destination"]))
    n = len(index)
    source, to = [N.axis(d, n) for d in source], [N.axis(d, n) for d in to]
    rest = iter(i for i in range(n) if i not in source)
    order = [source[to.index(i)] if i in to else next(rest) for i in range(n)]
    return x, tuple(index[order.index(i)] for i in range(n))


@rule("unsqueeze")
def _unsqueeze(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index]:
    d = N.axis(args["dim"], len(index))
    return x, index[:d] + index[d + 1 :]


@rule("squeeze")
def _squeeze(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index]:
    rank = len(N.shape(x))
    dim = args.get("dim")
    chosen = range(rank) if dim is None else [N.axis(d, rank) for d in ([dim] if isinstance(dim, int) else dim)]
    gone = {d for d in chosen if N.shape(x)[d] is E.ONE}
    rest = iter(index)
    return x, tuple(E.ZERO if d in gone else next(rest) for d in range(rank))


@rule("expand", "expand_as", "broadcast_to")
def _expand(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index]:
    return x, broadcast(index, N.shape(x))


def broadcast(index: Index, shape: Sequence[Expr], result: Sequence[Expr] = ()) -> Index:
    """The index into an operand of ``shape`` for an index into the broadcast result.

    Where ``result`` is given, an axis of size one that is not broadcast keeps its index: it may say more than zero does.
    """
    tail = index[len(index) - len(shape) :]
    stays = [n is E.ONE for n in result[len(result) - len(shape) :]] if result else [False] * len(shape)
    return tuple(E.ZERO if extent is E.ONE and not same else i for i, extent, same in zip(tail, shape, stays, strict=True))


def _from_start(i: Expr, extent: Expr) -> Expr | None:
    """An index that counts from the end when it is negative, counted from the start; None when its sign is not known."""
    if nonnegative(i):
        return i
    return E.add(extent, i) if nonnegative(E.sub(E.neg(i), E.ONE)) else None


@rule("slice")
def _slice(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index] | None:
    d = N.axis(args["dim"], len(index))
    extent = N.shape(x)[d]
    start = E.ZERO if args.get("start") is None else N.scalar(args["start"])
    step_ = N.scalar(args.get("step", 1))
    at = None if start is None else _from_start(start, extent)
    if start is None or at is None or step_ is None:
        return None
    if at is not start:
        at = E.maximum(at, E.ZERO)
    start = at if at is E.ZERO else E.minimum(at, extent)  # slicing clamps
    return x, (*index[:d], E.add(start, E.mul(step_, index[d])), *index[d + 1 :])


@rule("narrow")
def _narrow(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index] | None:
    d = N.axis(args["dim"], len(index))
    start = N.scalar(args["start"])
    start = None if start is None else _from_start(start, N.shape(x)[d])
    if start is None:
        return None
    return x, (*index[:d], E.add(start, index[d]), *index[d + 1 :])


@rule("select")
def _select(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index] | None:
    d = N.axis(args["dim"], len(index) + 1)
    at = N.scalar(args["index"])
    at = None if at is None else _from_start(at, N.shape(x)[d])
    if at is None:
        return None
    return x, (*index[:d], at, *index[d:])


@rule("flip")
def _flip(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index]:
    chosen = {N.axis(d, len(index)) for d in args["dims"]}
    extents = N.shape(x)
    return x, tuple(E.sub(E.sub(extents[d], E.ONE), i) if d in chosen else i for d, i in enumerate(index))


@rule("repeat_interleave")
def _repeat_interleave(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index] | None:
    times = N.scalar(args.get("repeats"))
    if times is None or args.get("dim") is None:
        return None
    d = N.axis(args["dim"], len(index))
    return x, (*index[:d], E.floordiv(index[d], times), *index[d + 1 :])


@rule("repeat", "tile")
def _repeat(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index]:
    extents = N.shape(x)
    tail = index[len(index) - len(extents) :]
    repeated = N.shape(args["out"])[len(index) - len(extents) :]
    return x, tuple(E.ZERO if n is E.ONE else i if n is out else E.mod(i, n) for i, n, out in zip(tail, extents, repeated, strict=True))


@rule("roll")
def _roll(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index] | None:
    shifts = args["shifts"] if isinstance(args["shifts"], (list, tuple)) else [args["shifts"]]
    chosen = args["dims"] if isinstance(args["dims"], (list, tuple)) else [args["dims"]]
    if len(shifts) != len(chosen):
        return None
    out = list(index)
    for s, d in zip(shifts, chosen, strict=True):
        amount = N.scalar(s)
        if amount is None:
            return None
        a = N.axis(d, len(index))
        out[a] = E.mod(E.sub(out[a], amount), N.shape(x)[a])
    return x, tuple(out)


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as")
def _reshape(x: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index]:
    return x, reindex(N.shape(args["out"]), N.shape(x), index)


def reindex(out: Sequence[Expr], into: Sequence[Expr], index: Index) -> Index:
    """The index into shape ``into`` of the element that stands at ``index`` of shape ``out``, both in row-major order.

    Axes are matched in groups of equal size from the left, so that untouched axes stay plain.
    """
    if tuple(out) == tuple(into):
        return index
    result: list[Expr] = [E.ZERO] * len(into)
    o = [(n, i) for n, i in zip(out, index, strict=True) if n is not E.ONE]
    t = [(n, at) for at, n in enumerate(into) if n is not E.ONE]
    while o and t:
        taken_o, taken_t = 1, 1
        while True:
            po, pt = dims.product([n for n, _ in o[:taken_o]]), dims.product([n for n, _ in t[:taken_t]])
            if po is pt:
                break
            # grow the side that provably lacks factors, the other one otherwise
            if taken_o < len(o) and (taken_t == len(t) or _smaller(po, pt)):
                taken_o += 1
            elif taken_t < len(t):
                taken_t += 1
            else:
                break
        group_o, group_t = o[:taken_o], t[:taken_t]
        o, t = o[taken_o:], t[taken_t:]
        if taken_o == 1 and taken_t == 1:
            result[group_t[0][1]] = group_o[0][1]
            continue
        flat = E.ZERO
        for n, i in group_o:
            flat = E.add(E.mul(flat, n), i)
        for n, at in reversed(group_t[1:]):
            result[at] = E.mod(flat, n)
            flat = E.floordiv(flat, n)
        result[group_t[0][1]] = flat
    return tuple(result)


def _smaller(a: Expr, b: Expr) -> bool:
    return nonnegative(E.sub(b, a))


def _part(node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """An element of a split, chunk or unbind."""
    parent, which = node.args[0], node.args[1]
    if not isinstance(parent, fx.Node) or not isinstance(which, int) or not N.is_tensor(node):
        return None
    name = N.op_name(parent)
    args = N.arguments(parent)
    x = args.get("self")
    if not isinstance(x, fx.Node) or not N.is_tensor(x):
        return None
    if name == "aten::unbind":
        d = N.axis(args["dim"], len(index) + 1)
        return x, (*index[:d], E.const(which), *index[d:])
    if name in ("aten::split", "aten::split_with_sizes", "aten::chunk", "aten::tensor_split", "aten::unsafe_split", "aten::unsafe_chunk"):
        d = N.axis(args.get("dim", 0), len(index))
        start = E.add(E.ZERO, *(dims.size(p.shape[d]) for p in N.value(parent)[:which]))
        return x, (*index[:d], E.add(start, index[d]), *index[d + 1 :])
    return None
