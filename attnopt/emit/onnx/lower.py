"""One attention in ONNX operators: one that computes it whole, with a mask, or everything written out.

What a row without a visible key gives is set here from the spec, whatever a runtime's operator makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from attnopt.emit.onnx.bounds import largest
from attnopt.emit.onnx.contrib import operator
from attnopt.emit.onnx.lost import bias_of
from attnopt.emit.onnx.plan import Plan, band, causal_part, window_of
from attnopt.emit.onnx.program import Programs
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.affine import Affine, affine

_DEEP = -1e30
_INT32 = 6
"""``TensorProto`` element type."""


@dataclass
class Lowering:
    """q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv], all of ``dtype``: o [B, Hq, Sq, Dv].

    ``weights``: the greatest magnitude in the tensor of each load that is a weight of the file, None for one that is computed or an input.
    """

    op: Any
    q: Any
    k: Any
    v: Any
    loads: Sequence[Any]
    sizes: Sequence[Any]
    spec: AttentionSpec
    dtype: str
    weights: Sequence[float | None]

    def __post_init__(self) -> None:
        self.computed = np.dtype("float64" if self.dtype == "float64" else "float32")
        self.half = self.dtype not in ("float32", "float64")
        self.programs = self._programs()

    def _programs(self) -> Programs:
        """Sets the numbers of queries and keys, ``Sq`` and ``Skv``, too."""
        op = self.op
        scalar = Programs(op, {}, (), {}, self.computed).constant
        self.Sq, self.Skv = op.Shape(self.q, start=2, end=3), self._keys()
        one = {"b": op.Shape(self.q, start=0, end=1), "h": op.Shape(self.q, start=1, end=2), "q": self.Sq, "k": self.Skv}
        extents = {name: op.Squeeze(x) for name, x in one.items()}
        sizes = {name: scalar(x) if isinstance(x, int) else op.Squeeze(x) for name, x in zip(self.spec.sizes, self.sizes, strict=True)}
        return Programs(op, extents, self.loads, sizes, self.computed)

    @cached_property
    def visible(self) -> Any:
        """The whole mask; None where nothing is hidden."""
        return None if self.spec.mask is E.TRUE else self._written(self.spec.mask)

    def _keys(self) -> Any:
        """How many keys there are, [1]."""
        return self.op.Shape(self.k, start=2, end=3)

    def build(self, plan: Plan) -> Any:
        self.plan = plan
        self.packed: dict[int, Any] = {}
        return self._fused() if plan.fused else self._decomposed()

    def as_packed(self, o: Any) -> Any:
        """The value [B, Sq, Hq * Dv] of which ``o`` is another form, since a transposition of it may be merged into the next; None where there is none."""
        return self.packed.get(id(o))

    # ---- an operator

    def _fused(self) -> Any:
        op, form = self.op, affine(self.spec.score)
        assert form is not None
        by_program = self.spec.empty_rows == "program" and self._may_be_empty()
        columns = self.spec.sinks and self.plan.operator == "Attention"
        if form.bias is None and not by_program and not columns:
            rest = self.spec.mask if self.plan.rest is None else self.plan.rest
            o = self._operator(form, None if rest is E.TRUE else self.programs.write(rest))
            return self._with_empty_rows(o, self._empty()) if self._may_be_empty() else o
        low = self._float(-np.inf)
        bias = E.FZERO if form.bias is None else form.bias
        if self._may_overflow() or by_program:
            x = self._written(bias)
            x = x if self.visible is None else op.Where(self.visible, x, low)
        else:  # a sum is faster than a choice, and the operator hides its part by itself
            rest = self.spec.mask if self.plan.rest is None else self.plan.rest
            x = self._hidden(self.programs.write(bias), rest)
            x = x if _is_full(bias, rest) else self._full(x)
        if by_program:
            assert self.spec.empty_score is not None
            empty = bias_of(self.spec.empty_score, form.scale)
            assert empty is not None
            x = op.Where(self._empty(), self._written(empty), x)
        if by_program or self._may_overflow():
            x = self._raised(x)
        if columns:  # a row has its sink at least
            return self._with_sink_column(form, x)
        o = self._operator(form, x, additive=True)
        if not (by_program or self._may_overflow()):
            return self._with_empty_rows(o, self._empty()) if self._may_be_empty() else o
        weightless = op.Equal(op.ReduceMax(x, self.programs.constant([-1]), keepdims=1), low)
        o = op.Where(weightless, self._as(o, 0.0 if self.spec.zero_without_weight else np.nan), o)
        return o if by_program or not self._may_be_empty() else self._with_empty_rows(o, self._empty())

    def _with_sink_column(self, form: Affine, x: Any) -> Any:
        """One more key and value of zeros, with the sink's logit in its column of the mask."""
        assert self.spec.sink is not None
        op, c, d = self.op, self.programs.constant, self.spec.dims
        k, v = (op.Pad(y, c([0, 0, 0, 0, 0, 0, 1, 0])) for y in (self.k, self.v))
        rows = op.Concat(op.Shape(self.q, start=0, end=1), c([d.Hq.value]), self.Sq, axis=0)
        column = op.Expand(self.programs.write(self.spec.sink), op.Concat(rows, c([1]), axis=0))
        mask = op.Concat(op.Expand(x, op.Concat(rows, self.Skv, axis=0)), column, axis=3)
        q, k, v = (op.Cast(y, to=1) if self.half else y for y in (self.q, k, v))
        o = self._attention(q, k, v, mask, form.scale, 0)
        return op.CastLike(o, self.v) if self.half else o

    def _raised(self, x: Any) -> Any:
        """The additive mask without rows that are finite and beyond ``_DEEP`` on every key: ONNX Runtime takes those for rows without keys.

        A whole row is made smaller by a power of two: the order of its values and -inf stay, and scores are lost beside them as before.
        """
        op = self.op
        deep = op.Less(op.ReduceMax(x, self.programs.constant([-1]), keepdims=1), self._float(_DEEP))
        return op.Mul(x, op.Where(deep, self._float(2.0**-20), self._float(1.0)))

    def _operator(self, form: Affine, mask: Any, additive: bool = False) -> Any:
        """The planned operator, with a mask of booleans that broadcasts, or an ``additive`` one [.., Sq, Skv], in half precision of float32, so that the bias keeps its digits."""
        up = self.half and additive
        q, k, v = (self.op.Cast(x, to=1) if up else x for x in (self.q, self.k, self.v))
        contrib = self.plan.operator != "Attention"
        if mask is not None and not additive:
            mask = self._full(self.op.Where(mask, self._as(q, 0.0), self._as(q, -np.inf)) if contrib else mask)
        o = self._packed(q, k, v, mask, form) if contrib else self._attention(q, k, v, mask, form.scale, int(self.plan.causal))
        return self.op.CastLike(o, self.v) if up else o

    def _attention(self, q: Any, k: Any, v: Any, mask: Any, scale: float, is_causal: int) -> Any:
        o = self.op.Attention(q, k, v, *(() if mask is None else (mask,)), scale=scale, is_causal=is_causal)
        return o[0] if isinstance(o, Sequence) else o

    def _packed(self, q: Any, k: Any, v: Any, bias: Any, form: Affine) -> Any:
        """An operator of ONNX Runtime, over operands as [B, S, H * D]."""
        op, spec, c = self.op, self.spec, self.programs.constant
        d = spec.dims
        packed = [
            op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), c([0, 0, h.value * n.value])) for x, h, n in ((q, d.Hq, d.D), (k, d.Hkv, d.D), (v, d.Hkv, d.Dv))
        ]
        call: dict[str, Any] = {"num_heads": d.Hq.value, "scale": form.scale}
        present: list[Any] = []
        if self.plan.operator == "MultiHeadAttention":
            o = operator("MultiHeadAttention")(*packed, *(() if bias is None else (None, None, bias)), **call)
        else:
            call["kv_num_heads"] = d.Hkv.value
            if self.plan.window is not None:
                call["local_window_size"] = self.plan.window
            further = [None, None, None, bias, None if spec.sink is None else self._head_sink(q)]
            while further and further[-1] is None:
                further.pop()
            o, *present = operator("GroupQueryAttention")(*packed, *self._past(), self._seqlens(), op.Cast(self.Skv, to=_INT32), *further, **call)
        o.dtype, o.shape = self.v.dtype if v is self.v else ir.DataType.FLOAT, ir.Shape([self.q.shape[0], self.q.shape[2], d.Hq.value * d.Dv.value])
        out = op.Transpose(op.Reshape(o, c([0, 0, d.Hq.value, d.Dv.value])), perm=[0, 2, 1, 3])
        self.packed[id(out)] = o
        if present:
            self._present(*present)
        return out

    def _past(self) -> tuple[Any, Any]:
        """Keys and values before those of the queries, where the operator takes them."""
        return None, None

    def _present(self, key: Any, value: Any) -> None:
        """What the operator gives as keys and values of all."""

    def _seqlens(self) -> Any:
        """[B] int32: the place of the last key that is there."""
        op, c = self.op, self.programs.constant
        batch = op.Shape(self.q, start=0, end=1)
        if self.plan.lengths is None:
            last = op.Sub(self.Skv, c([1]))
        else:  # a sequence of no keys is an empty row, and set by _with_empty_rows
            last = op.Sub(op.Max(op.Min(op.Reshape(self.programs.write(self.plan.lengths), c([-1])), self.Skv), c([1])), c([1]))
        return op.Cast(op.Expand(last, batch), to=_INT32)

    def _head_sink(self, q: Any) -> Any:
        """[Hq], of the dtype of the operands."""
        assert self.spec.sink is not None
        sink = self.op.Reshape(self.programs.write(self.spec.sink), self.programs.constant([-1]))
        return self.op.CastLike(self.op.Expand(sink, self.programs.constant([self.spec.dims.Hq.value])), q)

    # ---- written out

    def _decomposed(self) -> Any:
        op, spec = self.op, self.spec
        q, k, v = (op.Cast(x, to=1) if self.half else x for x in (self.q, self.k, self.v))
        k, v = self._for_query_heads(k), self._for_query_heads(v)
        self.programs.score = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))
        low = self._float(-np.inf)
        x = self.programs.write(spec.score)
        if self.visible is not None and self._may_overflow():
            x = op.Where(self.visible, x, low)  # a score that is not finite may be hidden
        else:
            x = self._hidden(x, spec.mask)  # in place, where the choice would take as much memory again
        empty = self._empty() if self._may_be_empty() else None
        if empty is not None and spec.empty_rows == "program":
            assert spec.empty_score is not None
            x = op.Where(empty, self.programs.write(spec.empty_score), x)
        if E.score() not in spec.score.leaves:
            x = op.Add(x, op.Mul(self._float(0.0), self._ones()))  # such a score may have fewer axes
        last = self.programs.constant([-1])
        if spec.sink is None and spec.empty_rows != "program" and not self._may_overflow():
            o = op.MatMul(op.Softmax(x, axis=-1), v)
            o = op.CastLike(o, self.v) if self.half else o
            return o if empty is None else self._with_empty_rows(o, empty)
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
        return self.spec.mask is not E.TRUE and self.spec.rows_may_be_empty()

    def _may_overflow(self) -> bool:
        """Whether the score may be so low that it hides, or not finite, by what is added to the product of query and key."""
        return largest(self.spec.score, lambda x: math.inf if (w := self.weights[x.value]) is None else w) >= -_DEEP

    def _empty(self) -> Any:
        """Where a row has no visible key, with a last axis of 1."""
        op = self.op
        counted = self._counted()
        if counted is not None:
            return op.Equal(counted, self.programs.constant(0))
        seen = op.ReduceMax(op.Cast(self.visible, to=_INT32), self.programs.constant([-1]), keepdims=1)
        return op.Not(op.Cast(seen, to=9))

    def _counted(self) -> Any:
        """How many keys a row sees, [.., Sq, 1]; None where that takes the whole mask: it is causal, with or without a window, and what else hides a key is the same for all queries."""
        op, d, c = self.op, self.spec.dims, self.programs.constant
        window = window_of(self.spec)
        held = [causal_part(d), *([] if window is None else [band(d, window)])]
        parts = E.conjuncts(self.spec.mask)
        rest = E.all_of(*(p for p in parts if p not in held))
        if held[0] not in parts or not set(rest.variables) <= {d.b, d.k}:
            return None
        there = op.Expand(op.Cast(self.programs.write(rest), to=7), op.Concat(c([1, 1, 1]), self.Skv, axis=0))
        seen = op.CumSum(there, c(3))
        if window is not None:
            before = op.Slice(op.Pad(seen, c([0, 0, 0, window, 0, 0, 0, 0])), c([0]), self.Skv, c([3]))
            seen = op.Sub(seen, before)
        if d.Sq is not d.Skv:  # those of the queries are the last
            seen = op.Slice(seen, op.Sub(self.Skv, self.Sq), self.Skv, c([3]))
        return op.Transpose(seen, perm=[0, 1, 3, 2])

    def _with_empty_rows(self, o: Any, empty: Any) -> Any:
        op = self.op
        if self.spec.empty_rows == "uniform" and not self.spec.sinks:
            mean = op.ReduceMean(op.Cast(self.v, to=1) if self.half else self.v, self.programs.constant([2]), keepdims=1)
            return op.Where(empty, op.CastLike(self._for_query_heads(mean), self.v), o)
        return op.Where(empty, self._as(o, 0.0 if self.spec.zero_without_weight else np.nan), o)

    # ---- helpers

    def _hidden(self, x: Any, mask: E.Expr) -> Any:
        """``x`` where ``mask`` holds, else -inf: ``x`` itself is finite."""
        if mask is E.TRUE:
            return x
        return self.op.Add(x, self.op.Where(self.programs.write(mask), self._float(0.0), self._float(-np.inf)))

    def _float(self, value: float) -> Any:
        return self.programs.constant(value, "float")

    def _as(self, like: Any, value: float) -> Any:
        return self.op.CastLike(self._float(value), like)

    def _written(self, e: E.Expr) -> Any:
        """The value of an expression with its last two axes at [Sq, Skv]."""
        x = self.programs.write(e)
        return x if _is_full(e) else self._full(x)

    def _full(self, x: Any) -> Any:
        """With its last two axes at [Sq, Skv]: ONNX Runtime broadcasts batch and heads, and not these."""
        return self.op.Expand(x, self._box())

    def _box(self) -> Any:
        return self.op.Concat(self.programs.constant([1, 1]), self.Sq, self.Skv, axis=0)

    def _ones(self) -> Any:
        return self.op.Expand(self._float(1.0), self._box())


def _is_full(*parts: E.Expr) -> bool:
    """Whether what is made of these expressions has its last two axes at [Sq, Skv]: an axis on which nothing depends is 1."""
    return {"q", "k"} <= {v.value for e in parts for v in e.variables}
