"""``x / sqrt(mean(x * x) + epsilon) * weight`` over the last axis as one RMSNormalization (in the standard since opset 23).

Six passes over x become one. Only where each value between is read by the next one alone, epsilon is a number of the file, and the weight is a vector of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir


def join_norms(model: ir.Model) -> int:
    """Join all of the main graph; gives how many there were."""
    joined = 0
    for node in list(model.graph):
        found = _weighted(node)
        if found is None:
            continue
        x, weight, epsilon, inner = found
        made = ir.node("RMSNormalization", [x, weight], {"axis": -1, "epsilon": epsilon})
        out, new = node.outputs[0], made.outputs[0]
        new.name, new.type, new.shape = out.name, out.type, out.shape
        new.metadata_props.update(out.metadata_props)
        model.graph.insert_before(node, made)
        out.name = None
        ir.convenience.replace_all_uses_with(out, new, replace_graph_outputs=True)
        model.graph.remove([node, *inner], safe=True)
        joined += 1
    return joined


def _weighted(node: ir.Node) -> tuple[ir.Value, ir.Value, float, list[ir.Node]] | None:
    """x, the weight, epsilon and the nodes between, the last of them first."""
    for weight, normalised in _factors(node):
        if weight.shape is None or len(weight.shape) != 1 or not weight.is_initializer() or weight.is_graph_input():
            continue
        for x, inverse in _factors(_only(normalised, "Mul")):
            chain = [_only(inverse, "Reciprocal")]
            for op_type in ("Sqrt", "Add"):
                chain.append(_only(_input(chain[-1]), op_type))
            mean, epsilon = _mean_and_epsilon(chain[-1])
            square = _only(_input(mean), "Pow")
            nodes = [n for n in (normalised.producer(), *chain, mean, square) if n is not None]
            if len(nodes) < 6 or epsilon is None or id(_input(square)) != id(x) or _number(square, 1) != 2.0:
                continue
            if x.dtype is weight.dtype is ir.DataType.FLOAT and x.shape is not None and x.shape[-1] == weight.shape[0]:
                return x, weight, epsilon, nodes
    return None


def _factors(node: ir.Node | None) -> Iterator[tuple[ir.Value, ir.Value]]:
    if node is not None and node.op_type == "Mul" and node.domain == "":
        a, b = node.inputs
        if a is not None and b is not None:
            yield a, b
            yield b, a


def _only(x: ir.Value | None, op_type: str) -> ir.Node | None:
    """What makes ``x``, where that is of this type and one node alone reads it."""
    node = None if x is None else x.producer()
    if x is None or node is None or node.op_type != op_type or node.domain != "" or x.is_graph_output() or len(x.uses()) != 1:
        return None
    return node


def _input(node: ir.Node | None) -> ir.Value | None:
    return None if node is None else node.inputs[0]


def _number(node: ir.Node | None, i: int) -> float | None:
    """An input that is a constant of one element."""
    x = None if node is None else node.inputs[i]
    held = None if x is None or x.is_graph_input() else ir.convenience.get_const_tensor(x)
    return float(held.numpy().item()) if held is not None and held.size == 1 else None


def _mean_and_epsilon(node: ir.Node | None) -> tuple[ir.Node | None, float | None]:
    """Of ``mean + epsilon``: the mean over the last axis, which stays."""
    if node is None:
        return None, None
    for i in (0, 1):
        mean = _only(node.inputs[i], "ReduceMean")
        if mean is not None and len(mean.inputs) == 2 and mean.inputs[1] is not None:
            axes, kept = ir.convenience.get_const_tensor(mean.inputs[1]), mean.attributes.get("keepdims")
            if axes is not None and np.array_equal(axes.numpy(), [-1]) and (kept is None or kept.as_int() == 1):
                return mean, _number(node, 1 - i)
    return None, None
