"""Expressions to and from a JSON list of nodes, operands first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

_NONFINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def encode(roots: Sequence[Expr]) -> tuple[list[list[Any]], list[int]]:
    """The nodes below ``roots`` as [op, kind, value, operand positions, extent position], and where each root stands."""
    # An extent is no operand, so walk the extents first: they must stand before the variables that have them.
    extents = {v.extent for r in roots for v in r.variables if v.extent is not None}
    place: dict[Expr, int] = {}
    nodes: list[list[Any]] = []
    for e in E.postorder(*sorted(extents, key=lambda x: x.key), *roots):
        value = e.value
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)
        if e.op == "load" and not isinstance(value, int):
            raise TypeError(f"a load of {value!r} cannot be written: only slots of a spec can")
        place[e] = len(nodes)
        nodes.append([e.op, e.kind, value, [place[a] for a in e.args], None if e.extent is None else place[e.extent]])
    return nodes, [place[r] for r in roots]


def decode(nodes: Sequence[Sequence[Any]]) -> list[Expr]:
    """The inverse of ``encode``."""
    table: list[Expr] = []
    for op, kind, value, args, extent in nodes:
        operands = [table[i] for i in args]
        if op == "const":
            table.append(E.const(float(_NONFINITE.get(value, value)) if kind == "float" else value))
        elif op == "sym":
            table.append(E.sym(value[0], value[1]))
        elif op == "var":
            table.append(E.var(value, table[extent]))
        elif op == "score":
            table.append(E.score())
        elif op == "load":
            table.append(E.load(value, operands, kind))
        else:
            table.append(E.build(op, *operands))
    return table
