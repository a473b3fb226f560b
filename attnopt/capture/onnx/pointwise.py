"""Operators of each element by itself, and reductions and normalisations."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from attnopt.capture.onnx.known import Known, compute, known
from attnopt.capture.onnx.nonfinite import nan_to_num
from attnopt.capture.onnx.translate import Result, Translator, attribute, rule, torch_dtype

aten = torch.ops.aten

_UNARY = {
    "Neg": aten.neg, "Abs": aten.abs, "Exp": aten.exp, "Log": aten.log, "Sqrt": aten.sqrt, "Reciprocal": aten.reciprocal, "Tanh": aten.tanh,
    "Sigmoid": aten.sigmoid, "Erf": aten.erf, "Sin": aten.sin, "Cos": aten.cos, "Floor": aten.floor, "Ceil": aten.ceil, "Round": aten.round,
    "Relu": aten.relu, "Not": aten.logical_not, "IsNaN": aten.isnan,
}  # fmt: skip

_BINARY = {
    "Add": aten.add, "Sub": aten.sub, "Mul": aten.mul, "Div": aten.div,
    "And": aten.logical_and, "Or": aten.logical_or, "Xor": aten.logical_xor,
    "Equal": aten.eq, "Less": aten.lt, "LessOrEqual": aten.le, "Greater": aten.gt, "GreaterOrEqual": aten.ge,
}  # fmt: skip
_COMPARISONS = {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"}


@rule(*_UNARY)
def _unary(t: Translator, node: ir.Node) -> Result | None:
    (x,) = node.inputs
    assert x is not None
    given = t.known(x)
    if given is not None:
        found = compute(t.builder, node.op_type, [given], torch.bool if node.op_type in ("Not", "IsNaN") else given.dtype)
        if found is not None:
            return found
    return t.builder.call(_UNARY[node.op_type].default, t.tensor(x))


@rule(*_BINARY)
def _binary(t: Translator, node: ir.Node) -> Result | None:
    a, b = node.inputs
    assert a is not None and b is not None
    both = [x for x in (t.known(a), t.known(b)) if x is not None]
    dtype = torch.bool if node.op_type in _COMPARISONS else t.dtype(a)
    if len(both) == 2:
        found = compute(t.builder, node.op_type, both, dtype)
        if found is not None:
            return found
    operator = _BINARY[node.op_type]
    options: dict[str, Any] = {}
    overload = operator.default if node.op_type in ("And", "Or", "Xor") else operator.Tensor
    if node.op_type == "Div" and not dtype.is_floating_point:
        overload, options = operator.Tensor_mode, {"rounding_mode": "trunc"}
    right = None if dtype is torch.bool and node.op_type not in _COMPARISONS else t.number(b, t.rank(a))
    if right is not None:
        if node.op_type in _COMPARISONS and t.dtype(a) is not torch.bool:
            overload = operator.Scalar
        return t.builder.call(overload, t.tensor(a), right if t.dtype(a) is not torch.bool else t.tensor(b), **options)
    left = t.number(a, t.rank(b)) if node.op_type in ("Add", "Mul") else None
    if left is not None:
        return t.builder.call(overload, t.tensor(b), left)
    return t.builder.call(overload, t.tensor(a), t.tensor(b), **options)


@rule("Max", "Min")
def _extremum(t: Translator, node: ir.Node) -> Result | None:
    operands = [v for v in node.inputs if v is not None]
    all_known = [x for x in (t.known(v) for v in operands) if x is not None]
    if len(all_known) == len(operands):
        found = compute(t.builder, node.op_type, all_known, all_known[0].dtype)
        if found is not None:
            return found
    operator = aten.maximum.default if node.op_type == "Max" else aten.minimum.default
    total = t.tensor(operands[0])
    for v in operands[1:]:
        total = t.builder.call(operator, total, t.tensor(v))
    return total


@rule("Pow")
def _pow(t: Translator, node: ir.Node) -> Result | None:
    a, b = node.inputs
    assert a is not None and b is not None
    left, right = t.known(a), t.known(b)
    if left is not None and right is not None:
        found = compute(t.builder, "Pow", [left, right], left.dtype)
        if found is not None:
            return found
    exponent = t.number(b, t.rank(a))
    if isinstance(exponent, (int, float)):
        if not t.dtype(a).is_floating_point and exponent != int(exponent):
            return None
        whole = float(exponent).is_integer()
        return t.builder.call(aten.pow.Tensor_Scalar, t.tensor(a), int(exponent) if whole else exponent)
    if t.dtype(a) != t.dtype(b):
        return None
    return t.builder.call(aten.pow.Tensor_Tensor, t.tensor(a), t.tensor(b))


@rule("Mod")
def _mod(t: Translator, node: ir.Node) -> Result | None:
    a, b = node.inputs
    assert a is not None and b is not None
    if attribute(node, "fmod", 0):
        return t.builder.call(aten.fmod.Tensor, t.tensor(a), t.tensor(b))
    by = t.number(b, t.rank(a))
    if by is not None and not isinstance(by, fx.Node):
        return t.builder.call(aten.remainder.Scalar, t.tensor(a), by)
    return t.builder.call(aten.remainder.Tensor, t.tensor(a), t.tensor(b))


@rule("Where")
def _where(t: Translator, node: ir.Node) -> Result | None:
    all_known = [x for x in (t.known(v) for v in node.inputs) if x is not None]
    if len(all_known) == 3:
        found = compute(t.builder, "Where", all_known, all_known[1].dtype)
        if found is not None:
            return found
    return nan_to_num(t, node) or t.builder.call(aten.where.self, *(t.tensor(v) for v in node.inputs))


@rule("Clip")
def _clip(t: Translator, node: ir.Node) -> Result | None:
    x, *rest = node.inputs
    assert x is not None
    bounds: list[Any] = [None, None]
    for i, v in enumerate(rest):
        if v is not None:
            bounds[i] = t.number(v, 0)
            if bounds[i] is None:
                return None
    if bounds == [None, None]:
        return t.result(x)
    return t.builder.call(aten.clamp.default, t.tensor(x), *bounds)


@rule("Cast")
def _cast(t: Translator, node: ir.Node) -> Result | None:
    (x,) = node.inputs
    assert x is not None
    return _to(t, x, torch_dtype(ir.DataType(attribute(node, "to")), str(node.name)))


@rule("CastLike")
def _cast_like(t: Translator, node: ir.Node) -> Result | None:
    x, like = node.inputs
    assert x is not None and like is not None
    return _to(t, x, t.dtype(like))


def _to(t: Translator, x: ir.Value, dtype: torch.dtype) -> Result:
    given = t.known(x)
    if given is not None and (given.is_constant or not (dtype.is_floating_point or dtype is torch.bool)):
        if not given.is_constant:
            return Known(given.values, dtype)
        return known(
            torch.tensor(given.values.tolist(), dtype=given.dtype).to(dtype).float().numpy()
            if dtype is torch.bfloat16
            else torch.tensor(given.values.tolist(), dtype=given.dtype).to(dtype).numpy(),
            dtype,
        )
    if t.dtype(x) is dtype:
        return t.result(x)
    return t.builder.call(aten._to_copy.default, t.tensor(x), dtype=dtype)


@rule("Identity")
def _identity(t: Translator, node: ir.Node) -> Result | None:
    (x,) = node.inputs
    assert x is not None
    return t.result(x)


@rule("Dropout")
def _dropout(t: Translator, node: ir.Node) -> Result | None:
    x, _, training = (*node.inputs, None, None)[:3]
    assert x is not None
    trains = None if training is None else t.known(training)
    if (training is not None and (trains is None or trains.single is not False)) or (len(node.outputs) > 1 and node.outputs[1].uses()):
        return None
    return t.result(x)


@rule("Gelu")
def _gelu(t: Translator, node: ir.Node) -> Result | None:
    return t.builder.call(aten.gelu.default, t.tensor(node.inputs[0]), approximate=attribute(node, "approximate", "none"))


@rule("Softmax", "LogSoftmax")
def _softmax(t: Translator, node: ir.Node) -> Result | None:
    operator = aten.softmax.int if node.op_type == "Softmax" else aten.log_softmax.int
    return t.builder.call(operator, t.tensor(node.inputs[0]), attribute(node, "axis", -1))


@rule("LayerNormalization")
def _layer_norm(t: Translator, node: ir.Node) -> Result | None:
    if any(v.uses() for v in node.outputs[1:]):
        return None
    x, scale, bias = (*node.inputs, None)[:3]
    given = t.tensor(x)
    rank = given.meta["val"].dim()
    axis = attribute(node, "axis", -1) % rank
    shape = [t.builder.size(given, d) for d in range(axis, rank)]
    return t.builder.call(aten.layer_norm.default, given, shape, t.tensor(scale), None if bias is None else t.tensor(bias), attribute(node, "epsilon", 1e-5))


@rule("IsInf")
def _isinf(t: Translator, node: ir.Node) -> Result | None:
    if not (attribute(node, "detect_positive", 1) and attribute(node, "detect_negative", 1)):
        return None
    return t.builder.call(aten.isinf.default, t.tensor(node.inputs[0]))


_REDUCTIONS = {
    "ReduceLogSumExp": aten.logsumexp.default,
    "ReduceSum": aten.sum.dim_IntList,
    "ReduceMean": aten.mean.dim,
    "ReduceMax": aten.amax.default,
    "ReduceMin": aten.amin.default,
}


@rule(*_REDUCTIONS, "ReduceProd")
def _reduce(t: Translator, node: ir.Node) -> Result | None:
    x, axes = (*node.inputs, None)[:2]
    assert x is not None
    given = t.known(axes)
    chosen = attribute(node, "axes") if axes is None else None if given is None else given.ints()
    if axes is not None and chosen is None:
        return None
    keep = bool(attribute(node, "keepdims", 1))
    if not chosen:
        if attribute(node, "noop_with_empty_axes", 0):
            return t.result(x)
        chosen = list(range(t.rank(x)))
    if node.op_type == "ReduceProd":
        sizes = t.known(x)
        if sizes is None or sizes.values.ndim != 1 or sizes.dtype.is_floating_point:
            return None
        total = t.builder.product(sizes.items())
        return known([total], sizes.dtype) if keep else known(total, sizes.dtype)
    return t.builder.call(_REDUCTIONS[node.op_type], t.tensor(x), [int(a) for a in chosen], keep)


@rule("CumSum")
def _cumsum(t: Translator, node: ir.Node) -> Result | None:
    x, axis = node.inputs
    at = t.known(axis)
    if at is None or attribute(node, "exclusive", 0) or attribute(node, "reverse", 0):
        return None
    operand = t.tensor(x)
    # the sum of int32 would be an int64 in PyTorch
    return t.builder.call(aten.cumsum.default, operand, int(at.single), dtype=operand.meta["val"].dtype)
