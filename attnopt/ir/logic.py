"""Choices, comparisons and connectives of expressions, normalised: ``linear >= 0`` for integers, flat ``and`` and ``or``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import attnopt.ir.arithmetic as A
import attnopt.ir.bounds as bounds
from attnopt.ir.node import FALSE, FZERO, ONE, TRUE, ZERO, Expr, const, make, score


def as_bool(x: Expr) -> Expr:
    if x.kind == "bool":
        return x
    return ne(x, ZERO if x.kind == "int" else FZERO)


def where(c: Expr, a: Expr, b: Expr) -> Expr:
    c = as_bool(c)
    (a, b), kind = A.promote(a, b)
    if c is TRUE or a is b:
        return a
    if c is FALSE:
        return b
    if kind == "bool":
        return any_of(all_of(c, a), all_of(negate(c), b))
    if a.op == "where" and a.args[0] is c:
        a = a.args[1]
    if b.op == "where" and b.args[0] is c:
        b = b.args[2]
    # where(c, x, F) and where(not c, F, x) are one: a choice reads "visible, else"
    if c.op == "not":
        return where(c.args[0], b, a)
    # where(c, where(d, x, f), f) = where(c and d, x, f)
    if a.op == "where" and a.args[2] is b:
        return where(all_of(c, a.args[0]), a.args[1], b)
    if b.op == "where" and b.args[1] is a:
        return where(any_of(c, b.args[0]), a, b.args[2])
    # where(c, s + x, s + y) = s + where(c, x, y): the score stands by itself
    common = [t for t in A.terms(a) if t[1] is not None and score() in t[1].leaves and t in A.terms(b)] if kind == "float" else []
    if common:
        shared = A.add(*(A.scaled(n, t) for n, t in common if t is not None))
        return A.add(shared, where(c, A.sub(a, shared), A.sub(b, shared)))
    return make("where", (c, a, b), kind)


def at_least_zero(x: Expr) -> Expr:
    """x >= 0 for an integer x, in normal form: divided by the greatest common divisor, bounds applied."""
    parts = A.terms(x)
    g = 0
    for c, a in parts:
        if a is not None:
            g = math.gcd(g, int(c))
    if g > 1:
        x = A.add(ZERO, *(const(int(c) // g) if a is None else A.scaled(int(c) // g, a) for c, a in parts))
        parts = A.terms(x)
    if bounds.nonnegative(x):
        return TRUE
    if bounds.nonnegative(A.sub(A.neg(x), ONE)):
        return FALSE
    for c, a in parts:
        if a is None or a.op not in ("abs", "min", "max", "where") or a.kind != "int":
            continue
        rest = A.add(ZERO, *(const(n) if t is None else A.scaled(n, t) for n, t in parts if t is not a))
        if a.op == "where":
            return where(a.args[0], *(at_least_zero(A.add(rest, A.mul(const(c), b))) for b in a.args[1:]))
        both = (a.args[0], A.neg(a.args[0])) if a.op == "abs" else a.args
        sides = [at_least_zero(A.add(rest, A.mul(const(c), s))) for s in both]
        larger = a.op in ("abs", "max")
        return all_of(*sides) if larger == (c < 0) else any_of(*sides)
    return make("ge0", (x,), "bool")


def le(a: Expr, b: Expr) -> Expr:
    (a, b), kind = A.arith(a, b)
    if kind == "int":
        return at_least_zero(A.sub(b, a))
    if a.is_const and b.is_const:
        return const(bool(a.value <= b.value))
    if a.op == "float" and b.op == "float":
        return le(a.args[0], b.args[0])
    return _through_choice(le, a, b) or make("le", (a, b), "bool")


def lt(a: Expr, b: Expr) -> Expr:
    (a, b), kind = A.arith(a, b)
    if kind == "int":
        return at_least_zero(A.sub(A.sub(b, a), ONE))
    if a.is_const and b.is_const:
        return const(bool(a.value < b.value))
    if a.op == "float" and b.op == "float":
        return lt(a.args[0], b.args[0])
    return _through_choice(lt, a, b) or make("lt", (a, b), "bool")


def _through_choice(compare: Callable[[Expr, Expr], Expr], a: Expr, b: Expr) -> Expr | None:
    """A choice compared with a constant is the choice of the comparisons, where one of them is known."""
    if a.op == "where" and b.is_const and any(x.is_const for x in a.args[1:]):
        return where(a.args[0], *(compare(x, b) for x in a.args[1:]))
    if b.op == "where" and a.is_const and any(x.is_const for x in b.args[1:]):
        return where(b.args[0], *(compare(a, x) for x in b.args[1:]))
    if b.is_const and _is_sum_of_choices(a):
        return where(a.args[0].args[0], *(compare(A.add(x, *a.args[1:]), b) for x in a.args[0].args[1:]))
    if a.is_const and _is_sum_of_choices(b):
        return where(b.args[0].args[0], *(compare(a, A.add(x, *b.args[1:])) for x in b.args[0].args[1:]))
    return None


def _is_sum_of_choices(x: Expr) -> bool:
    """A short sum of choices between constants: each adds a case, so only a few are taken apart."""
    return x.op == "add" and len(x.args) <= 4 and A.is_choice(x.args[0]) and all(A.is_choice(a) or a.is_const for a in x.args)


def ge(a: Expr, b: Expr) -> Expr:
    return le(b, a)


def gt(a: Expr, b: Expr) -> Expr:
    return lt(b, a)


def eq(a: Expr, b: Expr) -> Expr:
    (a, b), kind = A.promote(a, b)
    if a is b and kind != "float":  # NaN is not itself
        return TRUE
    if a.is_const and b.is_const:
        return const(bool(a.value == b.value))
    if kind == "bool":
        if a.is_const or b.is_const:
            c, x = (a, b) if a.is_const else (b, a)
            return x if c.value else negate(x)
        return make("same", tuple(sorted((a, b), key=lambda e: e.key)), "bool")
    chosen = _through_choice(eq, a, b)
    if chosen is not None:
        return chosen
    if kind == "int":
        x = A.sub(a, b)
        if x.op == "mul":  # a product is zero where a factor is
            return any_of(*(eq(f, ZERO) for f in x.args))
        if bounds.nonnegative(A.sub(x, ONE)) or bounds.nonnegative(A.sub(A.neg(x), ONE)):
            return FALSE
        return make("eq0", (A.with_positive_lead(x),), "bool")
    return make("eq", tuple(sorted((a, b), key=lambda e: e.key)), "bool")


def ne(a: Expr, b: Expr) -> Expr:
    return negate(eq(a, b))


def negate(x: Expr) -> Expr:
    x = as_bool(x)
    if x.is_const:
        return const(not x.value)
    if x.op == "not":
        return x.args[0]
    if x.op == "ge0":
        return at_least_zero(A.sub(A.neg(x.args[0]), ONE))
    if x.op == "and":
        return any_of(*(negate(a) for a in x.args))
    if x.op == "or":
        return all_of(*(negate(a) for a in x.args))
    return make("not", (x,), "bool")


def all_of(*xs: Expr) -> Expr:
    return _junction("and", xs, FALSE, TRUE)


def any_of(*xs: Expr) -> Expr:
    return _junction("or", xs, TRUE, FALSE)


def _junction(op: str, xs: Iterable[Expr], absorbing: Expr, neutral: Expr) -> Expr:
    flat: set[Expr] = set()
    for x in xs:
        x = as_bool(x)
        for a in x.args if x.op == op else (x,):
            if a is absorbing:
                return absorbing
            if a is not neutral:
                flat.add(a)
    if any(negate(a) in flat for a in flat if a.op in ("not", "ge0")):
        return absorbing
    reduced = _absorbed(flat, "or" if op == "and" else "and")
    if reduced != flat:  # what is left of a part may be neutral, absorbing, or several parts
        return _junction(op, reduced, absorbing, neutral)
    if not flat:
        return neutral
    if len(flat) == 1:
        return next(iter(flat))
    return make(op, tuple(sorted(flat, key=lambda e: e.key)), "bool")


def _absorbed(flat: set[Expr], dual: str) -> set[Expr]:
    """a or (a and b) = a, and a or (not a and b) = a or b; the same for ``and``."""
    out: set[Expr] = set()
    for x in flat:
        if x.op != dual:
            out.add(x)
        elif not any(a in flat for a in x.args):
            kept = [a for a in x.args if negate(a) not in flat]
            out.add(x if len(kept) == len(x.args) else all_of(*kept) if dual == "and" else any_of(*kept))
    return out


def conjuncts(x: Expr) -> tuple[Expr, ...]:
    """The parts of a conjunction; none for TRUE."""
    return () if x is TRUE else x.args if x.op == "and" else (x,)
