"""The derivative of a score program, as programs in the same language, for kernels that inline it.

Reverse mode over an expression's nodes. Since equal expressions are one object, a derivative shares what it can with the
program itself: that of ``c * tanh(x)`` reads the same ``tanh(x)``, and a kernel that emits both computes it once.
``adjoint`` does the same on tensors, for the interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

_HALF = E.const(0.5)
_STEPS = {"floor", "ceil", "round"}


_UNARY: dict[str, Callable[[Expr, Expr], Expr]] = {
    "exp": lambda x, y: y,
    "log": lambda x, y: E.div(E.FONE, x),
    "sqrt": lambda x, y: E.div(_HALF, y),
    "rsqrt": lambda x, y: E.mul(E.const(-0.5), y, y, y),
    "tanh": lambda x, y: E.sub(E.FONE, E.mul(y, y)),
    "sigmoid": lambda x, y: E.mul(y, E.sub(E.FONE, y)),
    "sin": lambda x, y: E.function("cos", x),
    "cos": lambda x, y: E.neg(E.function("sin", x)),
    "erf": lambda x, y: E.mul(E.const(2 / math.sqrt(math.pi)), E.function("exp", E.neg(E.mul(x, x)))),
    "abs": lambda x, y: E.where(E.gt(x, E.FZERO), E.FONE, E.where(E.lt(x, E.FZERO), E.const(-1.0), E.FZERO)),
}
"""The derivative of each function, from its argument and its value."""


def derivatives(root: Expr, wanted: Collection[Expr]) -> dict[Expr, Expr]:
    """d ``root`` / d x for each x of ``wanted``, which holds the raw score and loads (each with its index): 0 where x does not reach it.

    Steps (floor, comparisons, integers) end the flow, two equal operands of ``min`` and ``max`` share, and |x| has slope 0 at 0, all as in
    PyTorch. Nothing flows into the branch that a choice does not take, also where its own slope there is not finite.
    """
    active = _active(root, wanted)
    slopes: dict[Expr, list[Expr]] = {root: [E.FONE]}
    out: dict[Expr, Expr] = dict.fromkeys(wanted, E.FZERO)
    for e in reversed(list(E.postorder(root))):
        if e not in active or e not in slopes:
            continue
        g = E.add(*slopes.pop(e))
        if e in out:
            out[e] = g
            continue
        for i, a in enumerate(e.args):
            if a in active:
                slopes.setdefault(a, []).append(_times(g, e, i))
    return out


def _active(root: Expr, wanted: Collection[Expr]) -> set[Expr]:
    """Nodes through which a slope flows from ``root`` to one of ``wanted``."""
    out: set[Expr] = set()
    for e in E.postorder(root):
        if e in wanted or (e.kind == "float" and e.op != "load" and e.op not in _STEPS and any(a in out for a in e.args)):
            out.add(e)
    return out


def _times(g: Expr, e: Expr, i: int) -> Expr:
    """``g`` times the derivative of ``e`` by its operand ``i``."""
    xs = e.args
    if e.op == "add":
        return g
    if e.op == "where":
        return E.where(xs[0], g, E.FZERO) if i == 1 else E.where(xs[0], E.FZERO, g)
    return _gated(g, _partial(e, i))


def _gated(g: Expr, slope: Expr) -> Expr:
    """``g * slope``, the product taken inside of a choice with zero: 0 times an infinite slope would be NaN."""
    if g.op == "where" and E.FZERO in g.args[1:]:
        return E.where(g.args[0], *(x if x is E.FZERO else _gated(x, slope) for x in g.args[1:]))
    return E.mul(g, slope)


def _partial(e: Expr, i: int) -> Expr:
    xs = e.args
    if e.op == "mul":
        return E.mul(E.FONE, *(a for j, a in enumerate(xs) if j != i))
    if e.op == "div":
        return E.div(E.FONE, xs[1]) if i == 0 else E.neg(E.div(e, xs[1]))
    if e.op in ("min", "max"):
        mine, other = xs[i], xs[1 - i]
        ahead = E.lt(mine, other) if e.op == "min" else E.lt(other, mine)
        return E.where(ahead, E.FONE, E.where(E.eq(mine, other), _HALF, E.FZERO))
    if e.op == "pow":
        base, exponent = xs
        if i == 0:
            return E.mul(exponent, E.power(base, E.sub(exponent, E.FONE)))
        return E.where(E.eq(base, E.FZERO), E.FZERO, E.mul(e, E.function("log", base)))
    return _UNARY[e.op](xs[0], e)


def float_loads(programs: Iterable[Expr]) -> list[Expr]:
    """The float loads that ``programs`` read as numbers, each with its index, in the order in which they are first met."""
    return [e for e in E.postorder(*programs) if e.op == "load" and e.kind == "float"]
