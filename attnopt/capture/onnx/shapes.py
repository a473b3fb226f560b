"""Operators that make, move or pick elements: shapes, views, gathers, joins."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from attnopt.capture.onnx.builder import Size
from attnopt.capture.onnx.known import LIMIT, Known, known
from attnopt.capture.onnx.translate import Result, Translator, attribute, rule, size_of

aten = torch.ops.aten
_FAR = 1 << 31
"""Ends of slices from here on mean the end of the axis."""


@rule("Constant")
def _constant(t: Translator, node: ir.Node) -> Result | None:
    value = node.outputs[0]
    if value.const_value is None:
        for name, dtype in (("value_int", torch.int64), ("value_ints", torch.int64), ("value_float", torch.float32), ("value_floats", torch.float32)):
            found = attribute(node, name)
            if found is not None:
                return known(np.array(found), dtype)
        tensor = attribute(node, "value")
        if tensor is None:
            return None
        value.const_value = tensor
    made = t._initializer(value)
    return made.known if made.known is not None else made.node


@rule("Shape")
def _shape(t: Translator, node: ir.Node) -> Result | None:
    (x,) = node.inputs
    assert x is not None
    given = t.known(x)
    sizes = list(given.values.shape) if given is not None else t.builder.shape(t.tensor(x))
    return known(sizes[slice(attribute(node, "start", 0), attribute(node, "end"))], torch.int64)


@rule("Size")
def _size(t: Translator, node: ir.Node) -> Result | None:
    return known(t.builder.product(t.builder.shape(t.tensor(node.inputs[0]))), torch.int64)


@rule("ConstantOfShape")
def _constant_of_shape(t: Translator, node: ir.Node) -> Result | None:
    shape = t.known(node.inputs[0])
    if shape is None:
        return None
    tensor = attribute(node, "value")
    fill = np.zeros(1, np.float32) if tensor is None else tensor.numpy()
    dtype = torch.from_numpy(fill.copy()).dtype
    sizes = shape.ints()
    if sizes is not None and int(np.prod(sizes)) <= LIMIT and len(sizes) <= 2:
        return known(np.full(sizes, fill[0]), dtype)
    return t.builder.call(aten.full.default, [size_of(s) for s in shape.items()], fill[0].item(), dtype=dtype)


@rule("Range")
def _range(t: Translator, node: ir.Node) -> Result | None:
    ends = [t.known(v) for v in node.inputs]
    if any(e is None or e.single is None for e in ends):
        return None
    start, end, step = (e.single for e in ends if e is not None)
    dtype = ends[0].dtype  # type: ignore[union-attr]
    if all(isinstance(x, int) for x in (start, end, step)) and len(range(start, end, step)) <= LIMIT:
        return known(np.arange(start, end, step), dtype)
    return t.builder.call(aten.arange.start_step, start, end, step, dtype=dtype)


# ------------------------------------------------------------------------------------------------ views


@rule("Reshape")
def _reshape(t: Translator, node: ir.Node) -> Result | None:
    x, shape = node.inputs
    assert x is not None
    wanted = t.known(shape)
    if wanted is None:
        return None
    given = t.known(x)
    ints = wanted.ints()
    if given is not None and ints is not None:
        return Known(
            given.values.reshape([given.values.shape[i] if n == 0 and not attribute(node, "allowzero", 0) else n for i, n in enumerate(ints)]), given.dtype
        )
    operand = t.tensor(x)
    sizes: list[Size] = []
    for axis, n in enumerate(wanted.items()):
        copied = isinstance(n, int) and n == 0 and not attribute(node, "allowzero", 0)
        sizes.append(t.builder.size(operand, axis) if copied else size_of(n))
    return t.builder.call(aten.reshape.default, operand, sizes)


@rule("Flatten")
def _flatten(t: Translator, node: ir.Node) -> Result | None:
    operand = t.tensor(node.inputs[0])
    sizes = t.builder.shape(operand)
    axis = attribute(node, "axis", 1)
    axis = axis + len(sizes) if axis < 0 else axis
    return t.builder.call(aten.reshape.default, operand, [t.builder.product(sizes[:axis]), t.builder.product(sizes[axis:])])


@rule("Transpose")
def _transpose(t: Translator, node: ir.Node) -> Result | None:
    (x,) = node.inputs
    assert x is not None
    rank = t.rank(x)
    return t.builder.call(aten.permute.default, t.tensor(x), attribute(node, "perm", list(range(rank))[::-1]))


@rule("Unsqueeze")
def _unsqueeze(t: Translator, node: ir.Node) -> Result | None:
    x, axes = node.inputs
    assert x is not None
    chosen = _ints(t, axes)
    if chosen is None:
        return None
    rank = t.rank(x) + len(chosen)
    chosen = sorted(a % rank for a in chosen)
    given = t.known(x)
    if given is not None:
        return Known(np.expand_dims(given.values, tuple(chosen)), given.dtype)
    operand = t.tensor(x)
    for a in chosen:
        operand = t.builder.call(aten.unsqueeze.default, operand, a)
    return operand


@rule("Squeeze")
def _squeeze(t: Translator, node: ir.Node) -> Result | None:
    x, axes = (*node.inputs, None)[:2]
    assert x is not None
    given = t.known(x)
    sizes: Sequence[Any] = given.values.shape if given is not None else t.tensor(x).meta["val"].shape
    chosen = [d for d, n in enumerate(sizes) if isinstance(n, int) and n == 1] if axes is None else _ints(t, axes)
    if chosen is None or (axes is None and any(not isinstance(n, int) for n in sizes)):
        return None
    chosen = [a % len(sizes) for a in chosen]
    if given is not None:
        return Known(np.squeeze(given.values, tuple(chosen)), given.dtype)
    if any(not isinstance(sizes[a], int) for a in chosen):
        return None
    return t.builder.call(aten.squeeze.dims, t.tensor(x), chosen)


@rule("Expand")
def _expand(t: Translator, node: ir.Node) -> Result | None:
    x, shape = node.inputs
    assert x is not None
    wanted = t.known(shape)
    if wanted is None:
        return None
    given = t.known(x)
    ints = wanted.ints()
    if given is not None and ints is not None and int(np.prod(ints)) <= LIMIT:
        return Known(np.broadcast_to(given.values, np.broadcast_shapes(given.values.shape, tuple(ints))), given.dtype)
    operand = t.tensor(x)
    own = t.builder.shape(operand)
    target = [size_of(n) for n in wanted.items()]
    rank = max(len(own), len(target))
    own, target = [*[1] * (rank - len(own)), *own], [*[1] * (rank - len(target)), *target]
    sizes = [a if isinstance(b, int) and b == 1 else b for a, b in zip(own, target, strict=True)]
    return t.builder.call(aten.expand.default, operand, sizes)


@rule("Tile")
def _tile(t: Translator, node: ir.Node) -> Result | None:
    x, repeats = node.inputs
    times = t.known(repeats)
    return None if times is None else t.builder.call(aten.repeat.default, t.tensor(x), [size_of(n) for n in times.items()])


@rule("Slice")
def _slice(t: Translator, node: ir.Node) -> Result | None:
    x, starts, ends, axes, steps = (*node.inputs, None, None)[:5]
    assert x is not None
    first, last, by = t.known(starts), t.known(ends), [] if steps is None else _ints(t, steps)
    chosen = list(range(0 if first is None else first.values.size)) if axes is None else _ints(t, axes)
    if first is None or last is None or by is None or chosen is None:
        return None
    by = by or [1] * len(chosen)
    given = t.known(x)
    if given is not None and given.values.ndim == 1 and first.is_constant and last.is_constant:
        (start,), (end,) = first.items(), last.items()
        return Known(given.values[start : None if end <= -_FAR else end : by[0]], given.dtype)
    if any(s < 1 for s in by):
        return None
    operand = t.tensor(x)
    rank = operand.meta["val"].dim()
    for axis, start, end, step in zip(chosen, first.items(), last.items(), by, strict=True):
        to_end = isinstance(end, int) and end >= _FAR
        if start == 0 and to_end and step == 1:
            continue
        whole = t.builder.size(operand, axis % rank)
        if isinstance(whole, fx.Node):
            start, end = _clamped(t, start, whole), None if to_end else _clamped(t, end, whole)
        operand = t.builder.call(aten.slice.Tensor, operand, axis % rank, size_of(start), None if to_end else size_of(end), step)
    return operand


def _clamped(t: Translator, at: Any, whole: fx.Node) -> Size:
    """A constant place on an axis of size ``whole`` within it, for every size: counted from the end when negative."""
    if isinstance(at, fx.Node) or at == 0:
        return size_of(at)
    t.edges.append((whole.meta["val"].node.expr, abs(at) - 1))
    if at > 0:
        return t.builder.arithmetic(torch.sym_min, at, whole)
    return t.builder.arithmetic(torch.sym_max, t.builder.arithmetic(operator.add, whole, at), 0)


@rule("Split")
def _split(t: Translator, node: ir.Node) -> Sequence[Result] | None:
    x, lengths = (*node.inputs, None)[:2]
    operand = t.tensor(x)
    axis = attribute(node, "axis", 0) % operand.meta["val"].dim()
    parts: list[Any]
    if lengths is not None:
        given = t.known(lengths)
        if given is None:
            return None
        parts = given.items()
    else:
        whole, n = t.builder.size(operand, axis), attribute(node, "num_outputs", len(node.outputs))
        if not isinstance(whole, int):
            return None
        chunk = -(-whole // n)
        parts = [min(chunk, whole - i * chunk) for i in range(n)]
    split = t.builder.call(aten.split_with_sizes.default, operand, [size_of(p) for p in parts], axis)
    return [t.builder.call(operator.getitem, split, i) for i in range(len(node.outputs))]


# ------------------------------------------------------------------------------------------------ joins and gathers


@rule("Concat")
def _concat(t: Translator, node: ir.Node) -> Result | None:
    operands = [v for v in node.inputs if v is not None]
    axis = attribute(node, "axis")
    parts = [x for x in (t.known(v) for v in operands) if x is not None]
    if len(parts) == len(operands) and parts[0].values.ndim == 1 and sum(p.values.size for p in parts) <= LIMIT:
        return Known(np.concatenate([p.values for p in parts]), parts[0].dtype)
    if len(operands) == 1:
        return t.result(operands[0])
    tensors = [t.tensor(v) for v in operands]
    return t.builder.call(aten.cat.default, tensors, axis % tensors[0].meta["val"].dim())


@rule("Gather")
def _gather(t: Translator, node: ir.Node) -> Result | None:
    x, where = node.inputs
    assert x is not None and where is not None
    axis = attribute(node, "axis", 0)
    given, at = t.known(x), t.known(where)
    indices = None if at is None else at.ints()
    if given is not None and at is not None and indices is not None:
        return Known(_object(np.take(given.values, np.array(indices).reshape(at.values.shape), axis=axis)), given.dtype)
    operand = t.tensor(x)
    rank = operand.meta["val"].dim()
    axis %= rank
    if at is not None and at.values.ndim == 0:
        return t.builder.call(aten.select.int, operand, axis, size_of(at.single))
    return t.builder.call(aten.index.Tensor, operand, [None] * axis + [_index(t, where)])


@rule("GatherND")
def _gather_nd(t: Translator, node: ir.Node) -> Result | None:
    x, where = node.inputs
    if attribute(node, "batch_dims", 0):
        return None
    indices = _index(t, where)
    count = indices.meta["val"].shape[-1]
    if not isinstance(count, int):
        return None
    picked = [t.builder.call(aten.select.int, indices, indices.meta["val"].dim() - 1, i) for i in range(count)]
    return t.builder.call(aten.index.Tensor, t.tensor(x), picked)


@rule("GatherElements")
def _gather_elements(t: Translator, node: ir.Node) -> Result | None:
    """Indices may be negative, and PyTorch's ``gather`` takes none: they are wrapped first."""
    x, where = node.inputs
    operand, indices = t.tensor(x), _index(t, where)
    axis = attribute(node, "axis", 0) % operand.meta["val"].dim()
    wrapped = t.builder.call(
        aten.where.self, t.builder.call(aten.lt.Scalar, indices, 0), t.builder.call(aten.add.Tensor, indices, t.builder.size(operand, axis)), indices
    )
    return t.builder.call(aten.gather.default, operand, axis, wrapped)


def _index(t: Translator, value: ir.Value | None) -> fx.Node:
    node = t.tensor(value)
    return node if node.meta["val"].dtype is torch.int64 else t.builder.call(aten._to_copy.default, node, dtype=torch.int64)


@rule("Trilu")
def _trilu(t: Translator, node: ir.Node) -> Result | None:
    x, k = (*node.inputs, None)[:2]
    diagonal: Any = 0
    if k is not None:
        given = t.known(k)
        if given is None:
            return None
        diagonal = given.single
    triangle = aten.triu.default if attribute(node, "upper", 1) else aten.tril.default
    return t.builder.call(triangle, t.tensor(x), diagonal)


@rule("Pad")
def _pad(t: Translator, node: ir.Node) -> Result | None:
    x, pads, fill, axes = (*node.inputs, None, None)[:4]
    assert x is not None
    amounts, chosen = t.known(pads), None if axes is None else _ints(t, axes)
    if amounts is None or attribute(node, "mode", "constant") != "constant" or (axes is not None and chosen is None):
        return None
    value = 0 if fill is None else t.number(fill, 1)
    if value is None or isinstance(value, fx.Node):
        return None
    operand = t.tensor(x)
    rank = operand.meta["val"].dim()
    chosen = [a % rank for a in chosen] if chosen is not None else list(range(rank))
    items = [size_of(p) for p in amounts.items()]
    low, high = dict(zip(chosen, items[: len(chosen)], strict=True)), dict(zip(chosen, items[len(chosen) :], strict=True))
    return t.builder.call(aten.constant_pad_nd.default, operand, [n for d in reversed(range(rank)) for n in (low.get(d, 0), high.get(d, 0))], value)


def _ints(t: Translator, value: ir.Value | None) -> list[int] | None:
    found = t.known(value)
    return None if found is None else found.ints()


def _object(x: Any) -> np.ndarray[Any, Any]:
    """An object array, also where numpy gave the one element itself."""
    if isinstance(x, np.ndarray):
        return x
    out = np.empty((), dtype=object)
    out[()] = x
    return out
