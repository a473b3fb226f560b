"""Nodes written one by one: what an opset of onnxscript is while torch.onnx translates, a tape is in a file or in the body of a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir


class Tape(ir.tape.Tape):  # type: ignore[misc]
    """``tape.MatMul(a, b)`` is a new node's result."""

    nodes: Sequence[ir.Node]

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        return lambda *inputs, **attributes: self.op(op_type, inputs, attributes)

    def Shape(self, x: ir.Value, start: int = 0, end: int | None = None) -> ir.Value:
        return self.op("Shape", [x], {"start": start} if end is None else {"start": start, "end": end})

    def Split(self, x: ir.Value, axis: int = 0, num_outputs: int = 1) -> Sequence[ir.Value] | ir.Value:
        made = self.op_multi_out("Split", [x], {"axis": axis, "num_outputs": num_outputs}, num_outputs=num_outputs)
        return made if num_outputs > 1 else made[0]

    def named(self, prefix: str) -> list[ir.Node]:
        """All nodes, named after ``prefix`` with their results."""
        for i, node in enumerate(self.nodes):
            node.name = f"{prefix}/{node.op_type}_{i}"
            for j, x in enumerate(node.outputs):
                x.name = f"{node.name}/{j}"
        return list(self.nodes)
