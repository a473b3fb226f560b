"""Sums, products, divisions and functions of expressions, normalised: a sum of products with sorted operands."""

from __future__ import annotations

import math
from collections.abc import Callable

import attnopt.ir.bounds as bounds
import attnopt.ir.logic as logic
from attnopt.ir.node import FZERO, ONE, RANK, ZERO, Expr, Kind, Number, const, make


def as_int(x: Expr) -> Expr:
    if x.kind == "bool":
        return logic.where(x, ONE, ZERO)
    if x.kind == "float":
        if x.is_const and math.isfinite(x.value):
            return const(int(x.value))
        if x.op == "float":
            return x.args[0]
        if x.op == "where" and all(a.is_const for a in x.args[1:]):
            return logic.where(x.args[0], as_int(x.args[1]), as_int(x.args[2]))
        return make("trunc", (x,), "int")
    return x


def as_float(x: Expr) -> Expr:
    if x.kind == "float":
        return x
    if x.kind == "bool":
        return logic.where(x, const(1.0), FZERO)
    if x.is_const:
        return const(float(x.value))
    if x.op == "where" and all(a.is_const for a in x.args[1:]):
        return logic.where(x.args[0], as_float(x.args[1]), as_float(x.args[2]))
    return make("float", (x,), "float")


def convert(x: Expr, kind: Kind) -> Expr:
    return {"int": as_int, "float": as_float, "bool": logic.as_bool}[kind](x)


def promote(*xs: Expr) -> tuple[tuple[Expr, ...], Kind]:
    """The operands in their common kind, as torch promotes them."""
    kind = max((x.kind for x in xs), key=RANK.__getitem__)
    return tuple(convert(x, kind) for x in xs), kind


def arith(*xs: Expr) -> tuple[tuple[Expr, ...], Kind]:
    ys, kind = promote(*xs)
    return (tuple(as_int(y) for y in ys), "int") if kind == "bool" else (ys, kind)


def split_term(x: Expr) -> tuple[Number, Expr | None]:
    """x as coefficient * rest."""
    if x.is_const:
        return x.value, None
    if x.op == "mul" and x.args[0].is_const:
        rest = x.args[1:]
        return x.args[0].value, rest[0] if len(rest) == 1 else make("mul", rest, x.kind)
    return 1, x


def terms(x: Expr) -> list[tuple[Number, Expr | None]]:
    """x as a sum of (coefficient, atom); the constant term has atom None."""
    return [split_term(a) for a in (x.args if x.op == "add" else (x,))]


_EXACT = 1 << 24
"""Integers below this are exact in float32."""


def add(*xs: Expr) -> Expr:
    args, kind = arith(*xs)
    total: dict[Expr | None, Number] = {}
    for x in args:
        for c, a in terms(x):
            total[a] = total.get(a, 0) + c
    if kind == "int":
        _rejoin(total)
    constant = total.pop(None, 0)
    items = [(a, c) for a, c in total.items() if a is not None and c != 0]
    if kind == "float":
        constant = float(constant)
    if not items:
        return const(constant)
    if kind == "float" and math.isinf(constant):
        return const(constant)
    if kind == "float":
        whole = [(a, c) for a, c in items if a.op == "float" and float(c).is_integer()]
        part = int(constant) if float(constant).is_integer() and abs(constant) < _EXACT else 0
        if whole and (len(whole) > 1 or part):  # float(k) - float(q) = float(k - q), so that index arithmetic stays integer
            index = add(const(part), *(mul(const(int(c)), a.args[0]) for a, c in whole))
            rest = [scaled(c, a) for a, c in items if (a, c) not in whole]
            return add(as_float(index), const(constant - part), *rest)
    if constant == 0 and len(items) == 1:
        return scaled(items[0][1], items[0][0])
    # An affine function of one two-way choice between constants is such a choice again: (1 - m) * min, and so on.
    if len(items) == 1 and is_choice(items[0][0]):
        a, c = items[0]
        return logic.where(a.args[0], *(const(c * b.value + constant) for b in a.args[1:]))
    out = sorted((scaled(c, a) for a, c in items), key=lambda e: e.key)
    if constant != 0:
        out.append(const(constant))
    return make("add", tuple(out), kind)


def _rejoin(total: dict[Expr | None, Number]) -> None:
    """d * (x // d) + x % d = x, in place."""
    for a in [a for a in total if a is not None and a.op == "mod"]:
        x, d = a.args
        part = make("floordiv", (x, d), "int")
        c, key = split_term(mul(d, part))
        coefficient = total.get(a, 0)
        if coefficient and total.get(key, 0) == coefficient * c:
            del total[a], total[key]
            for xc, xa in terms(x):
                total[xa] = total.get(xa, 0) + coefficient * xc
            _rejoin(total)
            return


def is_choice(x: Expr) -> bool:
    return x.op == "where" and x.args[1].is_const and x.args[2].is_const


def scaled(c: Number, a: Expr) -> Expr:
    if c == 1:
        return a
    if is_choice(a):
        return logic.where(a.args[0], *(const(c * b.value if b.value != 0 else b.value) for b in a.args[1:]))
    c = float(c) if a.kind == "float" else c
    return make("mul", (const(c), *(a.args if a.op == "mul" else (a,))), a.kind)


def mul(*xs: Expr) -> Expr:
    args, kind = arith(*xs)
    c: Number = 1
    factors: list[Expr] = []
    for x in args:
        for f in x.args if x.op == "mul" else (x,):
            if f.is_const:
                c *= f.value
            else:
                factors.append(f)
    if c == 0 and kind == "int":
        return ZERO
    if not factors or c == 0:
        return const(float(c) if kind == "float" else c)
    sums = [f for f in factors if f.op == "add"]
    if sums and (kind == "int" or len(factors) == 1):
        first = sums[0]
        rest = list(factors)
        rest.remove(first)
        return add(*(mul(const(c), t, *rest) for t in first.args))
    factors = _gated(factors)
    factors.sort(key=lambda e: e.key)
    return scaled(c, factors[0] if len(factors) == 1 else make("mul", tuple(factors), kind))


def _gated(factors: list[Expr]) -> list[Expr]:
    """Choices between a constant and zero are one such choice: m * n = where(m and n, 1, 0)."""
    gates = [f for f in factors if is_choice(f) and f.args[2].value == 0 and math.isfinite(f.args[1].value)]
    if len(gates) < 2:
        return factors
    value = math.prod(f.args[1].value for f in gates)
    return [*(f for f in factors if f not in gates), logic.where(logic.all_of(*(f.args[0] for f in gates)), const(value), gates[0].args[2])]


def neg(x: Expr) -> Expr:
    return mul(const(-1), x)


def sub(a: Expr, b: Expr) -> Expr:
    return add(a, neg(b))


def div(a: Expr, b: Expr) -> Expr:
    """True division, as floats."""
    a, b = as_float(a), as_float(b)
    if b.is_const and b.value != 0:
        return mul(a, const(1.0 / b.value))
    return make("div", (a, b), "float")


def _divide_exactly(x: Expr, d: Expr) -> tuple[Expr, Expr]:
    """x = d * quotient + rest, taking into the quotient every term that d divides."""
    quotient: list[Expr] = []
    rest: list[Expr] = []
    dc, da = split_term(d)
    for c, a in terms(x):
        t = const(c) if a is None else scaled(c, a)
        if da is None:
            if c % dc == 0:
                quotient.append(const(c // dc) if a is None else scaled(c // dc, a))
            elif a is None and isinstance(c, int):
                quotient.append(const(c // dc))
                rest.append(const(c % dc))
            else:
                rest.append(t)
            continue
        factors = [] if a is None else list(a.args if a.op == "mul" else (a,))
        need = list(da.args if da.op == "mul" else (da,))
        for f in need:
            if f in factors:
                factors.remove(f)
            else:
                rest.append(t)
                break
        else:
            if c % dc == 0:
                quotient.append(mul(const(c // dc), *factors))
            else:
                rest.append(t)
    return add(ZERO, *quotient), add(ZERO, *rest)


def _divide_nearest(x: Expr, d: Expr) -> tuple[Expr, Expr]:
    """x = d * quotient + rest for a constant d, each coefficient divided to the nearest: 127 q + k = 128 q + (k - q)."""
    if not (d.is_const and d.value > 0):
        return ZERO, x
    parts = [((2 * int(c) + d.value) // (2 * d.value), c, a) for c, a in terms(x) if a is not None]
    quotient = add(ZERO, *(scaled(n, a) for n, _, a in parts if n))
    return quotient, sub(x, mul(d, quotient))


def _is_remainder(rest: Expr, d: Expr) -> bool:
    return rest is ZERO or (bounds.nonnegative(rest) and bounds.nonnegative(sub(sub(d, rest), ONE)))


def floordiv(a: Expr, b: Expr) -> Expr:
    """Integer division that rounds towards minus infinity."""
    a, b = as_int(a), as_int(b)
    if b is ONE:
        return a
    if a.is_const and b.is_const and b.value != 0:
        return const(a.value // b.value)
    quotient, rest = _divide_exactly(a, b)
    if _is_remainder(rest, b):
        return quotient
    near, left = _divide_nearest(a, b)
    if near is not ZERO and _is_remainder(left, b):
        return near
    if rest.op == "floordiv" and quotient is ZERO:  # (x // c) // d = x // (c * d)
        return floordiv(rest.args[0], mul(rest.args[1], b))
    return add(quotient, make("floordiv", (rest, b), "int"))


def mod(a: Expr, b: Expr) -> Expr:
    """Remainder with the sign of the divisor."""
    a, b = as_int(a), as_int(b)
    if b is ONE:
        return ZERO
    if a.is_const and b.is_const and b.value != 0:
        return const(a.value % b.value)
    _, rest = _divide_exactly(a, b)
    if _is_remainder(rest, b):
        return rest
    near, left = _divide_nearest(a, b)
    if near is not ZERO and _is_remainder(left, b):
        return left
    if rest.op == "mod" and _divide_exactly(rest.args[1], b)[1] is ZERO:  # (x % (m * c)) % c = x % c
        return mod(rest.args[0], b)
    return make("mod", (rest, b), "int")


def minimum(a: Expr, b: Expr) -> Expr:
    return _extremum("min", a, b)


def maximum(a: Expr, b: Expr) -> Expr:
    return _extremum("max", a, b)


def _extremum(op: str, a: Expr, b: Expr) -> Expr:
    (a, b), kind = arith(a, b)
    if a is b:
        return a
    if a.is_const and b.is_const:
        return const(min(a.value, b.value) if op == "min" else max(a.value, b.value))
    if kind == "int":
        if bounds.nonnegative(sub(a, b)):
            return b if op == "min" else a
        if bounds.nonnegative(sub(b, a)):
            return a if op == "min" else b
    return make(op, tuple(sorted((a, b), key=lambda e: e.key)), kind)

FUNCTIONS: dict[str, Callable[..., float]] = {
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "rsqrt": lambda x: 1.0 / math.sqrt(x),
    "tanh": math.tanh,
    "sigmoid": lambda x: 1.0 / (1.0 + math.exp(-x)),
    "sin": math.sin,
    "cos": math.cos,
    "floor": lambda x: float(math.floor(x)),
    "ceil": lambda x: float(math.ceil(x)),
    "round": lambda x: float(round(x)),
    "erf": math.erf,
}
"""Float functions of one argument, with what they compute on constants."""

def function(name: str, x: Expr) -> Expr:
    """A named float function; see ``FUNCTIONS``."""
    x = as_float(x)
    if x.is_const:
        try:
            return const(float(FUNCTIONS[name](x.value)))
        except (ValueError, OverflowError, ZeroDivisionError):
            pass  # outside the real domain (log 0, ...): torch's own value is taken when the program runs
    return make(name, (x,), "float")


def power(a: Expr, b: Expr) -> Expr:
    (a, b), kind = arith(a, b)
    if b.is_const and b.value == 1:
        return a
    if b.is_const and b.value == 2:
        return mul(a, a)
    if kind == "int" and not (b.is_const and b.value >= 0):
        a, b, kind = as_float(a), as_float(b), "float"
    if a.is_const and b.is_const and not (a.value == 0 and b.value < 0):
        return const(a.value**b.value)
    return make("pow", (a, b), kind)


def with_positive_lead(x: Expr) -> Expr:
    """Of x and -x, the one in which the first atom's coefficient is positive."""
    lead = min((t for t in terms(x) if t[1] is not None), key=lambda t: t[1].key if t[1] is not None else b"")
    return neg(x) if lead[0] < 0 else x


def absolute(x: Expr) -> Expr:
    x = as_int(x) if x.kind == "bool" else x
    if x.is_const:
        return const(abs(x.value))
    if x.kind == "int":
        if bounds.nonnegative(x):
            return x
        if bounds.nonnegative(neg(x)):
            return neg(x)
        x = with_positive_lead(x)  # |x| = |-x|
    return make("abs", (x,), x.kind)
