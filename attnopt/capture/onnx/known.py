"""Small tensors whose elements are known while a graph is read: constants, and sizes computed from shapes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnopt.capture.onnx.builder import Builder

LIMIT = 64
"""Elements beyond which a constant is only a tensor."""


@dataclass(frozen=True)
class Known:
    """``values``: an object array of numbers and of nodes that hold symbolic sizes; ``dtype`` is that of the tensor."""

    values: np.ndarray[Any, Any]
    dtype: torch.dtype

    @property
    def is_constant(self) -> bool:
        return not any(isinstance(x, fx.Node) for x in self.values.flat)

    @property
    def single(self) -> Any:
        """The one element; None where there are more."""
        return self.values.flat[0] if self.values.size == 1 else None

    def items(self) -> list[Any]:
        return list(self.values.reshape(-1))

    def ints(self) -> list[int] | None:
        """The elements, if all are constant integers."""
        return [int(x) for x in self.items()] if self.is_constant and not self.dtype.is_floating_point else None

    def array(self) -> np.ndarray[Any, Any]:
        """The constants as a numpy array of the tensor's own dtype."""
        return torch.tensor(self.values.tolist(), dtype=self.dtype).numpy()


def known(values: Any, dtype: torch.dtype) -> Known:
    """``values``: nested lists, an array or a number."""
    if isinstance(values, np.ndarray):
        made = np.empty(values.shape, dtype=object)
        made[...] = values.astype(object) if values.dtype != object else values
        return Known(made, dtype)
    if isinstance(values, list):
        made = np.empty(len(values), dtype=object)
        for i, x in enumerate(values):
            made[i] = x
        return Known(made, dtype)
    made = np.empty((), dtype=object)
    made[()] = values
    return Known(made, dtype)


def compute(builder: Builder, name: str, operands: list[Known], dtype: torch.dtype) -> Known | None:
    """A pointwise operator of known elements; None where one of the results is not known."""
    if all(x.is_constant for x in operands) and name in _ON_CONSTANTS:
        with np.errstate(all="ignore"):
            result = _ON_CONSTANTS[name](*(x.array() for x in operands))
        return known(torch.from_numpy(np.asarray(result)).to(dtype).numpy(), dtype)
    if any(x.dtype.is_floating_point for x in operands) or name not in _ON_SIZES:
        return None
    out = np.empty(np.broadcast_shapes(*(x.values.shape for x in operands)), dtype=object)
    spread = [np.broadcast_to(x.values, out.shape) for x in operands]
    for at in np.ndindex(out.shape):
        found = _ON_SIZES[name](builder, *(x[at] for x in spread))
        if found is None:
            return None
        out[at] = found
    return Known(out, dtype)


def _truncated(a: Any, b: Any) -> Any:
    if np.issubdtype(a.dtype, np.integer):
        return np.trunc(a / b).astype(a.dtype) if not np.any(b == 0) else np.zeros(np.broadcast_shapes(a.shape, b.shape), a.dtype)
    return a / b


_ON_CONSTANTS: dict[str, Callable[..., Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _truncated, "Mod": np.mod, "Pow": lambda a, b: np.power(a, b).astype(a.dtype),
    "Max": lambda *x: np.maximum.reduce(np.broadcast_arrays(*x)), "Min": lambda *x: np.minimum.reduce(np.broadcast_arrays(*x)),
    "Neg": np.negative, "Abs": np.abs, "Sqrt": np.sqrt, "Reciprocal": np.reciprocal, "Exp": np.exp, "Log": np.log, "Floor": np.floor, "Ceil": np.ceil,
    "Equal": np.equal, "Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater, "GreaterOrEqual": np.greater_equal,
    "And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor, "Not": np.logical_not, "Where": np.where,
}  # fmt: skip


def _size(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda builder, a, b: builder.arithmetic(function, a, b)


def _minus(builder: Builder, a: Any, b: Any) -> Any:
    return builder.arithmetic(operator.add, a, builder.arithmetic(operator.mul, b, -1))


def _quotient(builder: Builder, a: Any, b: Any) -> Any:
    """Division towards zero, which is towards minus infinity where neither is negative."""
    if isinstance(b, int) and b == 0:
        return None
    return builder.arithmetic(operator.floordiv, a, b) if truth(_of(a) >= 0) and truth(_of(b) > 0) else None


def _comparison(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda builder, a, b: truth(function(_of(a), _of(b)))


def _where(builder: Builder, c: Any, a: Any, b: Any) -> Any:
    return (a if c else b) if isinstance(c, (bool, int)) else None


def _extremum(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def run(builder: Builder, *args: Any) -> Any:
        total = args[0]
        for a in args[1:]:
            total = builder.arithmetic(function, total, a)
        return total

    return run


_ON_SIZES: dict[str, Callable[..., Any]] = {
    "Add": _size(operator.add), "Sub": _minus, "Mul": _size(operator.mul), "Div": _quotient,
    "Max": _extremum(torch.sym_max), "Min": _extremum(torch.sym_min), "Neg": lambda b, a: b.arithmetic(operator.mul, a, -1),
    "Equal": _comparison(operator.eq), "Less": _comparison(operator.lt), "LessOrEqual": _comparison(operator.le),
    "Greater": _comparison(operator.gt), "GreaterOrEqual": _comparison(operator.ge), "Where": _where,
}  # fmt: skip


def _of(x: Any) -> Any:
    return x.meta["val"] if isinstance(x, fx.Node) else x


def truth(condition: Any) -> bool | None:
    """A comparison of sizes where it holds, or fails, for all of them; None otherwise."""
    if isinstance(condition, (bool, np.bool_)):
        return bool(condition)
    if statically_known_true(condition):
        return True
    return False if statically_known_true(torch.sym_not(condition)) else None
