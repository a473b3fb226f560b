"""The judge's own evaluator of spec expressions: NumPy, float64, all indices at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

_UNARY: dict[str, Callable[[Any], Any]] = {
    "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "tanh": np.tanh, "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sin": np.sin, "cos": np.cos, "floor": np.floor, "ceil": np.ceil, "round": np.round, "erf": np.vectorize(math.erf, otypes=[float]),
    "not": np.logical_not, "abs": np.abs, "trunc": lambda x: np.trunc(x).astype(np.int64), "float": lambda x: np.asarray(x, float),
    "ge0": lambda x: np.asarray(x) >= 0, "eq0": lambda x: np.asarray(x) == 0,
}  # fmt: skip
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "div": np.true_divide, "floordiv": np.floor_divide, "mod": np.mod, "min": np.minimum, "max": np.maximum, "pow": np.power,
    "le": np.less_equal, "lt": np.less, "eq": np.equal, "same": np.equal,
}  # fmt: skip
_MANY: dict[str, Callable[[Any, Any], Any]] = {"add": np.add, "mul": np.multiply, "and": np.logical_and, "or": np.logical_or}


def evaluate(root: Any, indices: Mapping[str, np.ndarray], sizes: Mapping[str, int], loads: Sequence[np.ndarray], score: np.ndarray) -> np.ndarray:
    """``root`` at all ``indices`` (arrays that broadcast together). A load out of range reads the nearest entry: the branch is not taken."""
    memo: dict[Any, Any] = {}

    def go(e: Any) -> Any:
        if e not in memo:
            memo[e] = node(e)
        return memo[e]

    def node(e: Any) -> Any:
        if e.op == "const":
            return e.value
        if e.op == "sym":
            return sizes[e.value[0]]
        if e.op == "var":
            return indices[e.value]
        if e.op == "score":
            return score
        args = [go(a) for a in e.args]
        if e.op == "load":
            x = loads[e.value]
            read = x[tuple(np.clip(a, 0, n - 1) for a, n in zip(args, x.shape, strict=True))]
            return read != 0 if e.kind == "bool" else read
        if e.op == "where":
            return np.where(*args)
        if e.op in _MANY:
            return reduce(_MANY[e.op], args)
        if e.op in _UNARY:
            return _UNARY[e.op](args[0])
        return _BINARY[e.op](*args)

    with np.errstate(all="ignore"):
        return np.asarray(go(root))
