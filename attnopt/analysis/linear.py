"""Expressions as linear combinations of the elements of one tensor, cell by cell of a feature axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

_CELLS = 64
"""More pieces of a feature axis than this are not told apart."""


@dataclass(frozen=True)
class Cell:
    """The features ``first + step * i`` for i below ``count``, and their value as an expression in the variable ``i``."""

    first: int
    step: int
    count: int
    value: Expr


def index_of(count: int) -> Expr:
    """The variable ``i`` of a cell."""
    return E.ZERO if count == 1 else E.var("i", count)


def cells(x: Expr, d: Expr, strided: bool = True) -> list[Cell] | None:
    """``x`` as a function of the variable ``d``, split where it changes its form; None when that is too often.

    Splits stand where a comparison with ``d`` changes its answer, and at multiples of what ``d`` is divided by. With
    ``strided``, what alternates with period two becomes two cells of every other feature.
    """
    assert d.extent is not None
    if not d.extent.is_const:
        return None
    size = int(d.extent.value)
    found = list(_split(E.substitute(x, {d: index_of(size)}), 0, 1, size, strided, 4))
    return None if len(found) > _CELLS else found


def _split(x: Expr, first: int, step: int, count: int, strided: bool, depth: int) -> Iterator[Cell]:
    i = index_of(count)
    period, cuts = _breaks(x, i, count, strided) if count > 1 and depth else (1, [])
    if period == 1 and not cuts:
        yield Cell(first, step, count, x)
        return
    if len(cuts) > _CELLS:
        cuts = cuts[: _CELLS + 1]  # more than the limit either way
    edges = [0, *cuts, count]
    for low, high in pairwise(edges):
        for start in range(low, min(low + period, high)):
            n = len(range(start, high, period))
            inner = E.substitute(x, {i: E.add(E.const(start), E.mul(E.const(period), index_of(n)))})
            yield from _split(inner, first + step * start, step * period, n, strided, depth - 1)


def _breaks(x: Expr, i: Expr, count: int, strided: bool) -> tuple[int, list[int]]:
    """(period, where cuts fall inside the range) of everything in ``x`` that changes its form along ``i``."""
    cuts: set[int] = set()
    period = 1
    for e in E.postorder(x):
        if e.op not in ("ge0", "eq0", "mod", "floordiv") or i not in e.leaves:
            continue
        line = affine(e.args[0], i)
        if line is None or line[1].variables or not line[1].is_const:
            continue
        slope, offset = line[0], int(line[1].value)
        if e.op == "ge0":
            cuts.add(-(offset // slope) if slope > 0 else offset // -slope + 1)
        elif e.op == "eq0":
            if offset % slope == 0:
                cuts |= {-offset // slope, -offset // slope + 1}
        elif e.args[1].is_const and e.args[1].value > 0:
            m = int(e.args[1].value)
            if strided and m == 2 and slope % 2:
                period = 2
            else:
                cuts |= {n for n in range(1, count) if (slope * n + offset) // m != (slope * (n - 1) + offset) // m}
    return period, sorted(c for c in cuts if 0 < c < count)


def affine(x: Expr, i: Expr) -> tuple[int, Expr] | None:
    """``x`` as ``slope * i + rest`` with an integer slope that is not zero; None when it is of another form."""
    slope, rest = 0, []
    for c, a in E.terms(x):
        if a is i:
            slope = int(c)
        elif a is not None and i in a.leaves:
            return None
        else:
            rest.append(E.const(c) if a is None else E.mul(E.const(c), a))
    return (slope, E.add(E.ZERO, *rest)) if slope else None


def combination(x: Expr, source: fx.Node) -> dict[Expr, Expr] | None:
    """``x`` as {element of ``source``: its coefficient}; None when it is not a linear combination of them and nothing else."""
    if x.op == "load" and x.value is source:
        return {x: E.FONE}
    with_source = [a for a in x.args if reads(a, source)]
    if x.op == "add" and len(with_source) == len(x.args):
        out: dict[Expr, Expr] = {}
        for a in x.args:
            part = combination(a, source)
            if part is None:
                return None
            for element, c in part.items():
                out[element] = E.add(out[element], c) if element in out else c
        return out
    if len(with_source) != 1:
        return None
    inner = with_source[0]
    if x.op == "mul":
        factor = E.mul(E.FONE, *(a for a in x.args if a is not inner))
    elif x.op == "div" and x.args[0] is inner:
        factor = E.div(E.FONE, x.args[1])
    else:
        return None
    part = combination(inner, source)
    return None if part is None else {element: E.mul(factor, c) for element, c in part.items()}


def reads(x: Expr, source: fx.Node) -> bool:
    return any(e.op == "load" and e.value is source for e in x.leaves)


def factors(x: Expr) -> tuple[float, list[Expr]]:
    """A product as its constant and its other factors."""
    c, rest = E.split_term(x)
    if rest is None:
        return float(c), []
    return float(c), list(rest.args) if rest.op == "mul" else [rest]
