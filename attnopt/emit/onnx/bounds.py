"""How large the values of a program can be: what says whether a mask may overflow beside it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from attnopt.ir.expr import Expr

_SIZE = 2.0**31
"""No index and no size is as large."""
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
            known[e] = _of(e, of_load, visit)
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
    return math.inf
