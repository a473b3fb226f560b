"""A mask taken apart: which keys a query can see at all, as a range, and what else must hold.

Kernels skip blocks by the range; classification names it. Both read it from here, so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr


@dataclass(frozen=True)
class KeyRange:
    """Visible keys satisfy ``max(q - left, ...) <= k <= min(q + right, ...)`` and ``rest``.

    ``right`` and ``left`` hold the offsets, in sizes and constants only: k <= q + offset, k >= q - offset.
    ``rest`` is the conjunction of everything else.
    """

    right: tuple[Expr, ...]
    left: tuple[Expr, ...]
    rest: Expr


def key_range(mask: Expr) -> KeyRange:
    """Split a mask's conjuncts into diagonal bounds and the rest."""
    right: list[Expr] = []
    left: list[Expr] = []
    rest: list[Expr] = []
    for c in E.conjuncts(mask):
        bound = diagonal(c)
        if bound is None:
            rest.append(c)
        else:
            (right if bound[0] > 0 else left).append(bound[1])
    return KeyRange(tuple(right), tuple(left), E.all_of(*rest))


def diagonal(c: Expr) -> tuple[int, Expr] | None:
    """(+1, o) for k <= q + o, (-1, o) for k >= q - o."""
    if c.op != "ge0":
        return None
    slope = {"q": 0, "k": 0}
    offset: list[Expr] = []
    for n, a in E.terms(c.args[0]):
        if a is not None and a.op == "var" and a.value in slope:
            slope[a.value] = int(n)
        elif a is None or all(x.op == "sym" for x in a.leaves):
            offset.append(E.const(int(n)) if a is None else E.mul(E.const(int(n)), a))
        else:
            return None
    if slope == {"q": 1, "k": -1}:
        return 1, E.add(E.ZERO, *offset)
    if slope == {"q": -1, "k": 1}:
        return -1, E.add(E.ZERO, *offset)
    return None


def chunk(mask: Expr) -> int | None:
    """The least n for which the mask demands ``q // n == k // n``: query and key lie in the same chunk of n positions. None where there is no such n."""
    found = [n for c in E.conjuncts(mask) if (n := _same_chunk(c)) is not None]
    return min(found, default=None)


def _same_chunk(c: Expr) -> int | None:
    terms = E.terms(c.args[0]) if c.op == "eq0" else []
    if sorted(n for n, _ in terms) != [-1, 1] or any(a is None or a.op != "floordiv" or a.args[0].op != "var" or not a.args[1].is_const for _, a in terms):
        return None
    (_, x), (_, y) = terms
    assert x is not None and y is not None
    return int(x.args[1].value) if {x.args[0].value, y.args[0].value} == {"q", "k"} and x.args[1] is y.args[1] and x.args[1].value > 0 else None
