"""One attention in ONNX operators: ``Attention`` with a mask, or everything written out.

What a row without a visible key gives is set here from the spec, whatever a runtime's operator makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnopt.emit.onnx.plan import Plan
from attnopt.emit.onnx.program import Programs
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.affine import affine

_DEEP = -1e30


@dataclass
class Lowering:
    """q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv], all of ``dtype``: o [B, Hq, Sq, Dv]."""

    op: Any
    q: Any
    k: Any
    v: Any
    loads: Sequence[Any]
    sizes: Sequence[Any]
    spec: AttentionSpec
    dtype: str

    def __post_init__(self) -> None:
        op = self.op
        self.computed = np.dtype("float64" if self.dtype == "float64" else "float32")
        scalar = Programs(op, {}, (), {}, self.computed).constant
        self.half = self.dtype not in ("float32", "float64")
        self.Sq, self.Skv = op.Shape(self.q, start=2, end=3), op.Shape(self.k, start=2, end=3)
        one = {"b": op.Shape(self.q, start=0, end=1), "h": op.Shape(self.q, start=1, end=2), "q": self.Sq, "k": self.Skv}
        extents = {name: op.Squeeze(x) for name, x in one.items()}
        sizes = {name: scalar(x) if isinstance(x, int) else op.Squeeze(x) for name, x in zip(self.spec.sizes, self.sizes, strict=True)}
        self.programs = Programs(op, extents, self.loads, sizes, self.computed)
        self.visible = None if self.spec.mask is E.TRUE else self._full(self.programs.write(self.spec.mask))

    def build(self, plan: Plan) -> Any:
        return self._fused(plan) if plan.fused else self._decomposed()

    # ---- the operator

    def _fused(self, plan: Plan) -> Any:
        op, form = self.op, affine(self.spec.score)
        assert form is not None
        if plan.causal:
            return self._attention(None, form.scale, is_causal=1)
        bias = None if form.bias is None else self._full(self.programs.write(form.bias))
        by_program = self.spec.empty_rows == "program" and self._may_be_empty()
        if bias is None and not by_program:
            if self.visible is None:
                return self._attention(None, form.scale)
            o = self._attention(self.visible, form.scale)
            return self._with_empty_rows(o, self._empty()) if self._may_be_empty() else o
        zero, low = self._float(0.0), self._float(-np.inf)
        x = bias if bias is not None else zero
        if self.visible is not None:
            x = op.Where(self.visible, x, low)
        if by_program:
            assert self.spec.empty_score is not None
            # Not affine()'s bias: a constant that is the same for every key matters here, where scores are lost beside it.
            rest = E.add(
                E.FZERO, *(E.const(float(c)) if a is None else E.mul(E.const(float(c)), a) for c, a in E.terms(self.spec.empty_score) if a is not E.score())
            )
            x = op.Where(self._empty(), self._full(self.programs.write(rest)), x)
        x = self._full(x)
        if by_program or self._reads():
            x = self._raised(x)
        o = self._attention(x, form.scale)
        if not (self._may_be_empty() or self._reads()):
            return o
        weightless = op.Equal(op.ReduceMax(x, self.programs.constant([-1]), keepdims=1), low)
        o = op.Where(weightless, self._as(o, 0.0 if self.spec.zero_without_weight else np.nan), o)
        return o if by_program or not self._may_be_empty() else self._with_empty_rows(o, self._empty())

    def _raised(self, x: Any) -> Any:
        """The additive mask without rows that are finite and beyond ``_DEEP`` on every key: ONNX Runtime takes those for rows without keys.

        A whole row is made smaller by a power of two: the order of its values and -inf stay, and scores are lost beside them as before.
        """
        op = self.op
        deep = op.Less(op.ReduceMax(x, self.programs.constant([-1]), keepdims=1), self._float(_DEEP))
        return op.Where(deep, op.Mul(x, self._float(2.0**-20)), x)

    def _attention(self, mask: Any, scale: float, is_causal: int = 0) -> Any:
        """The operator; with an additive mask in half precision it runs in float32, so that the bias keeps its digits."""
        op, up = self.op, self.half and mask is not None and mask is not self.visible
        q, k, v = (op.Cast(x, to=1) if up else x for x in (self.q, self.k, self.v))
        o = op.Attention(q, k, v, *(() if mask is None else (mask,)), scale=scale, is_causal=is_causal)
        o = o[0] if isinstance(o, Sequence) else o
        return op.CastLike(o, self.v) if up else o

    # ---- written out

    def _decomposed(self) -> Any:
        op, spec = self.op, self.spec
        q, k, v = (op.Cast(x, to=1) if self.half else x for x in (self.q, self.k, self.v))
        k, v = self._for_query_heads(k), self._for_query_heads(v)
        self.programs.score = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))
        low = self._float(-np.inf)
        x = self.programs.write(spec.score)
        if self.visible is not None:
            x = op.Where(self.visible, x, low)
        empty = self._empty() if self._may_be_empty() else None
        if empty is not None and spec.empty_rows == "program":
            assert spec.empty_score is not None
            x = op.Where(empty, self.programs.write(spec.empty_score), x)
        x = op.Add(x, op.Mul(self._float(0.0), self._ones()))  # a score that reads no s has fewer axes
        last = self.programs.constant([-1])
        if spec.sink is None and empty is None and not self._reads():
            o = op.MatMul(op.Softmax(x, axis=-1), v)
            return op.CastLike(o, self.v) if self.half else o
        top = op.ReduceMax(x, last, keepdims=1)
        sink = None if spec.sink is None else self.programs.write(spec.sink)
        if sink is not None:
            top = op.Max(top, sink)
        top = op.Where(op.Equal(top, low), self._float(0.0), top)
        e = op.Exp(op.Sub(x, top))
        total = op.ReduceSum(e, last, keepdims=1)
        if sink is not None:
            total = op.Add(total, op.Exp(op.Sub(sink, top)))
        p = op.Div(e, total)
        if spec.zero_without_weight:
            p = op.Where(op.Equal(total, self._float(0.0)), self._float(0.0), p)
        o = op.MatMul(p, v)
        o = op.CastLike(o, self.v) if self.half else o
        return o if empty is None or spec.empty_rows == "program" or spec.sinks else self._with_empty_rows(o, empty)

    def _for_query_heads(self, x: Any) -> Any:
        """[B, Hkv, S, D] as [B, Hq, S, D]."""
        if self.spec.groups == 1:
            return x
        op, c = self.op, self.programs.constant
        shape = op.Concat(c([0]), op.Shape(self.q, start=1, end=2), op.Shape(x, start=2), axis=0)
        return op.Reshape(op.Expand(op.Unsqueeze(x, c([2])), c([1, 1, self.spec.groups, 1, 1])), shape)

    # ---- rows without a visible key

    def _may_be_empty(self) -> bool:
        return self.visible is not None and self.spec.rows_may_be_empty()

    def _reads(self) -> bool:
        """Whether the score holds something that may be -inf on a whole row."""
        return any(
            x.op in ("load", "log", "div", "pow") or (x.is_const and x.kind == "float" and not np.isfinite(x.value)) for x in E.postorder(self.spec.score)
        )

    def _empty(self) -> Any:
        op = self.op
        seen = op.ReduceMax(op.Cast(self.visible, to=6), self.programs.constant([-1]), keepdims=1)
        return op.Not(op.Cast(seen, to=9))

    def _with_empty_rows(self, o: Any, empty: Any) -> Any:
        op = self.op
        if self.spec.empty_rows == "uniform":
            mean = op.ReduceMean(op.Cast(self.v, to=1) if self.half else self.v, self.programs.constant([2]), keepdims=1)
            return op.Where(empty, op.CastLike(self._for_query_heads(mean), self.v), o)
        return op.Where(empty, self._as(o, 0.0 if self.spec.zero_without_weight else np.nan), o)

    # ---- helpers

    def _float(self, value: float) -> Any:
        return self.programs.constant(value, "float")

    def _as(self, like: Any, value: float) -> Any:
        return self.op.CastLike(self._float(value), like)

    def _full(self, x: Any) -> Any:
        """With its last two axes at [Sq, Skv]: ONNX Runtime broadcasts batch and heads, and not these."""
        return self.op.Expand(x, self._box())

    def _box(self) -> Any:
        return self.op.Concat(self.programs.constant([1, 1]), self.Sq, self.Skv, axis=0)

    def _ones(self) -> Any:
        return self.op.Expand(self._float(1.0), self._box())
