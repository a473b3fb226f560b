"""Expressions over indices, sizes and tensor elements: the language in which attnopt says what a model computes.

One small hash-consed language serves index arithmetic (``b * H + h``), masks (``k <= q``) and scores
(``0.125 * s + slope[h] * (k - q)``). Equal expressions are the same object, so ``is`` compares and a dict memoises.
Every constructor normalises: integers and floats are kept as sums of products, integer comparisons as
``linear >= 0``, booleans as flat conjunctions and disjunctions. What a rule cannot simplify stays as written.

Floats are rearranged as real numbers are (the *exact* tier promises the same function up to rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping

from attnopt.ir.arithmetic import (
    FUNCTIONS,
    absolute,
    add,
    as_float,
    as_int,
    convert,
    div,
    floordiv,
    function,
    maximum,
    minimum,
    mod,
    mul,
    neg,
    power,
    promote,
    split_term,
    sub,
    terms,
)
from attnopt.ir.logic import (
    all_of,
    any_of,
    as_bool,
    at_least_zero,
    conjuncts,
    eq,
    ge,
    gt,
    le,
    lt,
    ne,
    negate,
    where,
)
from attnopt.ir.node import (
    FALSE,
    FONE,
    FZERO,
    LEAVES,
    ONE,
    TRUE,
    ZERO,
    Expr,
    Kind,
    Number,
    const,
    load,
    score,
    sym,
    var,
)

__all__ = [
    "FALSE",
    "FONE",
    "FUNCTIONS",
    "FZERO",
    "LEAVES",
    "ONE",
    "OPERATIONS",
    "TRUE",
    "ZERO",
    "Expr",
    "Kind",
    "Number",
    "absolute",
    "add",
    "all_of",
    "any_of",
    "as_bool",
    "as_float",
    "as_int",
    "at_least_zero",
    "build",
    "conjuncts",
    "const",
    "convert",
    "div",
    "eq",
    "floordiv",
    "function",
    "ge",
    "gt",
    "le",
    "load",
    "lt",
    "maximum",
    "minimum",
    "mod",
    "mul",
    "ne",
    "neg",
    "negate",
    "postorder",
    "power",
    "promote",
    "rebuild",
    "score",
    "split_term",
    "sub",
    "substitute",
    "sym",
    "terms",
    "var",
    "where",
]

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


def postorder(*roots: Expr, known: Container[Expr] = ()) -> Iterator[Expr]:
    """Every node once, operands first; of ``known`` nodes no operands."""
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(r, False) for r in reversed(roots)]
    while stack:
        e, done = stack.pop()
        if done:
            yield e
        elif e not in seen:
            seen.add(e)
            stack.append((e, True))
            stack.extend((a, False) for a in reversed(e.args if e not in known else ()))
