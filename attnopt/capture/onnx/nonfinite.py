"""Values that are not finite, replaced: exporters write PyTorch's ``nan_to_num`` as selections, one for NaN and one for each infinity."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
from torch import fx

from attnopt.capture.onnx.translate import Translator, attribute

aten = torch.ops.aten


def nan_to_num(t: Translator, node: ir.Node) -> fx.Node | None:
    """The selection ``node`` and those that it selects from as one ``nan_to_num`` of what they ask about; None when it is none."""
    kinds: dict[str, float] = {}
    value = node.outputs[0]
    while (by := value.producer()) is not None and by.op_type == "Where":
        condition, fill, x = by.inputs
        assert condition is not None and fill is not None and x is not None
        asked = _asked(t, condition)
        number = t.number(fill, 0)
        if asked is None or asked[0] in kinds or not isinstance(number, (int, float)):
            break
        kinds[asked[0]] = float(number)
        value = x
    if not kinds:
        return None
    of = t.tensor(value)
    dtype = of.meta["val"].dtype
    # each has to ask about the value that is selected from in the end
    at: ir.Value | None = node.outputs[0]
    for _ in kinds:
        by = None if at is None else at.producer()
        assert by is not None and by.inputs[0] is not None
        asked = _asked(t, by.inputs[0])
        if asked is None or _without_casts(asked[1]) is not _without_casts(value):
            return None
        at = by.inputs[2]
    if not dtype.is_floating_point:
        return None
    top = torch.finfo(dtype).max
    high, low = kinds.get("high", math.inf), kinds.get("low", -math.inf)
    return t.builder.call(aten.nan_to_num.default, of, kinds.get("nan", math.nan), None if high == top else high, None if low == -top else low)


def _asked(t: Translator, condition: ir.Value) -> tuple[str, ir.Value] | None:
    """``nan``, ``high`` or ``low``, and the value that is asked whether it is one."""
    by = condition.producer()
    if by is None or by.inputs[0] is None:
        return None
    if by.op_type == "IsNaN":
        return "nan", by.inputs[0]
    if by.op_type != "And" or by.inputs[1] is None:
        return None
    parts = {p.op_type: p for p in (v.producer() for v in by.inputs if v is not None) if p is not None}
    infinite = parts.get("IsInf")
    sign = parts.get("Greater", parts.get("Less"))
    if len(parts) != 2 or infinite is None or sign is None or sign.inputs[0] is not infinite.inputs[0] or sign.inputs[1] is None or infinite.inputs[0] is None:
        return None
    if t.number(sign.inputs[1], 0) != 0 or not (attribute(infinite, "detect_positive", 1) and attribute(infinite, "detect_negative", 1)):
        return None
    return "high" if sign.op_type == "Greater" else "low", infinite.inputs[0]


def _without_casts(value: ir.Value) -> ir.Value:
    """A value before it was cast to a dtype that holds every number of its own, and so the same NaN and infinities."""
    while (by := value.producer()) is not None and by.op_type == "Cast" and by.inputs[0] is not None and by.inputs[0].dtype is not None:
        wider = ir.DataType(attribute(by, "to"))
        if (by.inputs[0].dtype, wider) not in _WIDER and by.inputs[0].dtype is not wider:
            break
        value = by.inputs[0]
    return value


_WIDER = {(ir.DataType.FLOAT16, ir.DataType.FLOAT), (ir.DataType.FLOAT16, ir.DataType.DOUBLE), (ir.DataType.FLOAT, ir.DataType.DOUBLE)}
