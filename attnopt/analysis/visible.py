"""Logits taken apart: which keys a query sees, their score, and what a row is on which it sees none.

A fill hides its key only where that is exact. A row that sees some key takes no weight to those that it does not see, which is proven
by how low the visible logits and how high the hidden ones may be; a row that sees none is computed from the logits as they
stand. Where a float that the caller gives stands in the way of that proof, being low enough for a hidden key, it becomes a condition of the
mask itself; where something else does, finite fills stay numbers in the score, and only -inf hides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from attnopt.analysis.magnitude import USUAL, Magnitudes, Range, total
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import EmptyRows, Weightless

HIDDEN = -3e4
"""A logit at or below this hides its key: beside any visible logit its weight underflows to zero. Smaller fills (-1e4 and
nearer) are kept as numbers, because real logits may come close to them; see docs/decisions."""
VANISHED = -USUAL
"""The same where exponentials are taken without subtracting the row's maximum: this one is zero in every dtype."""
MARGIN = 100.0
"""A logit that lies this much below a visible one has no weight beside it, in any dtype."""


@dataclass(frozen=True)
class Swallowing:
    """A fill at or below ``fill`` swallows what is added to it and is no larger than ``swallowed``."""

    fill: float
    swallowed: float


ANYWHERE = Swallowing(-1e30, 1e10)
"""In every dtype up to float64."""
IN_HALF = Swallowing(-65504.0, 15.0)
"""Where logits are rounded to float16: beside its lowest number, numbers are 32 apart."""


@dataclass(frozen=True)
class Parts:
    """Logits taken apart: ``where(mask, score, hidden)``, and what holds on a row where nothing is visible."""

    score: Expr
    mask: Expr
    empty_rows: EmptyRows
    empty_score: Expr | None = None
    weightless: Weightless = "nan"


def split(logits: Expr, empty: Weightless, sink: Expr | None = None, underflows: bool = False, swallowing: Swallowing = ANYWHERE) -> Parts:
    """Separate the mask from the score. ``empty`` is what a row of nothing but -inf gives; a row of finite fills gives the same
    where its exponentials underflow. ``swallowing``: what is lost beside a fill, by the dtype that logits are rounded to."""
    size = Magnitudes()
    underflows = underflows and sink is None
    ways: tuple[Way, ...] = ("constants", "tensors too", "infinite only")
    for way in ways:
        found = _Splitter(size, way, VANISHED if underflows else HIDDEN).split(logits, 1.0)
        if _is_exact(found, sink is not None, underflows):
            break
    if sink is not None:  # it takes all the weight of a row on which everything else is hidden
        return Parts(found.score, found.mask, "zero", weightless="zero")
    if found.mask is E.TRUE or underflows or found.top == -math.inf:
        return Parts(found.score, found.mask, empty, weightless=empty)
    program = _where_hidden(logits, found.mask, size, swallowing)
    if _same_for_all_keys(program) and size(program)[0] > -math.inf:
        return Parts(found.score, found.mask, "uniform", weightless=empty)
    return Parts(found.score, found.mask, "program", program, empty)


def _is_exact(found: _Seen, has_sink: bool, underflows: bool) -> bool:
    """Whether no key that is hidden takes weight in a row that sees one or has a sink, nor keeps a row from underflowing."""
    if underflows:
        return found.top <= VANISHED and found.low >= VANISHED + MARGIN
    if found.mask is E.TRUE or found.top == -math.inf:
        return True
    return found.top <= HIDDEN and (has_sink or found.low >= found.top + MARGIN)


Way = Literal["constants", "tensors too", "infinite only"]
"""What hides a key: constants as low as that; tensors that may hold such numbers as well; or -inf alone."""


def only_shows(condition: Expr) -> bool:
    """Whether a condition of a mask says no more of a number than that it is not so low that it hides."""
    return condition.op == "lt" and condition.args[0] in (E.const(HIDDEN), E.const(VANISHED))


@dataclass(frozen=True)
class _Seen:
    """An expression as a score where ``mask`` holds, and something low where it does not."""

    score: Expr
    mask: Expr
    low: float
    """Where ``mask`` holds, the expression is no less, up to an ordinary number."""
    high: float
    """It is nowhere more."""
    top: float = -math.inf
    """Where ``mask`` does not hold, it is no more."""


@dataclass(frozen=True)
class _Splitter:
    size: Magnitudes
    way: Way
    hidden: float = HIDDEN

    def split(self, x: Expr, factor: float) -> _Seen:
        """``factor * x``; the factor is positive."""
        if x.op == "where":
            return self._choice(x, factor)
        if x.op == "add":
            return self._sum(x, factor)
        if x.op == "mul" and x.args[0].is_const and x.args[0].value > 0 and len(x.args) == 2:
            return self.split(x.args[1], factor * float(x.args[0].value))
        if x.op in ("max", "min") and any(a.is_const for a in x.args):
            return self._clamp(x, factor)
        return self._whole(x, factor)

    def _whole(self, x: Expr, factor: float) -> _Seen:
        """Not taken apart any further: visible everywhere, or where it is no number that hides."""
        x = E.mul(E.const(factor), x)
        if x.is_const and x.value == -math.inf:  # no key is visible anywhere
            return _Seen(E.FZERO, E.FALSE, 0.0, 0.0)
        low, high = self.size(x)
        mask = E.lt(E.const(self.hidden), x) if self.way == "tensors too" and low < -USUAL and E.score() not in x.leaves and not x.is_const else E.TRUE
        return _Seen(x, E.TRUE, low, high) if mask is E.TRUE else _Seen(x, mask, self.hidden + MARGIN, max(high, 0.0), self.hidden)

    def _is_fill(self, x: Expr, factor: float) -> bool:
        return x.is_const and x.kind == "float" and factor * float(x.value) <= (-math.inf if self.way == "infinite only" else self.hidden)

    def _choice(self, x: Expr, factor: float) -> _Seen:
        c, a, b = x.args
        if self._is_fill(a, factor):
            c, a, b = E.negate(c), b, a
        if self._is_fill(b, factor):
            seen = self.split(a, factor)
            fill = factor * float(b.value)
            return _Seen(seen.score, E.all_of(c, seen.mask), seen.low, max(seen.high, fill), max(seen.top, fill))
        one, other = self.split(a, factor), self.split(b, factor)
        if one.mask is E.TRUE and other.mask is E.TRUE:
            return self._whole(x, factor)
        return _Seen(E.where(c, one.score, other.score), E.where(c, one.mask, other.mask), min(one.low, other.low), max(one.high, other.high), max(one.top, other.top))

    def _sum(self, x: Expr, factor: float) -> _Seen:
        """Hidden where any part is. The parts that may hide and hold no score are one: a mask's constant may cancel against its tensor."""
        parts: list[_Seen] = []
        low: list[Expr] = []
        for a in x.args:
            seen = _Splitter(self.size, "constants", self.hidden).split(a, factor) if self.way == "tensors too" else self.split(a, factor)
            if self.way == "tensors too" and seen.mask is E.TRUE and seen.low < -USUAL and E.score() not in a.leaves:
                low.append(a)
            else:
                parts.append(seen if self.way != "tensors too" else self.split(a, factor))
        if low:
            parts.append(self._whole(E.add(*low), factor))
        above: list[Range] = [(p.low, p.high) for p in parts]
        tops = [_plus(p.top, total([*above[:i], *above[i + 1 :], (0.0, 0.0)])[1]) for i, p in enumerate(parts) if p.mask is not E.TRUE]
        least, most = total(above)
        return _Seen(E.add(E.FZERO, *(p.score for p in parts)), E.all_of(*(p.mask for p in parts)), least, most, max(tops, default=-math.inf))

    def _clamp(self, x: Expr, factor: float) -> _Seen:
        """A bound from below at a hidden value leaves hidden keys hidden and visible ones alone; one from above, at a visible value, likewise."""
        (other,) = (a for a in x.args if not a.is_const)
        (bound,) = (a for a in x.args if a.is_const)
        at = factor * float(bound.value)
        seen = self.split(other, factor)
        if x.op == "min":
            if seen.mask is E.TRUE or at <= self.hidden:
                return self._whole(x, factor)
            return _Seen(E.minimum(seen.score, E.const(at)), seen.mask, min(seen.low, at), min(seen.high, at), min(seen.top, at))
        if at > self.hidden or (self.way == "infinite only" and seen.mask is not E.TRUE):
            return self._whole(x, factor)
        score = seen.score if seen.low >= at + MARGIN else E.maximum(seen.score, E.const(at))
        top = max(seen.top, at) if seen.mask is not E.TRUE else -math.inf
        return _Seen(score, seen.mask, max(seen.low, at), max(seen.high, at), top)


def _plus(a: float, b: float) -> float:
    """a + b, where -inf stays what it is unless the other is infinite too."""
    return math.inf if math.isnan(a + b) else a + b


def _where_hidden(x: Expr, mask: Expr, size: Magnitudes, by: Swallowing) -> Expr:
    """``x`` under the assumption that ``mask`` is false."""
    if x.op == "where":
        c, a, b = x.args
        if c is mask:
            return b
        if E.negate(c) is mask:
            return a
        return x
    if x.op == "add":
        parts = [_where_hidden(a, mask, size, by) for a in x.args]
        swallowing = [p for p in parts if p.is_const and p.value <= by.fill]
        ranges = [size(p) for p in parts if not (p.is_const and p.value <= by.fill)]
        if swallowing and all(low >= -by.swallowed and high <= by.swallowed for low, high in ranges):
            return E.add(*swallowing)
        return E.add(*parts)
    if x.op in ("mul", "max", "min") and any(a.is_const for a in x.args):
        parts = [_where_hidden(a, mask, size, by) for a in x.args]
        return E.build(x.op, *parts) if len(parts) == 2 else E.mul(*parts) if x.op == "mul" else x
    return x


def _same_for_all_keys(x: Expr) -> bool:
    return x.is_const or not any(v.op == "score" or (v.op == "var" and v.value == "k") for v in x.leaves)
