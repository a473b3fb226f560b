"""Tables over the distance from query to key that have one value over long stretches, as relative-position buckets far from the diagonal.

A block of keys whose distances all lie in one stretch needs one number from the table, and not one for each of its scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.kernels.materialise import Part


@dataclass(frozen=True)
class Level:
    """A score that reads a table over distances with long runs of one value."""

    flat: Expr
    """The score with ``SAME`` in place of what it reads."""
    value: Expr
    """What it reads for the distance ``LEAST``."""
    part: Part

    @property
    def scale(self) -> float | None:
        """c where ``flat`` is c * score + what is read, with c > 0."""
        factors = {a: float(c) for c, a in E.terms(self.flat)}
        return factors[E.score()] if set(factors) == {E.score(), SAME} and factors[SAME] == 1.0 and factors[E.score()] > 0 else None


LEAST, SAME = E.sym("@least", 0), E.load("@same", (), "float")


def level_of(score: Expr, parts: Sequence[Part], first_slot: int) -> Level | None:
    """The only table over distances that a score reads, where buckets that are the same for all tensors lie between distance and value."""
    found = {e: parts[e.value - first_slot] for e in E.postorder(score) if e.op == "load" and isinstance(e.value, int) and e.value >= first_slot}
    tables = [(e, p) for e, p in found.items() if p.levels and p.kind == "float"]
    if len(tables) != 1:
        return None
    load, part = tables[0]
    value = E.load(load.value, (*load.args[:-1], LEAST), load.kind)  # the distance is a part's last axis
    return Level(E.substitute(score, {load: SAME}), value, part)
