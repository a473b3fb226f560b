"""The programs of a spec as a generated kernel computes them: delicate parts replaced by loads, logarithms to base 2 where that is safe."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.materialise import Part, materialise
from attnopt.kernels.tiling import cached_key_range, may_be_empty

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Programs:
    """What one spec computes per score. Loads from slot ``len(spec.loads)`` on are ``parts``, computed before each call."""

    score: Expr
    """In units of log2 where ``folded``, otherwise natural."""
    mask: Expr
    empty: Expr | None
    """The score on rows that see no key, where that takes a second walk over the keys (``retries``)."""
    sink: Expr | None
    parts: tuple[Part, ...]
    folded: bool
    left: bool
    """Whether the mask bounds keys from the left by a distance to the query; likewise ``right``."""
    right: bool
    rest: Expr
    """What of the mask is no such bound."""

    @property
    def retries(self) -> bool:
        return self.empty is not None

    @property
    def roots(self) -> list[Expr]:
        return [x for x in (self.score, self.mask, self.empty, self.sink) if x is not None]

    @property
    def dense(self) -> bool:
        """Whether an element is read per query and key."""
        return any(e.op == "load" and {"q", "k"} <= {v.value for v in e.variables} for e in E.postorder(*self.roots))


@lru_cache(maxsize=1024)
def programs_of(spec: AttentionSpec) -> Programs:
    """The programs of ``spec``."""
    retries = may_be_empty(spec) and spec.empty_rows in ("uniform", "program")
    empty = None if not retries else spec.empty_score if spec.empty_rows == "program" else E.FZERO
    given = (spec.score, spec.mask, empty, spec.sink)
    rewritten, parts = materialise([x for x in given if x is not None], len(spec.loads))
    it = iter(rewritten)
    score, mask, empty, sink = (None if x is None else next(it) for x in given)
    assert score is not None and mask is not None
    # In base 2 from the start log2(e) folds into the scale; but a bias tensor may hold finfo.min, which would overflow.
    folded = not may_be_huge(score, empty)
    if folded:
        score = E.mul(E.const(LOG2E), score)
        empty, sink = (None if x is None else E.mul(E.const(LOG2E), x) for x in (empty, sink))
    limits = cached_key_range(mask)
    return Programs(score, mask, empty, sink, parts, folded, bool(limits.left), bool(limits.right), limits.rest)


def may_be_huge(*programs: Expr | None) -> bool:
    """Whether a term may be as large as float32 allows: a float read per key, or a literal."""
    for e in E.postorder(*(p for p in programs if p is not None)):
        per_key = e.op == "load" and e.kind == "float" and any(v.value == "k" for v in e.variables)
        if per_key or (e.is_const and e.kind == "float" and abs(e.value) > 1e30):
            return True
    return False
