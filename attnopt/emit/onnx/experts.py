"""Products of groups of rows with a matrix of each group, as mixtures of experts have them, in standard operators.

Each matrix meets its own rows alone, in one MatMul: nothing is computed twice, and no matrix is copied for a row. It is an operand that ONNX Runtime prepares when it loads a file,
which a matrix that is chosen in a run (by Gather, or by the turn of a Loop) is not. Why: docs/decisions/0046-experts-by-groups.md.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """x [S, K], weight [E, K, N], offs int [E]: row i of [S, N] is that of x times ``weight[e]``, e the first with ``i < offs[e]``, and zero where there is none."""
    ends = op.Cast(offs, to=7)
    behind = op.Sub(op.Shape(x, start=0, end=1), op.Gather(ends, vector(op, int(weight.shape[0]) - 1)))
    width = op.Shape(weight, start=2, end=3)
    zeros = op.Expand(op.CastLike(op.Constant(value=ir.tensor(np.zeros((1, 1), dtype=np.float32))), x), op.Concat(behind, width, axis=0))
    return op.Concat(*products(op, x, weight, ends), zeros, axis=0)


def products(op: Any, x: Any, weight: Any, ends: Any) -> list[Any]:
    """x [S, K], weight [E, K, N], ends int64 [E], which rises: for each e the rows of x from ``ends[e - 1]`` (or 0) to ``ends[e]``, times ``weight[e]``."""
    count, first = int(weight.shape[0]), vector(op, 0)
    parts, start = [], first
    for matrix, end in zip(_pieces(op, weight, count), _pieces(op, ends, count), strict=True):
        parts.append(op.MatMul(op.Slice(x, start, end, first), op.Squeeze(matrix, first)))
        start = end
    return parts


def _pieces(op: Any, x: Any, count: int) -> Sequence[Any]:
    """``count`` equal pieces by the first axis: one node, where a Gather for each would have ONNX Runtime copy weights ``count`` times while it loads."""
    made = op.Split(x, axis=0, num_outputs=count)
    return made if count > 1 else [made]


def vector(op: Any, *numbers: int) -> Any:
    return op.Constant(value=ir.tensor(np.array(numbers, dtype=np.int64)))
