"""``x[i] @ weight[chosen[i]]`` for each row, spelled as a matrix gathered for each row and a batched product, as products of groups of rows.

A gathered matrix for each row is a copy of it: for a prompt that takes most of the time and gigabytes. Rows are sorted by their choice, each matrix meets its own, and the results go back to their places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attnopt.emit.onnx.experts import products, vector
from attnopt.emit.onnx.tape import Tape

MOST_GROUPS = 256
"""A node for each group, also for those without rows: some 0.6 us."""
LEAST_NUMBERS = 1024
"""Of a matrix. Smaller ones are tables rather than layers."""


@dataclass(frozen=True)
class _Product:
    """``rows`` [S, 1, K] times ``weight[choice]`` [S, K, N], or, with ``axis`` 2, ``weight[choice]`` [S, N, K] times ``rows`` [S, K, 1]. ``choice`` is [S] or [S, 1]."""

    rows: ir.Value
    weight: ir.Value
    choice: ir.Value
    axis: int


@dataclass(frozen=True)
class _Order:
    """int64 [S] which sorts rows by their choice, its inverse, and [E]: where each group's rows end."""

    sort: ir.Value
    back: ir.Value
    ends: ir.Value


def by_groups(model: ir.Model) -> int:
    """Rewrite all such products of the main graph whose matrices are weights of the file; gives how many there were."""
    orders: dict[tuple[ir.Value, int], _Order] = {}
    done = 0
    for node in list(model.graph):
        found = _matched(node)
        if found is None:
            continue
        tape, out = Tape(), node.outputs[0]
        axis, key, weight = vector(tape, found.axis), (found.choice, _size(found.weight, 0)), found.weight
        order = orders.get(key) or _order(tape, *key)
        orders[key] = order
        if found.axis == 2:
            weight = tape.Transpose(weight, perm=[0, 2, 1])
            weight.shape = ir.Shape([found.weight.shape[i] for i in (0, 2, 1)])
        rows = tape.Gather(tape.Squeeze(found.rows, axis), order.sort)
        sorted_rows = tape.Concat(*products(tape, rows, weight, order.ends), axis=0)
        new = tape.Unsqueeze(tape.Gather(sorted_rows, order.back), axis)
        new.type, new.shape = out.type, out.shape
        model.graph.insert_before(node, tape.named(f"attnopt/groups/{done}"))
        new.name, out.name = out.name, None
        ir.convenience.replace_all_uses_with(out, new, replace_graph_outputs=True)
        gathered = next(x.producer() for x in node.inputs if x is not None and x is not found.rows)
        model.graph.remove([node, gathered], safe=True)
        done += 1
    return done


def _order(tape: Tape, choice: ir.Value, count: int) -> _Order:
    """An index outside of [-count, count) belongs to no group, so that fewer rows come out and the last Gather fails, as the original's does."""
    c = vector
    ids = tape.Cast(tape.Reshape(choice, c(tape, -1)), to=7)
    ids = tape.Where(tape.Less(ids, c(tape, 0)), tape.Add(ids, c(tape, count)), ids)
    size = tape.Shape(ids, 0, 1)
    _, sort = tape.op_multi_out("TopK", [ids, size], {"axis": 0, "largest": 0, "sorted": 1}, num_outputs=2)
    zero, one = (tape.Constant(value=ir.tensor(np.array(n, dtype=np.int64))) for n in (0, 1))
    back = tape.ScatterElements(sort, sort, tape.Range(zero, tape.Squeeze(size), one), axis=0)
    groups = tape.Constant(value=ir.tensor(np.arange(count, dtype=np.int64)[:, None]))
    sizes = tape.ReduceSum(tape.Cast(tape.Equal(tape.Unsqueeze(ids, c(tape, 0)), groups), to=7), c(tape, 1), keepdims=0)
    return _Order(sort, back, tape.CumSum(sizes, c(tape, 0)))


def _matched(node: ir.Node) -> _Product | None:
    if node.op_type != "MatMul" or node.domain != "":
        return None
    for i, axis in ((1, 1), (0, 2)):
        rows, found = node.inputs[1 - i], _chosen(node.inputs[i])
        if found is None or rows is None or rows.shape is None or len(rows.shape) != 3 or rows.shape[axis] != 1:
            continue
        weight, choice = found
        if choice.shape is not None and _same(rows.shape[0], choice.shape[0]):
            return _Product(rows, weight, choice, axis)
    return None


def _chosen(x: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """The weight [E, ., .] and the choice, of which ``x`` is ``weight[choice]`` [S, ., .] for one product alone."""
    node = None if x is None else x.producer()
    if x is None or node is None or node.domain != "" or x.is_graph_output() or len(x.uses()) != 1:
        return None
    weight, choice = (node.inputs[0], node.inputs[1]) if node.op_type in ("Gather", "GatherND") else (None, None)
    if weight is None or choice is None or not _is_weight(weight) or choice.shape is None:
        return None
    if node.op_type == "Gather":
        axis = node.attributes.get("axis")
        return (weight, choice) if len(choice.shape) == 1 and (axis is None or axis.as_int() == 0) else None
    batch = node.attributes.get("batch_dims")
    return (weight, choice) if len(choice.shape) == 2 and choice.shape[1] == 1 and (batch is None or batch.as_int() == 0) else None


def _is_weight(x: ir.Value) -> bool:
    if not x.is_initializer() or x.is_graph_input() or x.shape is None or len(x.shape) != 3 or not x.shape.is_static():
        return False
    return _size(x, 0) <= MOST_GROUPS and _size(x, 1) * _size(x, 2) >= LEAST_NUMBERS


def _size(x: ir.Value, axis: int) -> int:
    assert x.shape is not None
    return int(x.shape[axis])


def _same(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    return a == b and (isinstance(a, int) or a.value is not None)
