"""FX nodes to expressions: the value of a node's element as a function of its index.

``Lifter.lift(node, index)`` follows views by rewriting the index, pointwise operators by building expressions, mask and
index arithmetic through ``arange``, comparisons, ``tril`` and gathers. What has no rule becomes a load of the tensor
itself: always right, only slower. Rules stand in ``RULES`` (pointwise ones in ``pointwise.py``), one an operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import is_fake

from attnopt.analysis import nodes as N
from attnopt.analysis import views
from attnopt.analysis.constants import fold
from attnopt.analysis.pointwise import POINTWISE
from attnopt.analysis.views import Index, broadcast
from attnopt.ir import expr as E
from attnopt.ir.bounds import nonnegative
from attnopt.ir.expr import Expr

Rule = Callable[["Lifter", fx.Node, dict[str, Any], Index], "Expr | None"]
RULES: dict[str, Rule] = {}
Hook = Callable[[fx.Node, Index], "Expr | None"]
_LIMIT = 4000
"""Steps of one lift; beyond it a tensor is loaded: an expression of that size would be slower than memory."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        RULES.update({f"aten::{n}": f for n in names})
        return f

    return register


class Lifter:
    """Lifts nodes of one graph. ``constants`` gives the value of a ``get_attr`` node that may be folded, else None.

    ``written`` holds the nodes whose memory is written in place later: they are read as they stand, never recomputed. ``double`` says
    that expressions will be computed in float64: what the graph rounds to less is then read as well.
    """

    def __init__(self, constants: Callable[[fx.Node], torch.Tensor | None] = lambda _: None, written: frozenset[fx.Node] = frozenset(), double: bool = False) -> None:
        self.constants = constants
        self.written = written
        self.double = double
        self.folded: set[fx.Node] = set()
        """get_attr nodes whose values became part of an expression."""
        self._memo: dict[tuple[fx.Node, Index], Expr] = {}
        self._steps = 0
        self._hook: Hook | None = None

    def lift(self, node: fx.Node, index: Index, hook: Hook | None = None) -> Expr:
        """The element of ``node`` at ``index``. ``hook`` may answer for a node first (and then nothing is memoised)."""
        self._steps = 0
        if hook is None:
            return self.at(node, index)
        memo, self._memo, self._hook = self._memo, {}, hook
        try:
            return self.at(node, index)
        finally:
            self._memo, self._hook = memo, None

    def at(self, node: fx.Node, index: Index) -> Expr:
        """As ``lift``, for use by rules."""
        key = (node, index)
        found = self._memo.get(key)
        if found is None:
            found = self._memo[key] = self._lift(node, index)
        return found

    def operand(self, x: Any, index: Index, result: tuple[Expr, ...] = ()) -> Expr | None:
        """An operand of a pointwise operator at an index of its ``result``: a tensor's element or a number."""
        if N.is_tensor(x):
            return self.at(x, broadcast(index, N.shape(x), result))
        if isinstance(x, fx.Node) and isinstance(N.value(x), torch.SymFloat):
            return E.load(x, (), "float")  # a number that is only known when the graph runs
        return N.scalar(x)

    def _lift(self, node: fx.Node, index: Index) -> Expr:
        if self._hook is not None:
            answer = self._hook(node, index)
            if answer is not None:
                return answer
        self._steps += 1
        if self._steps <= _LIMIT and node not in self.written:
            moved = views.step(node, index)
            if moved is not None:
                return self.at(*moved)
            name = N.op_name(node)
            if node.op == "get_attr":
                known = self._constant(node, index)
                if known is not None:
                    return known
            elif name in POINTWISE:
                args = N.arguments(node)
                extents = N.shape(node)
                result = POINTWISE[name](args, lambda x: self.operand(x, index, extents), N.value(node).dtype)
                if result is not None and not self._is_rounded(result, N.value(node).dtype):
                    return to_dtype(result, N.value(node).dtype)
            elif name in RULES:
                result = RULES[name](self, node, N.arguments(node), index)
                if result is not None and not self._is_rounded(result, N.value(node).dtype):
                    return to_dtype(result, N.value(node).dtype)
        return E.load(node, tuple(E.ZERO if n is E.ONE else i for i, n in zip(index, N.shape(node), strict=True)), N.kind(node))

    def _is_rounded(self, x: Expr, dtype: torch.dtype) -> bool:
        """Whether the graph rounds ``x`` to ``dtype`` where the expression would keep more digits."""
        if not self.double or not dtype.is_floating_point or dtype is torch.float64:
            return False
        return any(e.kind == "float" and not _is_exact(e, dtype) for e in E.postorder(x))

    def is_nonnegative_constant(self, x: Expr) -> bool:
        """Whether ``x`` is read from a constant table without a negative entry; the table is then noted as folded."""
        tensor = self.constants(x.value) if x.op == "load" and isinstance(x.value, fx.Node) and x.value.op == "get_attr" else None
        if tensor is None or tensor.is_meta or is_fake(tensor) or tensor.numel() == 0 or bool((tensor < 0).any()):
            return False
        self.folded.add(x.value)
        return True

    def _constant(self, node: fx.Node, index: Index) -> Expr | None:
        tensor = self.constants(node)
        if tensor is None or tensor.is_meta or is_fake(tensor):
            return None
        formula = fold(tensor, index, node)
        if formula is not None:
            self.folded.add(node)
        return formula


_EXACT = {"load", "float", "where", "min", "max", "abs"}


def _is_exact(e: Expr, dtype: torch.dtype) -> bool:
    """Whether the operation at ``e`` gives the same number in ``dtype`` as in float64, for operands that are elements of ``dtype``."""
    if e.is_const:
        return math.isnan(e.value) or float(torch.tensor(e.value, dtype=torch.float64).to(dtype)) == e.value
    if e.op == "mul" and len(e.args) == 2 and e.args[0].is_const:
        return abs(math.frexp(e.args[0].value)[0]) == 0.5  # a power of two
    return e.op in _EXACT


def to_dtype(x: Expr, dtype: torch.dtype) -> Expr:
    """``x`` as an element of ``dtype``; constants are rounded as torch rounds them (finfo.min becomes -inf in half)."""
    x = E.convert(x, N.kind_of(dtype))
    if dtype in (torch.float16, torch.bfloat16, torch.float32):
        if x.is_const:
            return E.const(float(torch.tensor(x.value, dtype=torch.float64).to(dtype).item()))
        if x.op == "where" and all(a.is_const for a in x.args[1:]):
            return E.where(x.args[0], *(to_dtype(a, dtype) for a in x.args[1:]))
    return x


# ------------------------------------------------------------------------------------------------ creation


@rule("arange")
def _arange(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr | None:
    start, step = N.scalar(args.get("start", 0)), N.scalar(args.get("step", 1))
    if start is None or step is None:
        return None
    return E.add(start, E.mul(step, index[0]))


@rule("full", "new_full", "full_like", "scalar_tensor")
def _full(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr | None:
    return N.scalar(args.get("fill_value", args.get("s")))


@rule("zeros", "new_zeros", "zeros_like")
def _zeros(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr:
    return E.ZERO


@rule("ones", "new_ones", "ones_like")
def _ones(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr:
    return E.ONE


@rule("eye")
def _eye(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr:
    return E.eq(index[0], index[1])


# ------------------------------------------------------------------------------------------------ triangles, padding, joins


@rule("tril")
def _tril(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr | None:
    return _triangle(lift, args, index, E.le)


@rule("triu")
def _triu(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr | None:
    return _triangle(lift, args, index, E.ge)


def _triangle(lift: Lifter, args: dict[str, Any], index: Index, keeps: Callable[[Expr, Expr], Expr]) -> Expr | None:
    """The input where ``keeps(column, row + diagonal)``, zero elsewhere."""
    diagonal = N.scalar(args["diagonal"])
    if diagonal is None:
        return None
    x = lift.at(args["self"], index)
    return E.where(keeps(index[-1], E.add(index[-2], diagonal)), x, E.convert(E.ZERO, x.kind))


@rule("constant_pad_nd", "pad")
def _pad(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr | None:
    if args.get("mode", "constant") != "constant":
        return None
    pad = [N.scalar(p) for p in args["pad"]]
    fill = N.scalar(args.get("value") or 0)
    x = args["self"]
    at = list(index)
    inside: list[Expr] = []
    for i in range(len(pad) // 2):
        low, high = pad[2 * i], pad[2 * i + 1]
        if low is None or high is None:
            return None
        d = len(index) - 1 - i
        at[d] = E.sub(index[d], low)
        if low is not E.ZERO:
            inside.append(E.ge(at[d], E.ZERO))
        if high is not E.ZERO:
            inside.append(E.lt(at[d], N.shape(x)[d]))
    if fill is None:
        return None
    return E.where(E.all_of(*inside), lift.at(x, tuple(at)), E.convert(fill, N.kind(node)))


@rule("cat", "concat", "concatenate")
def _cat(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr | None:
    d = N.axis(args["dim"], len(index))
    start = E.ZERO
    pieces: list[tuple[Expr, Expr]] = []  # (ends before, value)
    for t in args["tensors"]:
        if not N.is_tensor(t) or len(N.shape(t)) != len(index):
            return None
        extent = N.shape(t)[d]
        end = E.add(start, extent)
        here = E.sub(index[d], start)
        if not (E.lt(index[d], start) is E.TRUE or E.ge(index[d], end) is E.TRUE):
            pieces.append((end, lift.at(t, (*index[:d], here, *index[d + 1 :]))))
        start = end
    if not pieces:
        return None
    out = pieces[-1][1]
    for end, x in reversed(pieces[:-1]):
        out = E.where(E.lt(index[d], end), x, out)
    return out


@rule("stack")
def _stack(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr | None:
    d = N.axis(args["dim"], len(index))
    out: Expr | None = None
    for i, t in reversed(list(enumerate(args["tensors"]))):
        x = lift.at(t, index[:d] + index[d + 1 :])
        out = x if out is None else E.where(E.eq(index[d], E.const(i)), x, out)
    return out


# ------------------------------------------------------------------------------------------------ gathers


def _wrapped(lift: Lifter, i: Expr, extent: Expr) -> Expr:
    """A gather's index, counted from the end when negative."""
    return i if nonnegative(i) or lift.is_nonnegative_constant(i) else E.where(E.lt(i, E.ZERO), E.add(i, extent), i)


@rule("index", "_unsafe_index")
def _index(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr | None:
    x, which = args["self"], list(args["indices"])
    extents = N.shape(x)
    which += [None] * (len(extents) - len(which))
    used = [i for i, w in enumerate(which) if w is not None]
    if any(not N.is_tensor(which[i]) or N.kind(which[i]) != "int" for i in used):
        return None
    rank = max(len(N.shape(which[i])) for i in used)
    adjacent = used == list(range(used[0], used[-1] + 1))
    front = used[0] if adjacent else 0
    gathered, plain = index[front : front + rank], iter(index[:front] + index[front + rank :])
    at: list[Expr] = []
    for i, w in enumerate(which):
        if w is None:
            at.append(next(plain))
        else:
            at.append(_wrapped(lift, lift.at(w, broadcast(gathered, N.shape(w))), extents[i]))
    return lift.at(x, tuple(at))


@rule("embedding")
def _embedding(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr:
    return lift.at(args["weight"], (lift.at(args["indices"], index[:-1]), index[-1]))


@rule("index_select")
def _index_select(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr:
    d = N.axis(args["dim"], len(index))
    return lift.at(args["self"], (*index[:d], lift.at(args["index"], (index[d],)), *index[d + 1 :]))


@rule("gather")
def _gather(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr:
    d = N.axis(args["dim"], len(index))
    return lift.at(args["self"], (*index[:d], lift.at(args["index"], index), *index[d + 1 :]))


# ------------------------------------------------------------------------------------------------ scans of what does not vary


@rule("cumsum")
def _cumsum(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr | None:
    d = N.axis(args["dim"], len(index))
    x = _along(lift, args["self"], index, d)
    return None if x is None else E.mul(E.convert(x, "int" if x.kind == "bool" else x.kind), E.add(index[d], E.ONE))


def _along(lift: Lifter, node: fx.Node, index: Index, d: int) -> Expr | None:
    """The element of ``node``, if it is provably the same all along axis ``d``."""
    probe = E.var("scan", N.shape(node)[d])
    x = lift.at(node, (*index[:d], probe, *index[d + 1 :]))
    return None if probe in x.leaves else x


@rule("diff")
def _diff(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr | None:
    if args.get("n", 1) != 1 or args.get("append") is not None:
        return None
    d = N.axis(args.get("dim", -1), len(index))
    x, before = args["self"], args.get("prepend")

    def at(node: fx.Node, i: Expr) -> Expr:
        return lift.at(node, (*index[:d], i, *index[d + 1 :]))

    if before is None:
        return E.sub(at(x, E.add(index[d], E.ONE)), at(x, index[d]))
    n = N.shape(before)[d]
    if n is not E.ONE:
        return None
    i = index[d]
    inner = E.sub(at(x, i), at(x, E.sub(i, E.ONE)))
    return E.where(E.eq(i, E.ZERO), E.sub(at(x, E.ZERO), at(before, E.ZERO)), inner)


@rule("any", "all", "amax", "amin", "mean")
def _uniform(lift: Lifter, node: fx.Node, args: dict[str, Any], index: Index) -> Expr | None:
    """A reduction of what does not vary along the reduced axis is that value."""
    d = args.get("dim")
    dims_ = [d] if isinstance(d, int) else list(d) if d else []
    if len(dims_) != 1:
        return None
    x = args["self"]
    a = N.axis(dims_[0], len(N.shape(x)))
    full = index if args.get("keepdim") else (*index[:a], E.ZERO, *index[a:])
    return _along(lift, x, full, a)


