"""A causal attention by parts of its queries: each part reads the keys that its mask permits, and no others.

ONNX Runtime's operators on a CPU multiply a window's queries with all keys before them, and hold or stream the scores of all queries. A part of ``PART`` queries reads the keys from
``first + 1 - window`` to its own last, and its scores stay in the processor's caches. The parts are the turns of a Loop, whose body is what ``Lowering`` makes of one part. What does not depend on
both query and key is written once, outside, where all attentions share it; a turn takes its cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript import onnx_opset, values

from attnopt.emit.onnx.distance import read_by_distance
from attnopt.emit.onnx.lower import Lowering
from attnopt.emit.onnx.plan import PART, Plan, added
from attnopt.emit.onnx.program import AXES, Programs
from attnopt.emit.onnx.tape import Tape
from attnopt.ir import expr as E

_HIDDEN = -(2.0**100)


@dataclass
class InParts(Lowering):
    """Writes the Loop. ``name``: what its nodes are named after, another one for each attention of a file. ``counts_keys``: ``Attention`` takes the number of keys (opset 24)."""

    name: str = ""
    counts_keys: bool = True

    def build(self, plan: Plan) -> Any:
        """o [B, Hq, S, Dv] of q, k and v with as many queries as keys."""
        op, c, d = self.op, self.programs.constant, self.spec.dims
        self.packed: dict[int, Any] = {}
        q, k = self.q, self.k
        if not self.counts_keys:
            plan = replace(plan, causal=False, rest=None)
        elif plan.causal and plan.rest is not None and d.k in plan.rest.variables and set(plan.rest.variables) <= {d.b, d.k} and added(self.spec) is None:
            q, k = self._hidden_by_a_feature(plan.rest)
            plan = replace(plan, rest=E.TRUE)
        # an axis more, so that a node stands between a rotation and the loop: onnxsim's fuse_rope does not see what a loop's body reads
        q, k = (op.Unsqueeze(x, c([2])) for x in (q, k))
        count = op.Max(op.Div(op.Add(self.Sq, c([PART - 1])), c([PART])), c([1]))
        rows = op.Div(op.Add(self.Sq, op.Sub(count, c([1]))), count)
        last = op.Sub(self.Sq, rows)  # the last part begins here, and shares some rows with the one before
        turn, going = (ir.val(f"{self.name}/{n}", ir.DataType[t], []) for n, t in (("turn", "INT64"), ("going", "BOOL")))
        part, tape = self._part(plan, q, k, turn, rows, last)
        graph = ir.Graph([turn, going], [tape.Identity(going), part], nodes=tape.named(self.name), name=self.name)
        for x, dtype, shape in zip(graph.outputs, ("BOOL", "FLOAT"), ([], [None] * 3), strict=True):
            x.dtype, x.shape = ir.DataType[dtype], ir.Shape(shape)
        found = _loop()(op.Squeeze(count), op.Constant(value=ir.tensor(np.array(True))), body=graph)  # [count, B, rows, Hq * Dv]
        width = d.Hq.value * d.Dv.value
        all_rows = op.Reshape(op.Transpose(found, perm=[1, 0, 2, 3]), c([0, -1, width]))
        whole = op.Mul(count, rows)
        before, behind = (
            op.Slice(all_rows, c([0]), op.Sub(whole, rows), c([1])),
            op.Slice(all_rows, op.Sub(whole, op.Sub(self.Sq, op.Sub(whole, rows))), whole, c([1])),
        )
        o = op.Concat(before, behind, axis=1)
        o.dtype, o.shape = self.v.dtype, ir.Shape([self.q.shape[0], self.q.shape[2], width])
        out = op.Transpose(op.Reshape(o, c([0, 0, d.Hq.value, d.Dv.value])), perm=[0, 2, 1, 3])
        self.packed[id(out)] = o
        return self._with_empty_rows(out, self._empty()) if self._may_be_empty() else out

    def _part(self, plan: Plan, q: Any, k: Any, turn: ir.Value, rows: Any, last: Any) -> tuple[ir.Value, Tape]:
        """[B, rows, Hq * Dv] of one turn; q and k are [B, H, 1, S, D]."""
        tape = Tape()
        c = Programs(tape, {}, (), {}, self.computed).constant
        first = tape.Min(tape.Mul(tape.Unsqueeze(turn, c([0])), rows), last)
        end = tape.Add(first, rows)
        start = c([0]) if plan.window is None else tape.Max(tape.Sub(first, c([plan.window - 1])), c([0]))
        q, k = (tape.Squeeze(tape.Slice(x, *ends, c([3])), c([2])) for x, ends in ((q, (first, end)), (k, (start, end))))
        v = tape.Slice(self.v, start, end, c([2]))
        for x in (q, k, v):
            x.dtype = self.v.dtype
        o = _Part(tape, q, k, v, self.loads, self.sizes, self.spec, self.dtype, self.weights, self, (first, end), (start, end)).build(plan)
        return tape.Reshape(tape.Transpose(o, perm=[0, 2, 1, 3]), c([0, 0, self.spec.dims.Hq.value * self.spec.dims.Dv.value])), tape

    def _hidden_by_a_feature(self, there: E.Expr) -> tuple[Any, Any]:
        """q and k with a feature more, whose product is 0 for keys that are there and lower than any score for others.

        Padding hides a key from all queries, and this takes no mask of queries and keys. A sum with 0 is exact, and a weight beside a visible key is 0 as with -inf, which a product's own padding with zeros
        could make NaN. Rows without a visible key are set by the whole.
        """
        op, c, d = self.op, self.programs.constant, self.spec.dims
        fill = op.Where(self.programs.write(there), self._float(0.0), self._float(_HIDDEN))  # [B, 1, 1, S], or ones
        sizes = op.Concat(op.Shape(self.k, start=0, end=1), c([d.Hkv.value]), self.Skv, c([1]), axis=0)
        k = op.Concat(self.k, op.Expand(op.Transpose(fill, perm=[0, 1, 3, 2]), sizes), axis=3)
        return op.Pad(self.q, c([0, 0, 0, 0, 0, 0, 0, 1]), self._float(1.0)), k


def _loop() -> Any:
    """Loop without variables that are carried, and with one result."""
    S = onnx.defs.OpSchema
    inputs = [S.FormalParameter("M", "I"), S.FormalParameter("cond", "B")]
    constraints = [("I", ["tensor(int64)"], ""), ("B", ["tensor(bool)"], ""), ("V", ["tensor(float)"], "")]
    body = S.Attribute("body", S.AttrType.GRAPH)
    return values.Op(
        onnx_opset.opset23, "Loop", S("Loop", "", 23, inputs=inputs, outputs=[S.FormalParameter("scan", "V")], type_constraints=constraints, attributes=[body])
    )


@dataclass
class _Part(Lowering):
    """Queries ``rows`` = (first, end) and keys ``keys`` = (start, end), int64 [1], of ``whole``. Rows without a visible key are left to the whole."""

    whole: InParts | None = None
    rows: tuple[Any, Any] = (None, None)
    keys: tuple[Any, Any] = (None, None)

    def _programs(self) -> Programs:
        assert self.whole is not None
        whole = self.whole.programs
        self.Sq, self.Skv = (self.op.Sub(end, start) for start, end in (self.rows, self.keys))
        return PartPrograms(self.op, whole.extents, whole.loads, whole.sizes, whole.dtype, whole=whole, ranges={"q": self.rows, "k": self.keys})

    def _may_be_empty(self) -> bool:
        return False

    def _attention(self, q: Any, k: Any, v: Any, mask: Any, scale: float, is_causal: int) -> Any:
        if not is_causal:
            return super()._attention(q, k, v, mask, scale, 0)
        lengths = self.op.Expand(self.Skv, self.op.Shape(self.q, start=0, end=1))
        return self.op.Attention(q, k, v, mask, None, None, lengths, scale=scale, is_causal=1)


@dataclass
class PartPrograms(Programs):
    """Expressions on the queries and keys of ``ranges`` (start and end, int64 [1]); what does not depend on both is written by ``whole``, and so is what is read from a tensor."""

    whole: Programs | None = None
    ranges: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def write(self, root: E.Expr) -> Any:
        if root not in self.table and E.score() not in root.leaves:
            found = {v.value for v in root.variables}
            if root.op == "load" or not {"q", "k"} <= found or read_by_distance(root) is not None:
                self.table[root] = self._cut(root, found)
        return super().write(root)

    def _cut(self, root: E.Expr, variables: set[str]) -> Any:
        assert self.whole is not None
        x = self.whole.write(root)
        for name in sorted(variables & set(self.ranges)):
            x = self.op.Slice(x, *self.ranges[name], self.constant([AXES[name]]))
        return x
