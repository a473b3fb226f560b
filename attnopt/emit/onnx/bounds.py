"""How large the values of a program can be: what says whether a mask may overflow beside it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from attnopt.ir.bounds import nonnegative
from attnopt.ir.expr import Expr, terms

_SIZE = 2.0**31
"""No index and no size is as large."""
_INT64 = 2.0**63
_WITHIN_ONE = {"tanh", "sigmoid", "sin", "cos", "erf"}
_KEPT = {"abs", "float", "trunc"}


def greatest(x: torch.Tensor) -> float:
    """The greatest magnitude in a tensor; infinite where something is not finite."""
    if not x.numel():
        return 0.0
    found = float(x.detach().abs().max())
    return found if math.isfinite(found) else math.inf


def largest(root: Expr, of_load: Callable[[Expr], float]) -> float:
    """A number that the magnitude of ``root`` does not exceed; infinite where none is known. ``of_load`` gives that of a load's tensor. A score counts as 0."""
    known: dict[Expr, float] = {}

    def visit(e: Expr) -> float:
        if e not in known:
            known[e] = min(_of(e, of_load, visit), _INT64) if e.kind == "int" else _of(e, of_load, visit)
        return known[e]

    return visit(root)


def _of(e: Expr, of_load: Callable[[Expr], float], visit: Callable[[Expr], float]) -> float:
    if e.kind == "bool" or e.op in _WITHIN_ONE:
        return 1.0
    if e.op == "const":
        return math.inf if math.isnan(e.value) else abs(float(e.value))
    if e.op == "score":
        return 0.0
    if e.op in ("var", "sym"):
        return _SIZE
    if e.op == "load":
        return of_load(e)  # whatever its index is: that is kept within the tensor
    if e.op in ("where", "min", "max", *_KEPT):
        return max(visit(a) for a in (e.args[1:] if e.op == "where" else e.args))
    if e.op in ("add", "mul"):
        parts = [visit(a) for a in e.args]
        return math.inf if math.inf in parts else sum(parts) if e.op == "add" else math.prod(parts)
    if e.op == "pow" and e.args[0].is_const and 0 < e.args[0].value <= 1 and _is_nonnegative(e.args[1]):
        return 1.0
    return math.inf


def _is_nonnegative(e: Expr) -> bool:
    """Whether an integer, or one as a float with a positive number added, is proven to be no less than zero."""
    if e.kind == "int":
        return nonnegative(e)
    return all(a is None or (a.op == "float" and nonnegative(a.args[0])) for _, a in terms(e)) and all(c >= 0 for c, _ in terms(e))
