"""Scores of the form scale * s + bias, read off the expression itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr


@dataclass(frozen=True)
class Affine:
    """``scale * s + bias``; the bias does not read s, and is None where there is none."""

    scale: float
    bias: Expr | None


@lru_cache(maxsize=1024)
def affine(score: Expr) -> Affine | None:
    """``score`` as scale * s + bias with a constant scale, or None where it is not of that form."""
    s = E.score()
    scale = 0.0
    rest: list[Expr] = []
    constant = 0.0
    for c, a in E.terms(score):
        if a is s:
            scale += float(c)
        elif a is None:
            constant = float(c)
        elif s in a.leaves:
            return None
        else:
            rest.append(E.mul(E.const(float(c)), a))
    # A constant alone is the same for every key, and the softmax does not see it; beside other terms it may cancel large ones.
    return Affine(scale, E.add(*rest, E.const(constant)) if rest else None)
