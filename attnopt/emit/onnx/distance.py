"""A value of each distance k - q as one of each query and key.

Where a tensor is read by the distance (a relative bias through buckets, say), what a program computes is the same along every diagonal: it is evaluated once for each
of the Sq + Skv - 1 distances, and a query's row is a stretch of these. Rows are put together from stretches of ``BLOCK`` neighbours, since ONNX Runtime copies element by
element what it gathers: at 2048 queries, keys and eight heads that takes 35 ms, where elements by themselves take 260 ms and Expand, Reshape and Slice 60 ms.
"""

from __future__ import annotations

from typing import Any

from attnopt.ir import expr as E
from attnopt.kernels.materialise import DISTANCE, Part, by_distance

BLOCK = 16


def read_by_distance(e: E.Expr) -> Part | None:
    """``e`` as a function of k - q and the head in which a tensor is read at a place that depends on the distance; None where it is not one.

    Anything else is as fast for each query and key: a product of a slope and the distance is written once, and so is a table's row.
    """
    if E.score() in e.leaves or not any(x.op == "load" and x.args for x in E.postorder(e)):
        return None
    part = by_distance(e)
    if part is None or not any(x.op == "load" and any(DISTANCE in a.leaves for a in x.args) for x in E.postorder(part.expr)):
        return None
    return part


class Diagonals:
    """Queries and keys of which there are ``Sq`` and ``Skv``, int64 scalars of ``op`` (an onnxscript opset)."""

    def __init__(self, op: Any, Sq: Any, Skv: Any, constant: Any) -> None:
        self.op, self.constant, self.Sq, self.Skv = op, constant, Sq, Skv
        self.blocks = op.Div(op.Add(Skv, constant(BLOCK - 1)), constant(BLOCK))
        self.width = op.Mul(self.blocks, constant(BLOCK))

    def distances(self) -> Any:
        """[1, 1, 1, L]: 1 - Sq, ..., Skv - 1 and on, up to a whole number of blocks."""
        op, c = self.op, self.constant
        return op.Unsqueeze(op.Range(op.Sub(c(1), self.Sq), self.width, c(1)), c([0, 1, 2]))

    def spread(self, x: Any) -> Any:
        """[1, H, 1, L] of the distances as [1, H, Sq, Skv]."""
        op, c = self.op, self.constant
        starts = op.Range(c(0), op.Sub(op.Add(self.Sq, self.width), c(BLOCK)), c(1))
        stretches = op.Gather(x, op.Add(op.Unsqueeze(starts, c([1])), c(list(range(BLOCK)))), axis=3)  # [1, H, 1, starts, BLOCK]
        first = op.Range(op.Sub(self.Sq, c(1)), c(-1), c(-1))  # of each query, the place of the distance to key 0
        columns = op.Mul(op.Range(c(0), self.blocks, c(1)), c(BLOCK))
        rows = op.Gather(stretches, op.Add(op.Unsqueeze(first, c([1])), columns), axis=3)  # [1, H, 1, Sq, blocks, BLOCK]
        whole = op.Reshape(rows, op.Concat(c([0, 0]), op.Unsqueeze(self.Sq, c([0])), c([-1]), axis=0))
        return op.Slice(whole, c([0]), op.Unsqueeze(self.Skv, c([0])), c([3]))
