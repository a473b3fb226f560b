"""Pointwise operators as expressions: one table from operator name to what it computes.

Each entry gets the arguments by name, a function that lifts an operand at the current index, and the result's dtype; it
returns None when an argument is outside of what it knows (the tensor is then loaded).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

Lift = Callable[[Any], "Expr | None"]
Pointwise = Callable[[dict[str, Any], Lift, torch.dtype], "Expr | None"]
POINTWISE: dict[str, Pointwise] = {}


def op(*names: str) -> Callable[[Pointwise], Pointwise]:
    def register(f: Pointwise) -> Pointwise:
        POINTWISE.update({f"aten::{n}": f for n in names})
        return f

    return register


def _unary(f: Callable[[Expr], Expr | None]) -> Pointwise:
    def run(args: dict[str, Any], lift: Lift, dtype: torch.dtype) -> Expr | None:
        x = lift(args["self"])
        return None if x is None else f(x)

    return run


def _binary(f: Callable[[Expr, Expr], Expr | None]) -> Pointwise:
    def run(args: dict[str, Any], lift: Lift, dtype: torch.dtype) -> Expr | None:
        a, b = lift(args["self"]), lift(args["other"] if "other" in args else args.get("exponent"))
        return None if a is None or b is None else f(a, b)

    return run


for _name in ("exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid", "sin", "cos", "floor", "ceil", "round", "erf"):
    POINTWISE[f"aten::{_name}"] = _unary(lambda x, name=_name: E.function(name, x) if not (name in ("floor", "ceil", "round") and x.kind == "int") else x)  # type: ignore[misc]

POINTWISE |= {
    "aten::neg": _unary(E.neg),
    "aten::abs": _unary(E.absolute),
    "aten::reciprocal": _unary(lambda x: E.div(E.const(1.0), x)),
    "aten::square": _unary(lambda x: E.mul(x, x)),
    "aten::relu": _unary(lambda x: E.maximum(x, E.convert(E.ZERO, x.kind))),
    "aten::logical_not": _unary(E.negate),
    "aten::bitwise_not": _unary(lambda x: E.negate(x) if x.kind == "bool" else None),
    "aten::mul": _binary(E.mul),
    "aten::multiply": _binary(E.mul),
    "aten::maximum": _binary(E.maximum),
    "aten::minimum": _binary(E.minimum),
    "aten::max": _binary(E.maximum),
    "aten::min": _binary(E.minimum),
    "aten::floor_divide": _binary(lambda a, b: E.floordiv(a, b) if a.kind == b.kind == "int" else None),
    "aten::remainder": _binary(lambda a, b: E.mod(a, b) if a.kind == b.kind == "int" else None),
    "aten::pow": _binary(E.power),
    "aten::le": _binary(E.le),
    "aten::lt": _binary(E.lt),
    "aten::ge": _binary(E.ge),
    "aten::gt": _binary(E.gt),
    "aten::eq": _binary(E.eq),
    "aten::ne": _binary(E.ne),
    "aten::less_equal": _binary(E.le),
    "aten::less": _binary(E.lt),
    "aten::greater_equal": _binary(E.ge),
    "aten::greater": _binary(E.gt),
    "aten::not_equal": _binary(E.ne),
    "aten::logical_and": _binary(E.all_of),
    "aten::logical_or": _binary(E.any_of),
    "aten::logical_xor": _binary(lambda a, b: E.ne(E.as_bool(a), E.as_bool(b))),
}


def _bitwise(f: Callable[..., Expr]) -> Pointwise:
    return _binary(lambda a, b: f(a, b) if a.kind == b.kind == "bool" else None)


for _name in ("bitwise_and", "__and__"):
    POINTWISE[f"aten::{_name}"] = _bitwise(E.all_of)
for _name in ("bitwise_or", "__or__"):
    POINTWISE[f"aten::{_name}"] = _bitwise(E.any_of)
for _name in ("bitwise_xor", "__xor__"):
    POINTWISE[f"aten::{_name}"] = _bitwise(E.ne)


@op("add")
def _add(args: dict[str, Any], lift: Lift, dtype: torch.dtype) -> Expr | None:
    a, b, alpha = _scaled_pair(args, lift)
    if a is None or b is None or alpha is None:
        return None
    return E.any_of(a, b) if a.kind == b.kind == "bool" else E.add(a, E.mul(alpha, b))


@op("sub", "subtract")
def _sub(args: dict[str, Any], lift: Lift, dtype: torch.dtype) -> Expr | None:
    a, b, alpha = _scaled_pair(args, lift)
    return None if a is None or b is None or alpha is None else E.sub(a, E.mul(alpha, b))


@op("rsub")
def _rsub(args: dict[str, Any], lift: Lift, dtype: torch.dtype) -> Expr | None:
    a, b, alpha = _scaled_pair(args, lift)
    return None if a is None or b is None or alpha is None else E.sub(b, E.mul(alpha, a))


def _scaled_pair(args: dict[str, Any], lift: Lift) -> tuple[Expr | None, Expr | None, Expr | None]:
    return lift(args["self"]), lift(args["other"]), lift(args.get("alpha", 1))


@op("div", "true_divide", "divide")
def _div(args: dict[str, Any], lift: Lift, dtype: torch.dtype) -> Expr | None:
    a, b = lift(args["self"]), lift(args["other"])
    if a is None or b is None:
        return None
    mode = args.get("rounding_mode")
    if mode is None:
        return E.div(a, b)
    if mode == "floor" and a.kind == b.kind == "int":
        return E.floordiv(a, b)
    return None


@op("clamp", "clip", "clamp_min", "clamp_max")
def _clamp(args: dict[str, Any], lift: Lift, dtype: torch.dtype) -> Expr | None:
    x = lift(args["self"])
    for bound, f in (("min", E.maximum), ("max", E.minimum)):
        if args.get(bound) is not None and x is not None:
            b = lift(args[bound])
            x = None if b is None else f(x, b)
    return x


@op("where")
def _where(args: dict[str, Any], lift: Lift, dtype: torch.dtype) -> Expr | None:
    if "self" not in args:
        return None
    c, a, b = lift(args["condition"]), lift(args["self"]), lift(args["other"])
    return None if c is None or a is None or b is None else E.where(c, a, b)


@op("masked_fill")
def _masked_fill(args: dict[str, Any], lift: Lift, dtype: torch.dtype) -> Expr | None:
    x, m, f = lift(args["self"]), lift(args["mask"]), lift(args["value"])
    if x is None or m is None or f is None:
        return None
    return E.where(E.negate(m), x, E.convert(f, x.kind))


@op("to", "_to_copy", "type_as")
def _cast(args: dict[str, Any], lift: Lift, dtype: torch.dtype) -> Expr | None:
    return lift(args["self"])


@op("dropout")
def _dropout(args: dict[str, Any], lift: Lift, dtype: torch.dtype) -> Expr | None:
    return None if args["train"] and args["p"] > 0 else lift(args["input"])


@op("silu")
def _silu(args: dict[str, Any], lift: Lift, dtype: torch.dtype) -> Expr | None:
    x = lift(args["self"])
    return None if x is None else E.mul(x, E.function("sigmoid", x))


@op("log2")
def _log2(args: dict[str, Any], lift: Lift, dtype: torch.dtype) -> Expr | None:
    x = lift(args["self"])
    return None if x is None else E.mul(E.function("log", x), E.const(1.0 / math.log(2.0)))


@op("exp2")
def _exp2(args: dict[str, Any], lift: Lift, dtype: torch.dtype) -> Expr | None:
    x = lift(args["self"])
    return None if x is None else E.power(E.const(2.0), E.as_float(x))


@op("sign", "sgn")
def _sign(args: dict[str, Any], lift: Lift, dtype: torch.dtype) -> Expr | None:
    x = lift(args["self"])
    if x is None or x.kind != "int":
        return None
    return E.sub(E.as_int(E.gt(x, E.ZERO)), E.as_int(E.lt(x, E.ZERO)))


@op("nan_to_num")
def _nan_to_num(args: dict[str, Any], lift: Lift, dtype: torch.dtype) -> Expr | None:
    """-inf as the least number. That a NaN becomes a zero, and an overflow the greatest number, is no part of what a score means."""
    x = lift(args["self"])
    if x is None or args.get("nan") or args.get("posinf") is not None or args.get("neginf") is not None or not dtype.is_floating_point:
        return None
    return E.maximum(x, E.const(torch.finfo(dtype).min))
