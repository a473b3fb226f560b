"""Intervals that enclose the values of an expression, and what each operation makes of them.

What the rules below cannot bound is unknown, so that an interval is always an enclosure, and not always the least one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

EXACT = float(1 << 52)
"""Integers up to here are exact as float64, and so are their sums, products and quotients as far as they stay below."""


@dataclass(frozen=True)
class Interval:
    """All values of a node lie in [low, high]. Of a bool, ``low`` says whether it is surely true and ``high`` whether it may be.

    Integers are held in float64 and floats in float32, the type in which kernels compute; NaN in either end is unknown.
    """

    low: Tensor
    high: Tensor
    size: float = math.inf
    """No integer in it is larger than this, or smaller than minus this."""

    @property
    def is_point(self) -> bool:
        """Whether it is known to hold one value in every tile."""
        return self.low is self.high

    @staticmethod
    def point(x: Tensor, size: float = math.inf) -> Interval:
        return Interval(x, x, size)


DTYPES: dict[E.Kind, torch.dtype] = {"bool": torch.bool, "int": torch.float64, "float": torch.float32}


# ------------------------------------------------------------------------------------------------ rules

Rule = Callable[[Expr, list[Interval]], Interval]


def each(f: Callable[..., Tensor], *xs: Interval) -> Interval:
    """For ``f`` that grows with every operand."""
    low = f(*(x.low for x in xs))
    return Interval.point(low) if all(x.is_point for x in xs) else Interval(low, f(*(x.high for x in xs)))


def limited(x: Interval, size: float = EXACT) -> Interval:
    """Integers of at most ``size``: unknown where one may be larger, and float64 not hold it or arithmetic on int64 wrap around."""
    if x.size <= size:
        return x
    held = x.low.abs() <= size if x.is_point else (x.low >= -size) & (x.high <= size)
    return replace(each(lambda v: torch.where(held, v, math.nan), x), size=size)


def _corners(f: Callable[[Tensor, Tensor], Tensor], a: Interval, b: Interval) -> Interval:
    """For ``f`` that in each operand grows or falls throughout, given the other."""
    if a.is_point and b.is_point:
        return Interval.point(f(a.low, b.low))
    values = [f(x, y) for x in ((a.low,) if a.is_point else (a.low, a.high)) for y in ((b.low,) if b.is_point else (b.low, b.high))]
    return Interval(reduce(torch.minimum, values), reduce(torch.maximum, values))


def _floordiv(e: Expr, xs: list[Interval]) -> Interval:
    a, d = xs
    # across zero a quotient is not bounded
    usable = (d.low > 0) | (d.high < 0)
    return each(lambda x: torch.where(usable, x, math.nan), _corners(lambda x, y: torch.floor(x / y), a, d))


def _mod(e: Expr, xs: list[Interval]) -> Interval:
    """With the divisor's sign, as in Python. Within one period it is a difference, otherwise anything below the divisor."""
    a, d = xs
    period = torch.floor(a.low / d.low)
    within = (period == torch.floor(a.high / d.high)) & (d.low == d.high) & (d.low > 0)
    positive = d.low > 0
    low = torch.where(within, a.low - period * d.low, torch.where(positive, 0.0, math.nan))
    return Interval(low, torch.where(within, a.high - period * d.low, torch.where(positive, d.high - 1, math.nan)))


def _where(e: Expr, xs: list[Interval]) -> Interval:
    c, a, b = xs
    low = torch.where(c.low, a.low, torch.where(c.high, torch.minimum(a.low, b.low), b.low))
    if c.is_point and a.is_point and b.is_point:
        return Interval.point(low)
    return Interval(low, torch.where(c.low, a.high, torch.where(c.high, torch.maximum(a.high, b.high), b.high)))


def _abs(e: Expr, xs: list[Interval]) -> Interval:
    (x,) = xs
    if x.is_point:
        return Interval.point(x.low.abs())
    return Interval(torch.maximum(x.low, -x.high).clamp(min=0), torch.maximum(-x.low, x.high))


def _not(e: Expr, xs: list[Interval]) -> Interval:
    (x,) = xs
    return Interval.point(~x.low) if x.is_point else Interval(~x.high, ~x.low)


def _decided(true: Tensor, false: Tensor) -> Interval:
    return Interval(true, ~false)


def _compare(e: Expr, xs: list[Interval]) -> Interval:
    a, b = xs
    if e.op == "le":
        return _decided(a.high <= b.low, a.low > b.high)
    if e.op == "lt":
        return _decided(a.high < b.low, a.low >= b.high)
    return _decided((a.low == a.high) & (b.low == b.high) & (a.low == b.low), (a.high < b.low) | (a.low > b.high))


def _fold(f: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """Small operands first, so that they meet the large ones once."""
    return lambda e, xs: reduce(lambda a, b: each(f, a, b), sorted(xs, key=lambda x: x.low.numel()))


def _sum(e: Expr, xs: list[Interval]) -> Interval:
    if e.kind == "float":  # rounded, in an order that is a kernel's choice
        return _unknown(e, xs)
    return _fold(torch.add)(e, xs)


def _product(e: Expr, xs: list[Interval]) -> Interval:
    c = e.args[0].value if e.args[0].is_const else 1
    if e.kind == "float" and (len(xs) != 2 or abs(c) != 1):
        return _unknown(e, xs)
    x = reduce(lambda a, b: _corners(torch.mul, a, b), xs[1:] if e.args[0].is_const else xs)
    return each(lambda v: v * c, x if c > 0 or x.is_point else Interval(x.high, x.low)) if c != 1 else x


def _unknown(e: Expr, xs: list[Interval]) -> Interval:
    x = xs[0].low
    if e.kind == "bool":
        return Interval(torch.zeros((), dtype=torch.bool, device=x.device), torch.ones((), dtype=torch.bool, device=x.device))
    return Interval.point(torch.full((), math.nan, dtype=DTYPES[e.kind], device=x.device))


_RULES: dict[str, Rule] = {
    "add": _sum,
    "mul": _product,
    "floordiv": _floordiv,
    "mod": _mod,
    "min": lambda e, xs: each(torch.minimum, *xs),
    "max": lambda e, xs: each(torch.maximum, *xs),
    "abs": _abs,
    "where": _where,
    "ge0": lambda e, xs: _decided(xs[0].low >= 0, xs[0].high < 0),
    "eq0": lambda e, xs: _decided((xs[0].low == 0) & (xs[0].high == 0), (xs[0].low > 0) | (xs[0].high < 0)),
    "le": _compare,
    "lt": _compare,
    "eq": _compare,
    "same": lambda e, xs: _decided((xs[0].low & xs[1].low) | ~(xs[0].high | xs[1].high), (xs[0].low & ~xs[1].high) | (xs[1].low & ~xs[0].high)),
    "not": _not,
    "and": _fold(torch.logical_and),
    "or": _fold(torch.logical_or),
    "float": lambda e, xs: each(lambda x: x.to(torch.float32), *xs),
    "trunc": lambda e, xs: each(lambda x: torch.trunc(x).to(torch.float64), *xs),
}
"""An operation without one is unknown. Float functions need none: kernels have decisions on them from ``materialise``."""

_SIZES: dict[str, Callable[..., float]] = {
    "add": lambda *xs: sum(xs),
    "mul": lambda *xs: math.prod(xs),
    "floordiv": lambda a, d: a,
    "mod": lambda a, d: d,
    "min": max,
    "max": max,
    "abs": lambda a: a,
    "where": lambda c, a, b: max(a, b),
}


def apply(e: Expr, xs: list[Interval]) -> Interval:
    """The interval of ``e`` from those of its operands."""
    found = _RULES.get(e.op, _unknown)(e, xs)
    if e.kind != "int":
        return found
    size = _SIZES[e.op](*(x.size for x in xs)) if e.op in _SIZES else math.inf
    return limited(replace(found, size=size))
