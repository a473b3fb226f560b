"""Constant tensors as formulas of their index, proven by comparing every entry.

Known: one value everywhere; a linear function of the last one or two axes, or its absolute value (``arange``, distances);
two-valued planes that depend only on the diagonal (triangles, bands); and a slope for each plane times a position or a
distance (ALiBi), with -inf on some of the diagonals or not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.analysis.views import Index
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

_LARGEST = 1 << 26
"""Entries beyond which a tensor is not read through."""
_STRETCHES = 4
"""Stretches of diagonals of one value that a formula may have: a band inside a band has five ends."""


def fold(tensor: Tensor, index: Index, source: object = None) -> Expr | None:
    """The tensor's element at ``index`` as a formula; None when none is known. ``source`` is what a load of the tensor names."""
    if tensor.numel() == 0 or tensor.numel() > _LARGEST or tensor.dtype.is_complex:
        return None
    tensor = tensor.detach()
    first = tensor.flatten()[0]
    if bool((tensor == first).all()):
        return E.const(first.item())
    if any(n != 1 for n in tensor.shape[:-2]):
        return _slopes(tensor, index, source) if tensor.is_floating_point() and tensor.dim() >= 3 else None
    plane = tensor.reshape(tensor.shape[-2:]) if tensor.dim() >= 2 else tensor.reshape(1, -1)
    row, column = (index[-2] if tensor.dim() >= 2 else E.ZERO), index[-1]
    if tensor.dtype is not torch.bool:
        found = _linear(plane, row, column)
        if found is not None:
            return found
    return _diagonals(plane, row, column) if min(plane.shape) > 1 else None


def _linear(plane: Tensor, row: Expr, column: Expr) -> Expr | None:
    """start + down * i + right * j with whole numbers, or its absolute value."""
    start = float(plane[0, 0])
    down = float(plane[1, 0]) - start if plane.shape[0] > 1 else 0.0
    right = float(plane[0, 1]) - start if plane.shape[1] > 1 else 0.0
    i = torch.arange(plane.shape[0], device=plane.device, dtype=torch.float64)[:, None]
    j = torch.arange(plane.shape[1], device=plane.device, dtype=torch.float64)[None, :]
    # an absolute value falls along the first row and rises down the first column, or the other way round
    for a, b, sign in ((down, right, 0), (down, -down, 1), (down, -down, -1)):
        if not all(x.is_integer() for x in (a, b, start)):
            continue
        values = a * i + b * j + start
        if sign:
            values = sign * values.abs()
        if bool((plane.double() == values).all()):
            x = E.add(E.const(int(start)), E.mul(E.const(int(a)), row), E.mul(E.const(int(b)), column))
            x = E.mul(E.const(sign), E.absolute(x)) if sign else x
            return E.as_float(x) if plane.dtype.is_floating_point else x
    return None


def _slopes(tensor: Tensor, index: Index, source: object) -> Expr | None:
    """A slope per plane times j, j - i or |j - i|; the slope is read from the tensor itself, where that factor is one."""
    hidden = tensor == -torch.inf
    if bool(hidden.any()):
        planes = hidden.reshape(-1, *tensor.shape[-2:])
        where = fold(planes[0], index[-2:]) if bool((planes == planes[0]).all()) else None
        shown = None if where is None else _slopes(torch.where(hidden, torch.nan, tensor), index, source)
        return None if where is None or shown is None else E.where(where, E.const(-torch.inf), shown)
    rows, columns = tensor.shape[-2:]
    i = torch.arange(rows, device=tensor.device)[:, None]
    j = torch.arange(columns, device=tensor.device)[None, :]
    row, column = index[-2], index[-1]
    factors = [(j.expand(rows, columns), column, (0, 1))] if columns > 1 else []
    if rows > 1:
        factors += [(j - i, E.sub(column, row), (0, 1)), (i - j, E.sub(row, column), (1, 0)), ((j - i).abs(), E.absolute(E.sub(column, row)), (1, 0))]
    for factor, expr, one in factors:
        slope = tensor[..., one[0] : one[0] + 1, one[1] : one[1] + 1] if one[0] < rows and one[1] < columns else tensor[..., :0, :0]
        product = slope * factor.to(tensor.dtype) if slope.numel() else slope
        if slope.numel() and bool((slope.isfinite()).all()) and bool(((product == tensor) | tensor.isnan()).all()):
            at = tuple(E.ZERO if n == 1 else x for x, n in zip(index[:-2], tensor.shape[:-2], strict=True))
            return E.mul(E.load(source, (*at, *map(E.const, one)), "float"), E.as_float(expr))
    return None


def _diagonals(plane: Tensor, row: Expr, column: Expr) -> Expr | None:
    """One of two values by j - i alone."""
    rows, columns = plane.shape
    # the first row and the first column hold one entry of every diagonal, from the lowest to the highest
    line = torch.cat([plane[1:, 0].flip(0), plane[0]])
    values = torch.unique(line)
    if len(values) != 2 or bool(values.isnan().any() if values.is_floating_point() else False):
        return None
    diagonal = torch.arange(columns, device=plane.device)[None, :] - torch.arange(rows, device=plane.device)[:, None]
    if not torch.equal(line[diagonal + rows - 1], plane):
        return None
    ends = (torch.nonzero(line[1:] != line[:-1]).flatten() - rows + 2).tolist()  # the first diagonal of each new stretch
    if len(ends) > _STRETCHES:
        return None
    below, other = line[0].item(), next(v.item() for v in values if bool(v != line[0]))
    d = E.sub(column, row)
    # the stretches alternate, and the first has no lower end
    bounds = [None, *(E.const(int(e)) for e in ends), None]
    stretches = [E.all_of(*([] if lo is None else [E.ge(d, lo)]), *([] if hi is None else [E.lt(d, hi)])) for lo, hi in zip(bounds[::2], bounds[1::2], strict=False)]
    return E.where(E.any_of(*stretches), E.const(below), E.const(other))
