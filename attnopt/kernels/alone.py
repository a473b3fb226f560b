"""One program of a spec as a spec of its own, equal for all attentions that compute it from the same tensors: how an operator that works it out for all of them gets it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec, Dims, Load


def alone(spec: AttentionSpec, slots: Mapping[int, int], *, score: Expr, mask: Expr) -> AttentionSpec | None:
    """``score`` and ``mask``, which read what ``spec`` does, with load ``i`` renamed ``slots[i]``.

    They read the sizes that the spec's own ``sizes`` and B, Hq, Sq and Skv give; None where they need another.
    """
    d = spec.dims
    kinds = {slots[i]: x.kind for i, x in enumerate(spec.loads) if i in slots}
    given = {x.value[0] for x in (d.B, d.Hq, d.Sq, d.Skv) if x.op == "sym"}
    score, mask = _renamed(score, slots), _renamed(mask, slots)
    sizes = {s.value[0] for e in E.postorder(score, mask) for s in e.leaves if s.op == "sym"} - given
    if not sizes <= set(spec.sizes):
        return None
    return AttentionSpec(
        dims=Dims(d.B, d.Hq, E.ONE, d.Sq, d.Skv, E.ONE, E.ONE),
        score=score,
        mask=mask,
        loads=tuple(Load(f"load{i}", kinds[i]) for i in sorted(kinds)),
        sizes=tuple(n for n in spec.sizes if n in sizes),
    )


def _renamed(root: Expr, slots: Mapping[int, int]) -> Expr:
    memo: dict[Expr, Expr] = {}
    for e in E.postorder(root):
        args = tuple(memo[a] for a in e.args)
        memo[e] = E.load(slots[e.value], args, e.kind) if e.op == "load" else E.rebuild(e, args) if args else e
    return memo[root]


def size_of(spec: AttentionSpec, sizes: Sequence[int], B: int, Hq: int, Sq: int, Skv: int) -> dict[str, int]:
    """The value of every symbolic size of such a spec by name."""
    d = spec.dims
    found = {x.value[0]: n for x, n in zip((d.B, d.Hq, d.Sq, d.Skv), (B, Hq, Sq, Skv), strict=True) if x.op == "sym"}
    return found | dict(zip(spec.sizes, sizes, strict=True))
