"""One case for each operation of the expression language: it enters the score, and the hand-written value does too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Dims
from tests.kernels.cases import Case, Shape

SHAPE: Shape = (2, 2, 2, 19, 37, 16, 16)

Term = Callable[[Dims, Expr], Expr]
Naive = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of s, the query index and the key index, in float64."""

f = E.as_float
X = lambda d, s: E.add(E.mul(E.const(0.3), s), E.const(0.1))  # noqa: E731
x = lambda s: 0.3 * s + 0.1  # noqa: E731


def _choice(c: Expr) -> Expr:
    return E.where(c, E.const(1.0), E.const(-1.0))


def _sign(c: Tensor) -> Tensor:
    return torch.where(c, 1.0, -1.0)


OPERATIONS: dict[str, tuple[Term, Naive]] = {
    "add": (lambda d, s: E.add(s, f(d.q), f(d.k)), lambda s, i, j: s + i + j),
    "mul": (lambda d, s: E.mul(s, f(E.mul(d.q, d.k)), E.const(0.01)), lambda s, i, j: s * i * j * 0.01),
    "div": (lambda d, s: E.div(s, f(E.add(d.q, E.ONE))), lambda s, i, j: s / (i + 1)),
    "floordiv": (lambda d, s: f(E.floordiv(E.sub(d.q, d.k), E.const(5))), lambda s, i, j: ((i - j) // 5).double()),
    "mod": (lambda d, s: f(E.mod(E.sub(d.q, d.k), E.const(5))), lambda s, i, j: ((i - j) % 5).double()),
    "min": (lambda d, s: E.minimum(s, f(E.minimum(d.q, d.k))), lambda s, i, j: torch.minimum(s, torch.minimum(i, j).double())),
    "max": (lambda d, s: E.maximum(s, E.mul(E.const(0.1), f(E.maximum(d.q, d.k)))), lambda s, i, j: torch.maximum(s, 0.1 * torch.maximum(i, j).double())),
    "pow": (lambda d, s: E.power(f(E.add(d.q, E.ONE)), E.const(0.3)), lambda s, i, j: (i + 1).double() ** 0.3 + 0 * j),
    "abs": (lambda d, s: E.add(E.absolute(s), f(E.absolute(E.sub(d.q, d.k)))), lambda s, i, j: s.abs() + (i - j).abs()),
    "where": (lambda d, s: E.where(E.le(d.k, d.q), s, E.const(0.5)), lambda s, i, j: torch.where(j <= i, s, 0.5)),
    "ge0": (lambda d, s: _choice(E.ge(E.mul(E.const(2), d.q), d.k)), lambda s, i, j: _sign(2 * i >= j)),
    "le": (lambda d, s: _choice(E.le(X(d, s), E.const(0.2))), lambda s, i, j: _sign(x(s) <= 0.2)),
    "lt": (
        lambda d, s: _choice(E.lt(E.mul(E.const(0.37), f(d.q)), E.mul(E.const(0.11), f(d.k)))),
        lambda s, i, j: _sign(0.37 * i.double() < 0.11 * j.double()),
    ),
    "eq": (
        lambda d, s: _choice(E.eq(E.function("floor", E.mul(E.const(0.26), f(d.q))), E.const(2.0))),
        lambda s, i, j: _sign(torch.floor(0.26 * i.double()) == 2) + 0 * j,
    ),
    "same": (lambda d, s: _choice(E.eq(E.le(d.k, d.q), E.le(E.const(9), d.k))), lambda s, i, j: _sign((j <= i) == (j >= 9))),
    "eq0": (lambda d, s: _choice(E.eq(d.q, d.k)), lambda s, i, j: _sign(i == j)),
    "not": (lambda d, s: _choice(E.all_of(E.negate(E.eq(d.q, d.k)), E.le(d.k, E.const(9)))), lambda s, i, j: _sign((i != j) & (j <= 9))),
    "and": (lambda d, s: _choice(E.all_of(E.le(d.k, d.q), E.lt(X(d, s), E.const(0.2)))), lambda s, i, j: _sign((j <= i) & (x(s) < 0.2))),
    "or": (lambda d, s: _choice(E.any_of(E.le(d.k, d.q), E.lt(X(d, s), E.const(0.2)))), lambda s, i, j: _sign((j <= i) | (x(s) < 0.2))),
    "float": (lambda d, s: E.mul(E.const(0.1), f(E.sub(d.k, d.q))), lambda s, i, j: 0.1 * (j - i).double()),
    "trunc": (lambda d, s: f(E.as_int(E.mul(E.const(0.26), f(E.sub(d.k, d.q))))), lambda s, i, j: torch.trunc(0.26 * (j - i).double())),
    "exp": (lambda d, s: E.function("exp", X(d, s)), lambda s, i, j: torch.exp(x(s))),
    "log": (lambda d, s: E.function("log", f(E.add(d.k, E.ONE))), lambda s, i, j: torch.log(j.double() + 1)),
    "sqrt": (lambda d, s: E.function("sqrt", E.absolute(X(d, s))), lambda s, i, j: x(s).abs().sqrt()),
    "rsqrt": (lambda d, s: E.mul(s, E.function("rsqrt", f(E.add(d.q, E.ONE)))), lambda s, i, j: s * (i.double() + 1).rsqrt()),
    "tanh": (lambda d, s: E.function("tanh", X(d, s)), lambda s, i, j: torch.tanh(x(s))),
    "sigmoid": (lambda d, s: E.function("sigmoid", X(d, s)), lambda s, i, j: torch.sigmoid(x(s))),
    "sin": (lambda d, s: E.function("sin", X(d, s)), lambda s, i, j: torch.sin(x(s))),
    "cos": (lambda d, s: E.function("cos", X(d, s)), lambda s, i, j: torch.cos(x(s))),
    "floor": (lambda d, s: E.function("floor", E.mul(E.const(0.26), f(E.sub(d.k, d.q)))), lambda s, i, j: torch.floor(0.26 * (j - i).double())),
    "ceil": (lambda d, s: E.function("ceil", E.mul(E.const(0.26), f(E.add(d.k, d.q)))), lambda s, i, j: torch.ceil(0.26 * (j + i).double())),
    "round": (lambda d, s: E.function("round", E.mul(E.const(0.5), f(E.sub(d.k, d.q)))), lambda s, i, j: torch.round(0.5 * (j - i).double())),
    "erf": (lambda d, s: E.function("erf", X(d, s)), lambda s, i, j: torch.erf(x(s))),
}


def _case(name: str, term: Term, naive: Naive) -> Case:
    return Case(
        name=f"operation-{name}",
        shape=SHAPE,
        score=lambda d, s: E.add(E.mul(E.const(0.25), s), term(d, s)),
        naive_score=lambda s, i, j, L: 0.25 * s + naive(s, i, j),
    )


OPERATION_CASES = {c.name: c for c in (_case(name, *pair) for name, pair in OPERATIONS.items())}
