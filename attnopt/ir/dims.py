"""Sizes of captured tensors as expressions: from ints, torch.SymInts and the sympy expressions behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr


def size(value: int | torch.SymInt) -> Expr:
    """One size. A plain symbol keeps its name and proven lower bound; what cannot be read becomes an opaque size."""
    if isinstance(value, torch.SymInt):
        return _from_sympy(value.node.expr, value.node.shape_env)
    return E.const(int(value))


def shape(values: Sequence[int | torch.SymInt]) -> tuple[Expr, ...]:
    return tuple(size(v) for v in values)


def _from_sympy(x: Any, shape_env: Any) -> Expr:
    if x.is_Integer:
        return E.const(int(x))
    if x.is_Symbol:
        return E.sym(x.name, _lower_bound(x, shape_env))
    args = [_from_sympy(a, shape_env) for a in x.args]
    name = type(x).__name__
    if x.is_Add:
        return E.add(*args)
    if x.is_Mul and all(a.is_integer for a in x.args):
        return E.mul(*args)
    if x.is_Pow and args[1].is_const and args[1].value >= 0:
        return E.mul(E.ONE, *[args[0]] * args[1].value)
    if name in ("FloorDiv", "CleanDiv"):
        return E.floordiv(args[0], args[1])
    if name in ("Mod", "PythonMod"):
        return E.mod(args[0], args[1])
    if name in ("Max", "Min"):
        out = args[0]
        for a in args[1:]:
            out = E.maximum(out, a) if name == "Max" else E.minimum(out, a)
        return out
    return E.sym(str(x), 0)


def _lower_bound(symbol: Any, shape_env: Any) -> int:
    found = None if shape_env is None else shape_env.var_to_range.get(symbol)
    if found is None or not getattr(found.lower, "is_Integer", False):  # nothing known, or an infinite bound
        return 0
    return max(int(found.lower), 0)


def product(sizes: Sequence[Expr]) -> Expr:
    return E.mul(E.ONE, *sizes)
