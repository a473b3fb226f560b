"""Scores of the form scale * s + bias and softcap * tanh(scale * s / softcap) + bias, read off the expression itself."""

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


@dataclass(frozen=True)
class Capped:
    """``softcap * tanh(scale * s / softcap) + bias + shift``; without softcap (None) ``scale * s + bias + shift``.

    ``shift`` is a number: the softmax does not see it, and lse does. It is 0 beside a bias, which then holds it.
    """

    scale: float
    softcap: float | None
    bias: Expr | None
    shift: float


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


@lru_cache(maxsize=1024)
def capped(score: Expr) -> Capped | None:
    """``score`` with at most a soft cap on the scaled product, or None where it is not of that form."""
    s = E.score()
    over_s = [(float(c), a) for c, a in E.terms(score) if a is not None and s in a.leaves]
    rest = [(float(c), a) for c, a in E.terms(score) if a is None or s not in a.leaves]
    if len(over_s) != 1:
        return None
    factor, term = over_s[0]
    bias = None if all(a is None for _, a in rest) else E.add(*(E.const(c) if a is None else E.mul(E.const(c), a) for c, a in rest))
    shift = sum(c for c, _ in rest) if bias is None else 0.0
    if term is s:
        return Capped(factor, None, bias, shift)
    inner = affine(term.args[0]) if term.op == "tanh" else None
    if inner is None or E.mul(E.const(inner.scale), s) is not term.args[0]:
        return None
    scale = factor * inner.scale
    return Capped(scale, abs(factor), bias, shift)  # tanh is odd: a negative cap is a negative scale
