"""Expressions over indices, sizes and tensor elements: the language in which attnopt says what a model computes.

One small hash-consed language serves index arithmetic (``b * H + h``), masks (``k <= q``) and scores
(``0.125 * s + slope[h] * (k - q)``). Equal expressions are the same object, so ``is`` compares and a dict memoises.
Every constructor normalises: integers and floats are kept as sums of products, integer comparisons as
``linear >= 0``, booleans as flat conjunctions and disjunctions. What a rule cannot simplify stays as written.

Floats are rearranged as real numbers are (the *exact* tier promises the same function up to rounding).
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

Kind = Literal["int", "float", "bool"]
Number = int | float

_RANK: dict[Kind, int] = {"bool": 0, "int": 1, "float": 2}
_TABLE: weakref.WeakValueDictionary[Any, Expr] = weakref.WeakValueDictionary()


class Expr:
    """One node. Build it with the functions of this module, never directly.

    ``op`` names the operation, ``args`` are its operands, ``value`` is what a leaf holds (a number, a name, a load's
    slot) and ``kind`` is ``int``, ``float`` or ``bool``. A variable also has an ``extent``: it runs over [0, extent).
    """

    __slots__ = ("__weakref__", "_atoms", "_simplified", "args", "extent", "key", "kind", "op", "value")

    op: str
    args: tuple[Expr, ...]
    value: Any
    kind: Kind
    extent: Expr | None
    key: bytes
    _atoms: frozenset[Expr] | None

    def __repr__(self) -> str:
        from attnopt.ir.printing import render

        return render(self)

    @property
    def leaves(self) -> frozenset[Expr]:
        """All variables, sizes, scores and loads below this node, itself included (a load's own index too)."""
        if self._atoms is None:
            out: set[Expr] = set()
            for a in self.args:
                out |= a.leaves
            if self.op in LEAVES:
                out.add(self)
            self._atoms = frozenset(out)
        return self._atoms

    @property
    def variables(self) -> frozenset[Expr]:
        return frozenset(x for x in self.leaves if x.op == "var")

    @property
    def is_const(self) -> bool:
        return self.op == "const"


LEAVES = {"var", "sym", "score", "load"}


def _make(op: str, args: tuple[Expr, ...], kind: Kind, value: Any = None, extent: Expr | None = None) -> Expr:
    ident = (op, args, kind, type(value), repr(value) if isinstance(value, float) else value, extent)
    found = _TABLE.get(ident)
    if found is not None:
        return found
    e = object.__new__(Expr)
    e.op, e.args, e.kind, e.value, e.extent, e._atoms = op, args, kind, value, extent, None
    # A digest of the structure orders operands the same way in every process.
    h = hashlib.blake2b(f"{op}|{kind}|{value!r}".encode(), digest_size=8)
    for a in args:
        h.update(a.key)
    e.key = h.digest()
    _TABLE[ident] = e
    return e


# ------------------------------------------------------------------------------------------------ leaves


def const(value: Number | bool) -> Expr:
    kind: Kind = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"
    return _make("const", (), kind, value)


TRUE, FALSE = const(True), const(False)
ZERO, ONE = const(0), const(1)
FZERO, FONE = const(0.0), const(1.0)


def sym(name: str, low: int = 1) -> Expr:
    """A symbolic size, at least ``low``."""
    return _make("sym", (), "int", (name, low))


def var(name: str, extent: Expr | int) -> Expr:
    """An index that runs over [0, extent)."""
    return _make("var", (), "int", name, extent if isinstance(extent, Expr) else const(extent))


def score() -> Expr:
    """The raw product q . k of the current query and key, before any scale."""
    return _make("score", (), "float", "s")


def load(slot: Any, index: Iterable[Expr], kind: Kind) -> Expr:
    """Element ``index`` of a tensor. ``slot`` is an FX node during analysis and a position in ``loads`` in a spec."""
    return _make("load", tuple(index), kind, slot)


# ------------------------------------------------------------------------------------------------ conversions


def as_int(x: Expr) -> Expr:
    if x.kind == "bool":
        return where(x, ONE, ZERO)
    if x.kind == "float":
        if x.is_const and math.isfinite(x.value):
            return const(int(x.value))
        if x.op == "float":
            return x.args[0]
        if x.op == "where" and all(a.is_const for a in x.args[1:]):
            return where(x.args[0], as_int(x.args[1]), as_int(x.args[2]))
        return _make("trunc", (x,), "int")
    return x


def as_float(x: Expr) -> Expr:
    if x.kind == "float":
        return x
    if x.kind == "bool":
        return where(x, const(1.0), FZERO)
    if x.is_const:
        return const(float(x.value))
    if x.op == "where" and all(a.is_const for a in x.args[1:]):
        return where(x.args[0], as_float(x.args[1]), as_float(x.args[2]))
    return _make("float", (x,), "float")


def as_bool(x: Expr) -> Expr:
    if x.kind == "bool":
        return x
    return ne(x, ZERO if x.kind == "int" else FZERO)


def convert(x: Expr, kind: Kind) -> Expr:
    return {"int": as_int, "float": as_float, "bool": as_bool}[kind](x)


def promote(*xs: Expr) -> tuple[tuple[Expr, ...], Kind]:
    """The operands in their common kind, as torch promotes them."""
    kind = max((x.kind for x in xs), key=_RANK.__getitem__)
    return tuple(convert(x, kind) for x in xs), kind


def _arith(*xs: Expr) -> tuple[tuple[Expr, ...], Kind]:
    ys, kind = promote(*xs)
    return (tuple(as_int(y) for y in ys), "int") if kind == "bool" else (ys, kind)


# ------------------------------------------------------------------------------------------------ sums and products


def _term(x: Expr) -> tuple[Number, Expr | None]:
    """x as coefficient * rest."""
    if x.is_const:
        return x.value, None
    if x.op == "mul" and x.args[0].is_const:
        rest = x.args[1:]
        return x.args[0].value, rest[0] if len(rest) == 1 else _make("mul", rest, x.kind)
    return 1, x


def terms(x: Expr) -> list[tuple[Number, Expr | None]]:
    """x as a sum of (coefficient, atom); the constant term has atom None."""
    return [_term(a) for a in (x.args if x.op == "add" else (x,))]


def add(*xs: Expr) -> Expr:
    args, kind = _arith(*xs)
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
    if constant == 0 and len(items) == 1:
        return _scaled(items[0][1], items[0][0])
    # An affine function of one two-way choice between constants is such a choice again: (1 - m) * min, and so on.
    if len(items) == 1 and _is_choice(items[0][0]):
        a, c = items[0]
        return where(a.args[0], *(const(c * b.value + constant) for b in a.args[1:]))
    out = sorted((_scaled(c, a) for a, c in items), key=lambda e: e.key)
    if constant != 0:
        out.append(const(constant))
    return _make("add", tuple(out), kind)


def _rejoin(total: dict[Expr | None, Number]) -> None:
    """d * (x // d) + x % d = x, in place."""
    for a in [a for a in total if a is not None and a.op == "mod"]:
        x, d = a.args
        part = _make("floordiv", (x, d), "int")
        c, key = _term(mul(d, part))
        coefficient = total.get(a, 0)
        if coefficient and total.get(key, 0) == coefficient * c:
            del total[a], total[key]
            for xc, xa in terms(x):
                total[xa] = total.get(xa, 0) + coefficient * xc
            _rejoin(total)
            return


def _is_choice(x: Expr) -> bool:
    return x.op == "where" and x.args[1].is_const and x.args[2].is_const


def _scaled(c: Number, a: Expr) -> Expr:
    if c == 1:
        return a
    if _is_choice(a):
        return where(a.args[0], *(const(c * b.value if b.value != 0 else b.value) for b in a.args[1:]))
    c = float(c) if a.kind == "float" else c
    return _make("mul", (const(c), *(a.args if a.op == "mul" else (a,))), a.kind)


def mul(*xs: Expr) -> Expr:
    args, kind = _arith(*xs)
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
    factors.sort(key=lambda e: e.key)
    return _scaled(c, factors[0] if len(factors) == 1 else _make("mul", tuple(factors), kind))


def neg(x: Expr) -> Expr:
    return mul(const(-1), x)


def sub(a: Expr, b: Expr) -> Expr:
    return add(a, neg(b))


def div(a: Expr, b: Expr) -> Expr:
    """True division, as floats."""
    a, b = as_float(a), as_float(b)
    if b.is_const and b.value != 0:
        return mul(a, const(1.0 / b.value))
    return _make("div", (a, b), "float")


def _divide_exactly(x: Expr, d: Expr) -> tuple[Expr, Expr]:
    """x = d * quotient + rest, taking into the quotient every term that d divides."""
    quotient: list[Expr] = []
    rest: list[Expr] = []
    dc, da = _term(d)
    for c, a in terms(x):
        t = const(c) if a is None else _scaled(c, a)
        if da is None:
            if c % dc == 0:
                quotient.append(const(c // dc) if a is None else _scaled(c // dc, a))
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


def floordiv(a: Expr, b: Expr) -> Expr:
    """Integer division that rounds towards minus infinity."""
    from attnopt.ir.bounds import nonnegative

    a, b = as_int(a), as_int(b)
    if b is ONE:
        return a
    if a.is_const and b.is_const and b.value != 0:
        return const(a.value // b.value)
    quotient, rest = _divide_exactly(a, b)
    if rest is ZERO or (nonnegative(rest) and nonnegative(sub(sub(b, rest), ONE))):
        return quotient
    if rest.op == "floordiv" and quotient is ZERO:  # (x // c) // d = x // (c * d)
        return floordiv(rest.args[0], mul(rest.args[1], b))
    return add(quotient, _make("floordiv", (rest, b), "int"))


def mod(a: Expr, b: Expr) -> Expr:
    """Remainder with the sign of the divisor."""
    from attnopt.ir.bounds import nonnegative

    a, b = as_int(a), as_int(b)
    if b is ONE:
        return ZERO
    if a.is_const and b.is_const and b.value != 0:
        return const(a.value % b.value)
    _, rest = _divide_exactly(a, b)
    if rest is ZERO or (nonnegative(rest) and nonnegative(sub(sub(b, rest), ONE))):
        return rest
    if rest.op == "mod" and _divide_exactly(rest.args[1], b)[1] is ZERO:  # (x % (m * c)) % c = x % c
        return mod(rest.args[0], b)
    return _make("mod", (rest, b), "int")


def minimum(a: Expr, b: Expr) -> Expr:
    return _extremum("min", a, b)


def maximum(a: Expr, b: Expr) -> Expr:
    return _extremum("max", a, b)


def _extremum(op: str, a: Expr, b: Expr) -> Expr:
    from attnopt.ir.bounds import nonnegative

    (a, b), kind = _arith(a, b)
    if a is b:
        return a
    if a.is_const and b.is_const:
        return const(min(a.value, b.value) if op == "min" else max(a.value, b.value))
    if kind == "int":
        if nonnegative(sub(a, b)):
            return b if op == "min" else a
        if nonnegative(sub(b, a)):
            return a if op == "min" else b
    return _make(op, tuple(sorted((a, b), key=lambda e: e.key)), kind)


# ------------------------------------------------------------------------------------------------ functions

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
    return _make(name, (x,), "float")


def power(a: Expr, b: Expr) -> Expr:
    (a, b), kind = _arith(a, b)
    if b.is_const and b.value == 1:
        return a
    if b.is_const and b.value == 2:
        return mul(a, a)
    if kind == "int" and not (b.is_const and b.value >= 0):
        a, b, kind = as_float(a), as_float(b), "float"
    if a.is_const and b.is_const and not (a.value == 0 and b.value < 0):
        return const(a.value**b.value)
    return _make("pow", (a, b), kind)


def _with_positive_lead(x: Expr) -> Expr:
    """Of x and -x, the one in which the first atom's coefficient is positive."""
    lead = min((t for t in terms(x) if t[1] is not None), key=lambda t: t[1].key if t[1] is not None else b"")
    return neg(x) if lead[0] < 0 else x


def absolute(x: Expr) -> Expr:
    from attnopt.ir.bounds import nonnegative

    x = as_int(x) if x.kind == "bool" else x
    if x.is_const:
        return const(abs(x.value))
    if x.kind == "int":
        if nonnegative(x):
            return x
        if nonnegative(neg(x)):
            return neg(x)
        x = _with_positive_lead(x)  # |x| = |-x|
    return _make("abs", (x,), x.kind)


def where(c: Expr, a: Expr, b: Expr) -> Expr:
    c = as_bool(c)
    (a, b), kind = promote(a, b)
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
    return _make("where", (c, a, b), kind)


# ------------------------------------------------------------------------------------------------ comparisons


def at_least_zero(x: Expr) -> Expr:
    """x >= 0 for an integer x, in normal form: divided by the greatest common divisor, bounds applied."""
    from attnopt.ir.bounds import nonnegative

    parts = terms(x)
    g = 0
    for c, a in parts:
        if a is not None:
            g = math.gcd(g, int(c))
    if g > 1:
        x = add(ZERO, *(const(int(c) // g) if a is None else _scaled(int(c) // g, a) for c, a in parts))
        parts = terms(x)
    if nonnegative(x):
        return TRUE
    if nonnegative(sub(neg(x), ONE)):
        return FALSE
    for c, a in parts:
        if a is None or a.op not in ("abs", "min", "max", "where") or a.kind != "int":
            continue
        rest = add(ZERO, *(const(n) if t is None else _scaled(n, t) for n, t in parts if t is not a))
        if a.op == "where":
            return where(a.args[0], *(at_least_zero(add(rest, mul(const(c), b))) for b in a.args[1:]))
        both = (a.args[0], neg(a.args[0])) if a.op == "abs" else a.args
        sides = [at_least_zero(add(rest, mul(const(c), s))) for s in both]
        larger = a.op in ("abs", "max")
        return all_of(*sides) if larger == (c < 0) else any_of(*sides)
    return _make("ge0", (x,), "bool")


def le(a: Expr, b: Expr) -> Expr:
    (a, b), kind = _arith(a, b)
    if kind == "int":
        return at_least_zero(sub(b, a))
    if a.is_const and b.is_const:
        return const(bool(a.value <= b.value))
    if a.op == "float" and b.op == "float":
        return le(a.args[0], b.args[0])
    return _make("le", (a, b), "bool")


def lt(a: Expr, b: Expr) -> Expr:
    (a, b), kind = _arith(a, b)
    if kind == "int":
        return at_least_zero(sub(sub(b, a), ONE))
    if a.is_const and b.is_const:
        return const(bool(a.value < b.value))
    if a.op == "float" and b.op == "float":
        return lt(a.args[0], b.args[0])
    return _make("lt", (a, b), "bool")


def ge(a: Expr, b: Expr) -> Expr:
    return le(b, a)


def gt(a: Expr, b: Expr) -> Expr:
    return lt(b, a)


def eq(a: Expr, b: Expr) -> Expr:
    (a, b), kind = promote(a, b)
    if a is b and kind != "float":  # NaN is not itself
        return TRUE
    if a.is_const and b.is_const:
        return const(bool(a.value == b.value))
    if kind == "bool":
        if a.is_const or b.is_const:
            c, x = (a, b) if a.is_const else (b, a)
            return x if c.value else negate(x)
        return _make("same", tuple(sorted((a, b), key=lambda e: e.key)), "bool")
    if _is_choice(a) and b.is_const:
        return where(a.args[0], *(const(bool(x.value == b.value)) for x in a.args[1:]))
    if kind == "int":
        from attnopt.ir.bounds import nonnegative

        x = sub(a, b)
        if nonnegative(sub(x, ONE)) or nonnegative(sub(neg(x), ONE)):
            return FALSE
        return _make("eq0", (_with_positive_lead(x),), "bool")
    return _make("eq", tuple(sorted((a, b), key=lambda e: e.key)), "bool")


def ne(a: Expr, b: Expr) -> Expr:
    return negate(eq(a, b))


def negate(x: Expr) -> Expr:
    x = as_bool(x)
    if x.is_const:
        return const(not x.value)
    if x.op == "not":
        return x.args[0]
    if x.op == "ge0":
        return at_least_zero(sub(neg(x.args[0]), ONE))
    if x.op == "and":
        return any_of(*(negate(a) for a in x.args))
    if x.op == "or":
        return all_of(*(negate(a) for a in x.args))
    return _make("not", (x,), "bool")


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
    if not flat:
        return neutral
    if len(flat) == 1:
        return next(iter(flat))
    return _make(op, tuple(sorted(flat, key=lambda e: e.key)), "bool")


def conjuncts(x: Expr) -> tuple[Expr, ...]:
    """The parts of a conjunction; none for TRUE."""
    return () if x is TRUE else x.args if x.op == "and" else (x,)


# ------------------------------------------------------------------------------------------------ walking

_BUILD: dict[str, Callable[..., Expr]] = {
    "add": add,
    "mul": mul,
    "div": div,
    "floordiv": floordiv,
    "mod": mod,
    "min": minimum,
    "max": maximum,
    "pow": power,
    "abs": absolute,
    "where": where,
    "ge0": at_least_zero,
    "le": le,
    "lt": lt,
    "eq": eq,
    "same": eq,
    "eq0": lambda x: eq(x, ZERO),
    "not": negate,
    "and": all_of,
    "or": any_of,
    "float": as_float,
    "trunc": as_int,
    **{name: (lambda x, name=name: function(name, x)) for name in FUNCTIONS},
}
"""Each operation's constructor; the complete list of what an interpreter of expressions must know."""

OPERATIONS = frozenset(_BUILD)


def rebuild(e: Expr, args: tuple[Expr, ...]) -> Expr:
    """``e`` with other operands, normalised again."""
    if args == e.args:
        return e
    if e.op == "load":
        return load(e.value, args, e.kind)
    return _BUILD[e.op](*args)


def build(op: str, *args: Expr) -> Expr:
    return _BUILD[op](*args)


def substitute(e: Expr, table: Mapping[Expr, Expr]) -> Expr:
    """``e`` with every node that is a key of ``table`` replaced by its value."""
    memo: dict[Expr, Expr] = {}

    def go(x: Expr) -> Expr:
        if x in table:
            return table[x]
        if x not in memo:
            memo[x] = rebuild(x, tuple(go(a) for a in x.args)) if x.args else x
        return memo[x]

    return go(e)


def postorder(*roots: Expr) -> Iterator[Expr]:
    """Every node once, operands first."""
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(r, False) for r in reversed(roots)]
    while stack:
        e, done = stack.pop()
        if done:
            yield e
        elif e not in seen:
            seen.add(e)
            stack.append((e, True))
            stack.extend((a, False) for a in reversed(e.args))

