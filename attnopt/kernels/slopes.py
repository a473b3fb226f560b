"""What the gradient of one attention consists of: the slope of its scores by the raw product and by each load that needs a gradient.

A load's gradient is summed where its index is the same: over keys where it reads no key (an element per query, a head's slope),
over queries where it reads no query, along diagonals where it reads only the distance between them (a relative-position table).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.derivative import derivatives, float_loads
from attnopt.kernels.materialise import Part, by_distance
from attnopt.kernels.programs import LOG2E, programs_of

Sum = Literal["row", "column", "distance", "dense"]


@dataclass(frozen=True)
class LoadSlope:
    """How the scores depend on one load (a tensor with an index)."""

    load: Expr
    score: Expr
    """d score / d load, in natural units."""
    empty: Expr
    """The same of the score for rows that see no key."""

    @property
    def axes(self) -> str:
        """The index variables that it reads."""
        return "".join(a for a in "bhqk" if a in {v.value for v in self.load.variables})

    @property
    def sum(self) -> Sum:
        """Where contributions come together: per query, per key, per distance of the two, or not at all."""
        if "k" not in self.axes:
            return "row"
        if "q" not in self.axes:
            return "column"
        return "dense" if self.diagonal is None else "distance"

    @property
    def diagonal(self) -> Part | None:
        """The load as a function of the distance from query to key, where it is one."""
        return by_distance(self.load)


@dataclass(frozen=True)
class Slopes:
    """Of one spec, whose programs are those of ``programs_of``."""

    score: Expr
    """d score / d s, in natural units."""
    empty: Expr
    """The same of the score for rows that see no key; 0 where there is none."""
    loads: tuple[LoadSlope, ...]

    @property
    def constant(self) -> float | None:
        """The one factor by which all gradients of s are multiplied, where there is one: it is then applied to sums, not to scores."""
        if not self.score.is_const or not (self.empty is E.FZERO or self.empty is self.score):
            return None
        return float(self.score.value)


@lru_cache(maxsize=1024)
def slopes_of(spec: AttentionSpec, needs: frozenset[int]) -> Slopes:
    """The slopes by the raw product and by the float loads in slots ``needs``, also where these are read through a part."""
    p = programs_of(spec)
    natural = E.const(1 / LOG2E if p.folded else 1.0)
    through = {len(spec.loads) + i for i, part in enumerate(p.parts) if part.kind == "float" and any(x.value in needs for x in float_loads((part.expr,)))}
    wanted = [x for x in float_loads([p.score, *([] if p.empty is None else [p.empty])]) if x.value in needs | through]
    s = E.score()
    main = derivatives(p.score, [s, *wanted])
    empty = derivatives(E.FZERO if p.empty is None else p.empty, [s, *wanted])
    scaled = lambda x: E.mul(natural, x)  # noqa: E731
    loads = [LoadSlope(x, scaled(main[x]), scaled(empty[x])) for x in wanted]
    return Slopes(scaled(main[s]), scaled(empty[s]), tuple(x for x in loads if x.score is not E.FZERO or x.empty is not E.FZERO))
