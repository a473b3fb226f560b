"""Which sizes of the inputs belong together in a captured graph, as ``keys.shape[2] == input_ids.shape[1] + past.shape[2]``.

Proofs rest on such relations: a mask is causal because there are as many new keys as queries. Each is a part of the guard
of the graph, so a call for which it does not hold is captured on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from attnopt.capture.guards import SymbolicSizes, expr_of, hint_of, is_symbolic
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class Relation:
    """An equality between sizes of inputs, and the symbols that it ties."""

    text: str
    symbols: frozenset[str]


def relations(names: Sequence[str], sizes: SymbolicSizes) -> list[Relation]:
    """Every equality that the guard demands, except those between batches. ``names`` are the leaves' names."""
    said = {s: sympy.Symbol(f"{names[leaf]}.shape[{d}]", integer=True) for s, (leaf, d) in sizes.home.items()}
    batches = {s for s, (_, d) in sizes.home.items() if d == 0}
    out: list[Relation] = []
    for i, v in enumerate(sizes.values):
        for d, size in enumerate(v.shape if isinstance(v, torch.Tensor) else ()):
            expr = expr_of(size)
            if expr.free_symbols and sizes.home.get(expr) != (i, d) and not expr.free_symbols <= batches:
                out.append(Relation(f"{names[i]}.shape[{d}] == {expr.xreplace(said)}", frozenset(map(str, expr.free_symbols))))
    for c in sizes.conditions:
        # Strides are compared as least and greatest of products; that says nothing about sizes.
        plain = not any(type(x).__name__ in ("Min", "Max") for x in sympy.preorder_traversal(c))
        if isinstance(c, sympy.Eq) and len(c.free_symbols) > 1 and plain:
            left, right = c.xreplace(said).args
            out.append(Relation(f"{left} == {right}", frozenset(map(str, c.free_symbols))))
    return list(dict.fromkeys(out))


def relations_of(spec: AttentionSpec, all_: Sequence[Relation]) -> tuple[str, ...]:
    """Those that tie sizes which the queries' or the keys' length or the mask is made of."""
    used = {x.value[0] for p in (spec.dims.Sq, spec.dims.Skv, *spec.programs) for x in E.postorder(p) if x.op == "sym"}
    return tuple(r.text for r in all_ if r.symbols & used)


def tie_lengths(values: Sequence[Any]) -> None:
    """Where export demands that a + b == c + d, and the example has a == c and b == d, take those for the relation.

    Keys and values that are each made of a past and a new part reach export as four sizes of which it knows the two sums
    only. Calls with other splits are captured on their own.
    """
    hints: dict[sympy.Symbol, int] = {}
    env = None
    size: Any
    for v in values:
        for size in v.shape if isinstance(v, torch.Tensor) else ():
            if is_symbolic(size) and isinstance(expr_of(size), sympy.Symbol):
                hints[expr_of(size)] = hint_of(size)
                env = size.node.shape_env
    if env is None:
        return
    conditions = [env.simplify(g.expr.xreplace(env.replacements)) for g in env.guards]
    for symbol, total in _pinched(conditions):
        if total.free_symbols | {symbol} <= set(hints):
            env._set_replacement(symbol, total, "bounded by the same sum on both sides")
    for guard in list(env.guards):
        expr = env.simplify(guard.expr.xreplace(env.replacements))
        if not isinstance(expr, sympy.Eq) or not expr.free_symbols <= set(hints):
            continue
        left, right = (list(sympy.Add.make_args(side)) for side in expr.args)
        for a, b in _pairs(left, right, hints) or ():
            env._set_replacement(b, a, "the same parts")


def _pinched(conditions: Sequence[sympy.Basic]) -> list[tuple[sympy.Symbol, sympy.Expr]]:
    """Symbols that are at most and at least the same sum of others, with that sum: an equality that is met as two bounds."""
    at_most_zero = {sympy.expand(c.lts - c.gts) for c in conditions if isinstance(c, (sympy.Le, sympy.Ge))}
    out: list[tuple[sympy.Symbol, sympy.Expr]] = []
    for e in at_most_zero:
        if sympy.expand(-e) not in at_most_zero:
            continue
        for symbol in e.free_symbols:
            rest = sympy.expand(symbol - e)
            if e.coeff(symbol) == 1 and symbol not in rest.free_symbols and all(c > 0 for c in rest.as_coefficients_dict().values()):
                out.append((symbol, rest))
    return out


def _pairs(left: list[Any], right: list[Any], hints: dict[sympy.Symbol, int]) -> list[tuple[sympy.Symbol, sympy.Symbol]] | None:
    """Each symbol of one sum with the one of the other that had the same size; None when that is not one to one."""
    if len(left) != len(right) or not all(isinstance(x, sympy.Symbol) for x in (*left, *right)):
        return None
    by_size = {hints[x]: x for x in right}
    if len(by_size) != len(right) or {hints[x] for x in left} != set(by_size):
        return None
    return [(x, by_size[hints[x]]) for x in left]
