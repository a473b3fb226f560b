"""Products of groups of rows with a matrix of each group, as mixtures of experts have them, in standard operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch


def table(op: Any) -> dict[Any, Any]:
    """Translations of the operators of that kind that are registered and that torch.onnx does not know, by operator.

    A library registers its own where PyTorch's has no kernel for the dtype under export.
    """
    found = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return {} if found is None else {found.default: lambda x, weight, offs: grouped(op, x, weight, offs)}


def grouped(op: Any, x: Any, weight: Any, offs: Any) -> Any:
    """x [S, K], weight [E, K, N], offs int [E]: row i of [S, N] is that of x times ``weight[e]``, e the first with ``i < offs[e]``, and zero where there is none.

    One product for each expert, over its rows alone: nothing is computed twice, and no matrix is copied for a row.
    """
    first = [op.Constant(value=ir.tensor(np.array([n], dtype=np.int64))) for n in range(int(weight.shape[0]) + 1)]
    ends = op.Cast(offs, to=7)
    parts, start = [], first[0]
    for e in range(int(weight.shape[0])):
        end = op.Gather(ends, first[e])
        parts.append(op.MatMul(op.Slice(x, start, end, first[0]), op.Squeeze(op.Gather(weight, first[e]), first[0])))
        start = end
    rest = op.Sub(op.Shape(x, start=0, end=1), start)
    zeros = op.Expand(op.CastLike(op.Constant(value=ir.tensor(np.zeros((1, 1), dtype=np.float32))), x), op.Concat(rest, op.Shape(weight, start=2, end=3), axis=0))
    return op.Concat(*parts, zeros, axis=0)
