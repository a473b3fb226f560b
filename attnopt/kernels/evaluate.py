"""Expressions interpreted in PyTorch, each at the smallest shape that broadcasts to [B, Hq, Sq, Skv].

A term over keys alone stays [1, 1, 1, Skv] and a padding term [B, 1, 1, Skv]; only what reads the score is as large as the
score. Integers are int64; floats are float32, or float64 where the query is float64.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

AXES = {"b": 0, "h": 1, "q": 2, "k": 3}
"""The axis of each index variable."""

Value = Tensor | int | float | bool
Range = tuple[int, int]


@dataclass
class Env:
    """Where expressions are evaluated: a box of indices, and what the leaves mean in it.

    ``ranges`` holds [start, stop) for b, h, q and k. ``score`` is the raw product, [b, h, q, k] over these ranges.
    ``known`` gives values to whole expressions, in place of evaluating them, and ``limits`` the least and greatest of some of those.
    """

    ranges: Mapping[str, Range]
    loads: Sequence[Tensor]
    sizes: Mapping[str, int]
    dtype: torch.dtype
    device: torch.device
    score: Tensor | None = None
    known: Mapping[Expr, Value] = field(default_factory=dict)
    limits: Mapping[Expr, Range] = field(default_factory=dict)

    def index(self, name: str) -> Tensor:
        """The index variable as an int64 tensor along its axis."""
        return once(_index, self.device)(*self.ranges[name], AXES[name], self.device)


R = TypeVar("R")


def once(function: Callable[..., R], device: torch.device) -> Callable[..., R]:
    """``function`` with its memory; inside of a CUDA graph's capture without it, since nothing runs there yet."""
    return inspect.unwrap(function) if capturing(device) else function


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=256)
def _index(start: int, stop: int, axis: int, device: torch.device) -> Tensor:
    shape = [1, 1, 1, 1]
    shape[axis] = stop - start
    return torch.arange(start, stop, device=device).view(shape)


def evaluate(roots: Sequence[Expr], env: Env, keep: bool = False) -> tuple[list[Value], dict[Expr, Value]]:
    """The values of ``roots``, and the table of values of all nodes below them.

    Without ``keep`` a value is dropped after its last use, the table holds little more than the roots, and nothing below a known value is computed.
    """
    order = list(E.postorder(*roots, known=() if keep else env.known))
    uses = Counter(a for e in order if e not in env.known for a in e.args)
    uses.update(roots)
    table: dict[Expr, Value] = {}
    for e in order:
        table[e] = env.known[e] if e in env.known else _node(e, table, env)
        if not keep and e not in env.known:
            for a in e.args:
                uses[a] -= 1
                if not uses[a]:
                    del table[a]
    return [table[r] for r in roots], table


def as_tensor(x: Value, kind: E.Kind, env: Env) -> Tensor:
    """``x`` as a tensor of the kind's dtype; numbers become tensors without axes."""
    if isinstance(x, Tensor):
        return x
    dtype = _dtype(kind, env)
    if isinstance(x, float) and abs(x) > torch.finfo(dtype).max:
        x = math.copysign(math.inf, x)  # twice the least number, say; torch refuses to round it itself
    return torch.full((), x, dtype=dtype, device=env.device)


def _dtype(kind: E.Kind, env: Env) -> torch.dtype:
    return {"bool": torch.bool, "int": torch.int64, "float": env.dtype}[kind]


# ------------------------------------------------------------------------------------------------ nodes

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "cos": torch.cos,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "erf": torch.erf,
    "not": torch.logical_not,
    "abs": torch.abs,
    "trunc": lambda x: x.to(torch.int64),
    "ge0": lambda x: x >= 0,
    "eq0": lambda x: x == 0,
}

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "div": torch.div,
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "mod": torch.remainder,
    "min": torch.minimum,
    "max": torch.maximum,
    "pow": torch.pow,
    "le": torch.le,
    "lt": torch.lt,
    "eq": torch.eq,
    "same": torch.eq,
}

_FOLDS: dict[str, Callable[[Any, Any], Any]] = {"add": operator.add, "mul": operator.mul, "and": operator.and_, "or": operator.or_}

_NUMBERS: dict[str, Callable[..., int]] = {
    "add": lambda *xs: sum(xs),
    "mul": lambda *xs: reduce(operator.mul, xs),
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "min": min,
    "max": max,
}
"""Arithmetic on sizes stays on Python integers."""


def _node(e: Expr, table: Mapping[Expr, Value], env: Env) -> Value:
    op = e.op
    if op == "const":
        return e.value  # type: ignore[no-any-return]
    if op == "sym":
        return env.sizes[e.value[0]]
    if op == "var":
        return env.index(e.value)
    if op == "score":
        if env.score is None:
            raise ValueError("this expression reads the score, and none was given")
        return env.score
    if op == "load":
        return _load(e, table, env)
    args = [table[a] for a in e.args]
    if e.kind == "int" and op in _NUMBERS and all(isinstance(a, int) for a in args):
        return _NUMBERS[op](*args)
    if op == "float":
        return as_tensor(args[0], e.args[0].kind, env).to(env.dtype)
    if op == "where":
        c, a, b = (as_tensor(x, y.kind, env) for x, y in zip(args, e.args, strict=True))
        return torch.where(c, a, b)
    if op in _FOLDS:
        if all(not isinstance(a, Tensor) for a in args):
            args[0] = as_tensor(args[0], e.args[0].kind, env)
        # small operands first, so that they meet the large ones once; the score last, since large terms beside it may cancel
        order = sorted(zip(e.args, args, strict=True), key=lambda x: (E.score() in x[0].leaves, _size(x[1])))
        return reduce(_FOLDS[op], [x for _, x in order])
    if op in ("min", "max") and e.kind == "float" and any(not isinstance(x, Tensor) for x in args) and any(isinstance(x, Tensor) for x in args):
        x, bound = (args[0], args[1]) if isinstance(args[0], Tensor) else (args[1], args[0])
        assert isinstance(x, Tensor) and not isinstance(bound, Tensor)
        return x.clamp(max=bound) if op == "min" else x.clamp(min=bound)  # whose gradient at the bound is whole
    tensors = [as_tensor(x, y.kind, env) for x, y in zip(args, e.args, strict=True)]
    if op in _UNARY:
        return _UNARY[op](tensors[0])
    return _BINARY[op](tensors[0], tensors[1])


def _size(x: Value) -> int:
    return x.numel() if isinstance(x, Tensor) else 0


# ------------------------------------------------------------------------------------------------ loads


@dataclass(frozen=True)
class Access:
    """How a load reads its tensor: the part of the tensor that can be had as a view, and index tensors for the rest.

    ``view`` has one axis per entry of ``axes``. With ``gather`` None, ``axes`` names the axis of [b, h, q, k] each stands for;
    otherwise ``gather`` indexes all of ``view``'s axes.
    """

    view: Tensor
    axes: tuple[int, ...]
    gather: tuple[Tensor, ...] | None


def access(e: Expr, table: Mapping[Expr, Value], env: Env) -> Access:
    """Constants select, plain variables slice, and only what is left gathers, with its indices clamped into range.

    Clamping matters where a model computes an index out of range in a branch that it then does not take.
    """
    view = env.loads[e.value]
    kept: list[Expr] = []
    for x in e.args:
        i = table[x]
        if isinstance(i, Tensor):
            kept.append(x)
        else:
            view = view.select(len(kept), min(max(int(i), 0), view.shape[len(kept)] - 1))
    ranges = [_slice(x, view.shape[d], env) for d, x in enumerate(kept)]
    axes = tuple(r[0] for r in ranges if r is not None)
    if len(axes) == len(kept) == len(set(axes)):
        for d, r in enumerate(ranges):
            assert r is not None
            view = view.narrow(d, r[1], r[2])
        return Access(view, axes, None)
    index = tuple(_clamp(x, table[x], view.shape[d], env) for d, x in enumerate(kept))
    return Access(view, (), index)


def _clamp(e: Expr, i: Value, extent: int, env: Env) -> Tensor:
    assert isinstance(i, Tensor)
    least, greatest = env.limits.get(e, (-1, extent))
    return i if least >= 0 and greatest < extent else i.clamp(0, max(extent - 1, 0))


def _slice(x: Expr, extent: int, env: Env) -> tuple[int, int, int] | None:
    """x as (axis, start, length) of an axis of the tensor, when x is a variable plus an offset and stays inside."""
    offset = 0
    variable: Expr | None = None
    for c, a in E.terms(x):
        if a is None:
            offset += int(c)
        elif a.op == "sym":
            offset += int(c) * env.sizes[a.value[0]]
        elif a.op == "var" and c == 1 and variable is None:
            variable = a
        else:
            return None
    if variable is None or variable.value not in env.ranges:
        return None
    start, stop = env.ranges[variable.value]
    if start + offset < 0 or stop + offset > extent:
        return None
    return AXES[variable.value], start + offset, stop - start


def _slices(e: Expr, table: Mapping[Expr, Value], env: Env) -> Access | None:
    """A load with one computed index, which varies along one axis, and plain variables for the others: its slices are selected, which costs less than a gather of elements."""
    x, values = env.loads[e.value], [table[a] for a in e.args]
    parts = [_slice(a, n, env) if isinstance(i, Tensor) else None for a, i, n in zip(e.args, values, x.shape, strict=True)]
    computed = [d for d, (i, part) in enumerate(zip(values, parts, strict=True)) if part is None]
    if len(computed) != 1:
        return None
    (d,) = computed
    index = values[d]
    if not isinstance(index, Tensor):
        return None
    along = [axis for axis, n in enumerate(index.shape) if n > 1]
    axes = [part[0] if part is not None else along[0] if along else -1 for part in parts]
    if len(along) != 1 or index.dim() != len(AXES) or len(set(axes)) != len(axes):
        return None
    index = _clamp(e.args[d], index, x.shape[d], env).flatten()
    for other, part in enumerate(parts):
        if part is not None:
            x = x.narrow(other, part[1], part[2])
    return Access(x.index_select(d, index), tuple(axes), None)


def _load(e: Expr, table: Mapping[Expr, Value], env: Env) -> Tensor:
    found = _slices(e, table, env) or access(e, table, env)
    x = found.view if found.gather is None else found.view[found.gather]
    if x.dtype != _dtype(e.kind, env):
        x = x != 0 if e.kind == "bool" else x.to(_dtype(e.kind, env))
    if found.gather is None and found.axes:
        order = sorted(range(len(found.axes)), key=lambda d: found.axes[d])
        shape = [1, 1, 1, 1]
        for d, axis in enumerate(found.axes):
            shape[axis] = x.shape[d]
        x = x.permute(order).reshape(shape)
    return x
