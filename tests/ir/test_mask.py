"""Chunks that a mask demands, and those that only look like one."""

from __future__ import annotations

import pytest

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import chunk

q, k = E.var("q", E.sym("S")), E.var("k", E.sym("S"))
causal = E.le(k, q)


def chunks(n: int, x: Expr = q, y: Expr = k) -> Expr:
    return E.eq(E.floordiv(x, E.const(n)), E.floordiv(y, E.const(n)))


@pytest.mark.parametrize(
    ("mask", "n"),
    [
        (chunks(8), 8),
        (chunks(8, k, q), 8),
        (E.all_of(causal, chunks(8)), 8),
        (E.all_of(chunks(12), causal, chunks(8)), 8),
        (causal, None),
        (E.TRUE, None),
        (E.any_of(causal, chunks(8)), None),
        (E.negate(chunks(8)), None),
        (chunks(8, E.add(q, E.const(3))), None),
        (chunks(8, E.load(0, (q,), "int"), E.load(0, (k,), "int")), None),
        (E.eq(E.floordiv(q, E.const(8)), E.floordiv(k, E.const(4))), None),
        (E.eq(E.floordiv(q, E.const(8)), E.add(E.floordiv(k, E.const(8)), E.ONE)), None),
    ],
    ids=["plain", "turned", "causal", "two", "none", "all", "or", "not", "moved", "of-a-table", "of-other-lengths", "the-one-before"],
)
def test_chunk(mask: Expr, n: int | None) -> None:
    assert chunk(mask) == n
