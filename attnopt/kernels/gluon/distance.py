"""Scores that read the distance from query to key: what of it is one number per row or per key, and tables over it.

A softmax does not notice what a whole row has in common: of ``slope[h] * (k - q)`` it needs one number per key, and the row's part
matters to the lse alone. Both parts count from a block's first query, so that they stay small where weights are large.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

FIRST_QUERY = E.sym("@first_query", 0)
"""Of the rows of one consumer."""


def row_number(q: Expr) -> Expr:
    """How far a query is behind ``FIRST_QUERY``, as a float."""
    return E.load("@row", (q,), "float")


@dataclass(frozen=True)
class Slope:
    """``slope`` * (``step`` * key + ``origin``): one number per key."""

    slope: Expr
    step: int
    origin: Expr


@dataclass(frozen=True)
class Separated:
    """A score as ``score`` + ``row``. In ``score`` the keys of ``slopes`` stand for what these say."""

    score: Expr
    row: Expr | None
    slopes: dict[Expr, Slope]

    @property
    def roots(self) -> list[Expr]:
        """What is computed before the loop over the keys."""
        return [*([self.row] if self.row else []), *(x for s in self.slopes.values() for x in (s.slope, s.origin))]


def separate(score: Expr) -> Separated:
    """``score`` without products of scalars with a distance."""
    kept: list[Expr] = []
    rows: list[Expr] = []
    slopes: dict[Expr, Slope] = {}
    for coefficient, atom in E.terms(score):
        found = None if atom is None else _distance(atom)
        if atom is None or found is None:
            kept.append(E.const(coefficient) if atom is None else E.mul(E.const(coefficient), atom))
            continue
        distance, scalars, (q, q_steps), (k, k_steps) = found
        slope = E.mul(E.const(coefficient), *scalars)
        leaf = E.load(f"@along{len(slopes)}", (k,), "float")
        slopes[leaf] = Slope(slope, k_steps, E.substitute(distance.args[0], {q: FIRST_QUERY, k: E.ZERO}))
        kept.append(leaf)
        rows.append(E.mul(E.const(float(q_steps)), slope, row_number(q)))
    return Separated(E.add(*kept), E.add(*rows), slopes) if slopes else Separated(score, None, {})


def _distance(atom: Expr) -> tuple[Expr, list[Expr], tuple[Expr, int], tuple[Expr, int]] | None:
    """A product of one float of an integer that is linear in query and key, and of scalars: the float, the scalars, query and key with their factors."""
    factors = list(atom.args) if atom.op == "mul" else [atom]
    inner = [e for e in factors if e.variables and {"q", "k"} & {v.value for v in e.variables}]
    if E.score() in atom.leaves or len(inner) != 1 or inner[0].op != "float":
        return None
    summands = E.terms(inner[0].args[0])
    if not all(a is None or a.op in ("var", "sym") for _, a in summands):
        return None
    found = {a.value: (a, int(c)) for c, a in summands if a is not None and a.op == "var"}
    if set(found) != {"q", "k"}:
        return None
    return inner[0], [e for e in factors if e is not inner[0]], found["q"], found["k"]


ALONG = '''
@gluon.jit
def along(first, step: gl.constexpr, slope, like):
    """slope * (first + step * i) for the i-th key of a block. A key is a multiple of 8, a constant of each of a thread's registers, and the rest."""
    parts = like.reshape([like.shape[1] // 8, 8])
    eights = gl.arange(0, like.shape[1] // 8, layout=gl.SliceLayout(1, parts.type.layout)).to(gl.float32)[:, None]
    rest = gl.arange(0, 8, layout=gl.SliceLayout(0, parts.type.layout)).to(gl.float32)[None, :]
    values = (first.to(gl.float32) + rest * step) * slope + eights * (8.0 * step * slope)
    return gl.convert_layout(values.reshape([1, like.shape[1]]), like.type.layout)
'''


def at_distance_source(BLOCK_N: int) -> str:
    """Reads a table over distances for a tile. Of 4 elements that a thread holds, 2 neighbours are of one row and 2 of the row 8 below it, and the next 4
    are 8 keys on: the distances of a row are those of the other one step later, so half of the loads serve all, from one address."""
    n = BLOCK_N // 2
    first: dict[int, int] = {}
    lines = []
    for i in range(n):
        distance = i % 2 - 8 * (i // 2 % 2) + 8 * (i // 4)
        if distance in first:
            lines.append(f"mov.b32 ${i}, ${first[distance]};")
        else:
            first[distance] = i
            lines.append(f"ld.global.nc.b32 ${i}, [${n}+{4 * distance}];")
    constraints = ",".join(["=f"] * n + ["l"] * n)
    return f'''
@gluon.jit
def at_distance(table, distance):
    return gl.inline_asm_elementwise("{' '.join(lines)}", "{constraints}", [table + distance], dtype=gl.float32, is_pure=True, pack={n})
'''
