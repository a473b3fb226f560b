"""Scores as ``scale * s + bias`` where s is lost beside a bias of enormous size, as in rows whose every key is filled."""

from __future__ import annotations

import math

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

DEEP = -(2.0**120)
"""Fills below this (the lowest float32 is -2^128) are the same in float32 whatever score below 2^95 is added: half of their last digit is more."""


def bias_of(score: Expr, scale: float) -> Expr | None:
    """What to add to ``scale * s``, with all constants, for ``score`` itself, in float32 and for |scale * s| < 2^95; None where there is no such thing.

    A choice between a score and a fill is a choice of biases: ``where(c, s, -3e38)`` is ``s + where(c, 0, -3e38)``. A fill that is not ``DEEP`` is not.
    """
    s = E.score()
    if s not in score.leaves:
        return score if score.is_const and float(score.value) <= DEEP and not math.isnan(float(score.value)) else None
    if score.op == "where":
        condition, *branches = score.args
        first, second = (bias_of(x, scale) for x in branches)
        return None if s in condition.leaves or first is None or second is None else E.where(condition, first, second)
    bias, found = E.FZERO, False
    for c, a in E.terms(score):
        if a is None or s not in a.leaves:
            bias = E.add(bias, E.const(float(c)) if a is None else E.mul(E.const(float(c)), a))
            continue
        inner = E.FZERO if a is s and float(c) == scale else bias_of(a, scale) if a.op == "where" and c == 1 else None
        if found or inner is None:
            return None
        bias, found = E.add(bias, inner), True
    return bias
