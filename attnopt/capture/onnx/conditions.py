"""What a graph took for granted of sizes while it was read: equations, solved where they are linear, and where slices end."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sympy

Sum = tuple[dict[str, int], int]
"""Names of dimensions with how often each is added, and a constant."""


def beyond(edges: Sequence[tuple[Any, int]], clamped: Sequence[Any], names: Mapping[Any, str]) -> list[tuple[str, int]]:
    """Named dimensions, and the nearest sizes of them at which a slice ends on the other side of the end of its axis.

    ``edges`` are such sizes by symbol, ``clamped`` the conditions that slices assumed, ``names`` those of symbols.
    """
    found = list(edges)
    for e in clamped:
        if isinstance(e, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)) and e.rhs.is_Integer:
            found.append((e.lhs, int(e.rhs) + {sympy.Le: 1, sympy.Lt: 0, sympy.Ge: -1, sympy.Gt: 0}[type(e)]))
    return list(dict.fromkeys((names[e], n) for e, n in found if e in names and n >= 1))


def equations(guards: Sequence[Any], clamped: Sequence[Any], names: Mapping[Any, str], named: Collection[str]) -> tuple[dict[str, Sum], list[str]]:
    """Equations that were assumed between the dimensions ``named``, solved for one of them each; and all conditions in words.

    ``guards`` are all conditions that fake values assumed: most are about strides, and say nothing. Of inequalities those in ``clamped`` count.
    """
    symbols = {symbol: sympy.Symbol(name, integer=True) for symbol, name in names.items()}
    sums: dict[str, Sum] = {}
    words: list[str] = []
    for guard in guards:
        if any(names.get(s) not in named for s in guard.free_symbols):
            continue  # of what an operator without a translation gives; the file's own operators see to that
        e = guard.xreplace({s: symbols[s] for s in guard.free_symbols})
        if guard in clamped and not isinstance(e, (sympy.Eq, sympy.Ne)) and not _always(e):
            words.append(str(e))
        if not isinstance(e, sympy.Eq) or _always(e):
            continue
        words.append(f"{e.lhs} = {e.rhs}")
        rest = sympy.expand(e.lhs - e.rhs).subs({sympy.Symbol(n, integer=True): _linear(form) for n, form in sums.items()})
        terms = {str(s): rest.coeff(s) for s in rest.free_symbols}
        constant = rest.subs(dict.fromkeys(rest.free_symbols, 0))
        linear = sympy.expand(rest - sum(c * sympy.Symbol(n, integer=True) for n, c in terms.items()) - constant) == 0
        if not linear or not all(c.is_Integer for c in (*terms.values(), constant)):
            continue
        # the one that stands alone on its side
        alone = [n for n, c in terms.items() if abs(c) == 1 and all(o * c < 0 for m, o in terms.items() if m != n)]
        if alone:
            name = alone[-1]
            sign = -int(terms.pop(name))
            sums = {n: _replaced(form, name, sign, terms, constant) for n, form in sums.items()}
            sums[name] = ({n: int(c) * sign for n, c in terms.items()}, int(constant) * sign)
    return sums, list(dict.fromkeys(words))


def _always(condition: Any) -> bool:
    """Whether a condition on sizes holds at all sizes that are tried: such a one is not worth saying."""
    numbers = {abs(int(n)) for n in condition.atoms(sympy.Integer)}
    tried = sorted({1, 2, 3, 7, 16, *(m for n in numbers for m in (n - 1, n, n + 1) if m >= 1)})[:12]
    symbols = sorted(condition.free_symbols, key=str)
    if len(symbols) > 3:
        return False
    return all(condition.subs(dict(zip(symbols, at, strict=True))) != sympy.false for at in itertools.product(tried, repeat=len(symbols)))


def _linear(form: Sum) -> Any:
    return sum(c * sympy.Symbol(n, integer=True) for n, c in form[0].items()) + form[1]


def _replaced(form: Sum, name: str, sign: int, terms: Mapping[str, Any], constant: Any) -> Sum:
    """``form`` with ``name`` replaced by what it is the sum of."""
    times = form[0].get(name, 0)
    if not times:
        return form
    parts = {n: c for n, c in form[0].items() if n != name}
    for n, c in terms.items():
        parts[n] = parts.get(n, 0) + times * int(c) * sign
    return parts, form[1] + times * int(constant) * sign
