"""Score and mask programs in standard ONNX operators.

The twin of ``attnopt.kernels.evaluate``: each expression at the smallest shape that broadcasts to [B, Hq, Sq, Skv]. Integers are
int64. Indices of loads are clamped into range, since a model may compute one out of range in a branch that it then does not take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from attnopt.emit.onnx.distance import Diagonals, read_by_distance
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.kernels.materialise import DISTANCE, Part

AXES = {"b": 0, "h": 1, "q": 2, "k": 3}

_INTEGER, _BOOL = 7, 9
"""``TensorProto`` element types."""

_UNARY = {
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "sin": "Sin",
    "cos": "Cos",
    "floor": "Floor",
    "ceil": "Ceil",
    "round": "Round",
    "erf": "Erf",
    "not": "Not",
    "abs": "Abs",
}
_BINARY = {"div": "Div", "min": "Min", "max": "Max", "pow": "Pow", "le": "LessOrEqual", "lt": "Less", "eq": "Equal", "same": "Equal"}
_FOLDS = {"add": "Add", "mul": "Mul", "and": "And", "or": "Or"}


@dataclass
class Programs:
    """Writes expressions with the operators of ``op`` (an onnxscript opset), each node once.

    ``extents`` gives the sizes of b, h, q and k as int64 scalars, ``sizes`` those that the spec names. ``dtype`` is the numpy
    dtype of floats.
    """

    op: Any
    extents: Mapping[str, Any]
    loads: Sequence[Any]
    sizes: Mapping[str, Any]
    dtype: np.dtype[Any]
    score: Any = None
    table: dict[Expr, Any] = field(default_factory=dict)

    @property
    def float_type(self) -> int:
        return int(ir.DataType.from_numpy(self.dtype))

    def constant(self, value: Any, kind: E.Kind = "int") -> Any:
        dtype = {"bool": np.dtype(np.bool_), "int": np.dtype(np.int64), "float": self.dtype}[kind]
        with np.errstate(over="ignore"):  # twice the least number, say, is an infinity
            return self.op.Constant(value=ir.tensor(np.array(value, dtype=dtype)))

    def write(self, root: Expr) -> Any:
        """The value of ``root``: a scalar, or four axes of which those that it does not depend on are 1."""
        if root not in self.table:
            part = read_by_distance(root)
            if part is None:
                for a in root.args:
                    self.write(a)
            self.table[root] = self._node(root) if part is None else self._by_distance(part)
        return self.table[root]

    def index(self, name: str) -> Any:
        """The index variable [n] as int64."""
        return self.op.Range(self.constant(0), self.extents[name], self.constant(1))

    def _node(self, e: Expr) -> Any:
        op = self.op
        if e.op == "const":
            return self.constant(e.value, e.kind)
        if e.op == "sym":
            return self.sizes[e.value[0]]
        if e.op == "var":
            return self._on_axis(self.index(e.value), AXES[e.value])
        if e.op == "score":
            if self.score is None:
                raise ValueError("this expression reads the score, and none was given")
            return self.score
        if e.op == "load":
            return self._load(e)
        args = [self.table[a] for a in e.args]
        if e.op in _FOLDS:
            # the score last, since large terms beside it may cancel
            order = sorted(zip(e.args, args, strict=True), key=lambda x: (E.score() in x[0].leaves, len(x[0].variables)))
            return reduce(getattr(op, _FOLDS[e.op]), [x for _, x in order])
        if e.op in _UNARY:
            return getattr(op, _UNARY[e.op])(args[0])
        if e.op in _BINARY:
            return getattr(op, _BINARY[e.op])(*args)
        return _SPECIAL[e.op](self, e, args)

    def _by_distance(self, part: Part) -> Any:
        diagonals = Diagonals(self.op, self.extents["q"], self.extents["k"], self.constant)
        if DISTANCE not in self.table:
            self.table[DISTANCE] = diagonals.distances()
        return diagonals.spread(self.write(part.expr))

    def _on_axis(self, x: Any, axis: int) -> Any:
        return self.op.Unsqueeze(x, self.constant([a for a in range(4) if a != axis]))

    # ---- loads

    def _load(self, e: Expr) -> Any:
        """Axis by axis where each index depends on one variable of its own, else element by element."""
        op, x = self.op, self.loads[e.value]
        if not e.args:
            return self._cast(op.Squeeze(x), e.kind)
        names = [[v.value for v in a.variables] for a in e.args]
        used = [n for found in names for n in found]
        if all(len(found) <= 1 for found in names) and len(set(used)) == len(used) and not any(_reads(a) for a in e.args):
            for axis, a in enumerate(e.args):
                x = op.Gather(x, op.Reshape(self._clamped(a, e.value, axis), self.constant([-1])), axis=axis)
            return self._cast(self._four_axes(x, [found[0] if found else "" for found in names]), e.kind)
        index = [self._clamped(a, e.value, axis) for axis, a in enumerate(e.args)]
        shape = op.Shape(reduce(op.Add, index))
        stacked = op.Concat(*(op.Unsqueeze(op.Expand(i, shape), self.constant([-1])) for i in index), axis=-1)
        return self._cast(op.GatherND(x, stacked), e.kind)

    def _clamped(self, a: Expr, slot: int, axis: int) -> Any:
        last = self.op.Sub(self.op.Shape(self.loads[slot], start=axis, end=axis + 1), self.constant(1))
        return self.op.Max(self.op.Min(self.table[a], last), self.constant(0))

    def _four_axes(self, x: Any, names: list[str]) -> Any:
        """``x``, with an axis for each of ``names`` (of size 1 where that is empty), as [b, h, q, k]."""
        order = sorted((d for d, n in enumerate(names) if n), key=lambda d: AXES[names[d]])
        ones = [d for d, n in enumerate(names) if not n]
        if ones:
            x = self.op.Squeeze(x, self.constant(ones))
            order = [sum(1 for i in range(d) if names[i]) for d in order]
        if order != sorted(order):
            x = self.op.Transpose(x, perm=order)
        have = {AXES[n] for n in names if n}
        missing = [a for a in range(4) if a not in have]
        return self.op.Unsqueeze(x, self.constant(missing)) if missing else x

    def _cast(self, x: Any, kind: E.Kind) -> Any:
        return self.op.Cast(x, to={"bool": _BOOL, "int": _INTEGER, "float": self.float_type}[kind])


def _reads(e: Expr) -> bool:
    return any(x.op == "load" for x in E.postorder(e))


def _floordiv(p: Programs, e: Expr, args: list[Any]) -> Any:
    """ONNX divides integers towards zero; less the remainder, which has the divisor's sign, the division is exact."""
    if e.kind == "float":
        return p.op.Floor(p.op.Div(*args))
    return p.op.Div(p.op.Sub(args[0], p.op.Mod(*args)), args[1])


def _mod(p: Programs, e: Expr, args: list[Any]) -> Any:
    if e.kind == "float":
        return p.op.Sub(args[0], p.op.Mul(p.op.Floor(p.op.Div(*args)), args[1]))
    return p.op.Mod(*args)


def _where(p: Programs, e: Expr, args: list[Any]) -> Any:
    c, a, b = args
    return p.op.Or(p.op.And(c, a), p.op.And(p.op.Not(c), b)) if e.kind == "bool" else p.op.Where(c, a, b)


def _apart(compare: str) -> Callable[[Programs, Expr, list[Any]], Any]:
    """An integer compared with zero as its terms in k with minus the others: no integer is made for each query and key."""

    def write(p: Programs, e: Expr, args: list[Any]) -> Any:
        x = e.args[0]
        sides: tuple[list[Expr], list[Expr]] = ([], [])
        for c, a in E.terms(x) if x.kind == "int" else ():
            term = E.const(int(c)) if a is None else E.mul(E.const(int(c)), a)
            sides[any(v.value == "k" for v in term.variables)].append(term)
        if not all(sides):
            return getattr(p.op, compare)(args[0], p.constant(0, x.kind))
        others, of_keys = (E.add(E.ZERO, *side) for side in sides)
        return getattr(p.op, compare)(p.write(of_keys), p.write(E.sub(E.ZERO, others)))

    return write


_SPECIAL: dict[str, Callable[[Programs, Expr, list[Any]], Any]] = {
    "floordiv": _floordiv,
    "mod": _mod,
    "where": _where,
    "rsqrt": lambda p, e, args: p.op.Reciprocal(p.op.Sqrt(args[0])),
    "float": lambda p, e, args: p._cast(args[0], "float"),
    "trunc": lambda p, e, args: p._cast(args[0], "int"),
    "ge0": _apart("GreaterOrEqual"),
    "eq0": _apart("Equal"),
}

WRITTEN = {"const", "sym", "var", "score", "load", *_UNARY, *_BINARY, *_FOLDS, *_SPECIAL}
"""Every operation that can be written."""
