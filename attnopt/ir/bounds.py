"""Proofs that an integer expression is never negative, over all values of its indices and sizes.

Every index runs over [0, extent), every size is at least its lower bound. An expression that is linear in an index
takes its least value at one end, which end being a matter of the sign of its coefficient; so indices are eliminated
one by one, and the polynomial in sizes that remains is shifted to its lower bounds: if no coefficient is negative
there, neither is the expression. Sound, incomplete, and fast.
"""

from __future__ import annotations

from functools import lru_cache

import attnopt.ir.arithmetic as A
from attnopt.ir.node import ONE, ZERO, Expr, const, sym

_DEPTH = 12


def nonnegative(x: Expr) -> bool:
    """Whether x >= 0 is proven. False means "not proven"."""
    return _nonnegative(x, _DEPTH)


@lru_cache(maxsize=65536)
def _nonnegative(x: Expr, depth: int) -> bool:
    if x.is_const:
        return bool(x.value >= 0)
    if depth == 0 or x.kind != "int":
        return False
    monomials = [(c, (a.args if a.op == "mul" else (a,)) if a is not None else ()) for c, a in A.terms(x)]
    for atom in sorted({f for _, fs in monomials for f in fs if f.op != "sym"}, key=lambda e: e.key):
        bounds = interval(atom, depth - 1)
        if bounds is None:
            return False
        if any(fs.count(atom) > 1 for _, fs in monomials):
            return False
        slope = A.add(ZERO, *(A.mul(const(c), *(f for f in fs if f is not atom)) for c, fs in monomials if atom in fs))
        rest = A.add(ZERO, *(A.mul(const(c), *fs) for c, fs in monomials if atom not in fs))
        low, high = bounds
        if _nonnegative(slope, depth - 1):
            end = low
        elif _nonnegative(A.neg(slope), depth - 1):
            end = high
        else:
            return False
        return end is not None and _nonnegative(A.add(rest, A.mul(slope, end)), depth - 1)
    shifted = _shift_sizes(x)
    return all(c >= 0 for c, _ in A.terms(shifted))


def _shift_sizes(x: Expr) -> Expr:
    """Each size s >= low replaced by low + t with t >= 0."""
    from attnopt.ir.expr import substitute  # which stands above this module: it builds every operation

    return substitute(x, {s: A.add(const(s.value[1]), sym(f"{s.value[0]}'", 0)) for s in x.leaves if s.op == "sym" and s.value[1] != 0})


def interval(x: Expr, depth: int = _DEPTH) -> tuple[Expr | None, Expr | None] | None:
    """Least and greatest value of an integer atom, each None where unbounded; None where nothing is known."""
    if x.is_const:
        return x, x
    if x.op == "sym":
        return const(x.value[1]), x
    if x.op == "var":
        assert x.extent is not None
        return ZERO, A.sub(x.extent, ONE)
    if x.op == "mod" and _nonnegative(A.sub(x.args[1], ONE), depth):
        return ZERO, A.sub(x.args[1], ONE)
    if x.op == "floordiv" and _nonnegative(A.sub(x.args[1], ONE), depth):
        low, high = _ends(x.args[0], depth)
        d = x.args[1]
        return (None if low is None else A.floordiv(low, d)), (None if high is None else A.floordiv(high, d))
    if x.op == "abs":
        low, high = _ends(x.args[0], depth)
        if low is None or high is None:
            return ZERO, None
        return ZERO, A.add(A.absolute(low), A.absolute(high))
    if x.op in ("max", "min") and (any if x.op == "max" else all)(_nonnegative(a, depth) for a in x.args):
        return ZERO, None
    if x.op == "where" and x.args[1].is_const and x.args[2].is_const:
        values = [a.value for a in x.args[1:]]
        return const(min(values)), const(max(values))
    return None


def _ends(x: Expr, depth: int) -> tuple[Expr | None, Expr | None]:
    """Least and greatest value of a sum, atom by atom; None where an atom's bound or sign is unknown."""
    ends: list[Expr | None] = [ZERO, ZERO]
    for c, a in A.terms(x):
        if a is None:
            pair: tuple[Expr | None, Expr | None] = (const(c), const(c))
        elif a.op == "mul":
            return (ZERO if _nonnegative(x, depth) else None), None
        else:
            found = (a, a) if a.op == "sym" else interval(a, depth - 1) if depth > 0 else None
            if found is None:
                return None, None
            lo, hi = (found[1], found[0]) if c < 0 else found
            pair = tuple(None if p is None else A.mul(const(c), p) for p in (lo, hi))  # type: ignore[assignment]
        for i in (0, 1):
            now, more = ends[i], pair[i]
            ends[i] = None if now is None or more is None else A.add(now, more)
    return ends[0], ends[1]
