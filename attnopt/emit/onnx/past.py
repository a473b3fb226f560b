"""GroupQueryAttention that takes keys and values of earlier tokens and gives those of all: nothing is joined outside of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from attnopt.emit.onnx.lower import Lowering


@dataclass(frozen=True)
class Past:
    """``key`` [B, Hkv, P, D] and ``value`` are inputs of the model, ``new_key`` [B, Hkv, S, D] and ``new_value`` stand behind them in ``keys`` and ``values``."""

    key: ir.Value
    value: ir.Value
    new_key: ir.Value
    new_value: ir.Value
    keys: ir.Value
    values: ir.Value

    @staticmethod
    def of(q: ir.Value, k: ir.Value, v: ir.Value) -> Past | None:
        """Of an attention's operands [B, H, S, D]; None where keys and values are not an input and, behind it, one of each query."""
        keys, values = _joined(k), _joined(v)
        if keys is None or values is None or not _known(q) or any(not _known(x) or x.shape[2] != q.shape[2] for x in (keys[1], values[1])):
            return None
        return Past(keys[0], values[0], keys[1], values[1], keys[2], values[2])


def _joined(x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """An input, what is put behind it along the tokens, and the whole, which ``x`` is too: through views that keep the order of all axes but those of size 1."""
    whole = _whole(x)
    node = None if whole is None else whole.producer()
    if whole is None or node is None or len(node.inputs) != 2 or node.attributes["axis"].as_int() not in (2, -2):
        return None
    before, new = node.inputs
    while before is not None and (p := before.producer()) is not None and p.op_type == "Identity":
        before = p.inputs[0]
    if before is None or new is None or not before.is_graph_input():
        return None
    return before, new, whole


def _whole(x: ir.Value) -> ir.Value | None:
    """The result of a Concat that ``x`` [B, H, S, D] is a view of, with its own shape and order; None where there is none."""
    wanted, order = x.shape, _wide(x)
    while (node := x.producer()) is not None and node.op_type != "Concat":
        source = node.inputs[0] if node.inputs else None
        if source is None or not (_known(source) and _known(x)):
            return None
        if node.op_type == "Transpose":
            perm = node.attributes["perm"].as_ints()
            from_axis = dict(zip((perm[d] for d in _wide(x)), order, strict=True))
            order = [from_axis[d] for d in _wide(source)]
        elif node.op_type == "Reshape":  # to and from axes of size 1
            if [source.shape[d] for d in _wide(source)] != [x.shape[d] for d in _wide(x)]:
                return None
        elif node.op_type == "Gather":  # of the only place on an axis
            if source.shape[node.attributes["axis"].as_int()] != 1 or len(x.shape) != len(source.shape) - 1:
                return None
        elif node.op_type != "Identity":
            return None
        x = source
    return x if node is not None and x.shape == wanted and order == _wide(x) else None


def _known(x: ir.Value) -> bool:
    """Whether all sizes have a number or a name: those without are equal to none."""
    return x.shape is not None and all(isinstance(d, int) or d.value is not None for d in x.shape)


def _wide(x: ir.Value) -> list[int]:
    """The axes that are not of size 1."""
    assert x.shape is not None
    return [d for d, n in enumerate(x.shape) if n != 1]


@dataclass
class PastLowering(Lowering):
    """k and v are the new ones, [B, Hkv, Sq, D]; ``joins`` gets what is left to do when the model is whole: values that are an output of the operator too, with that output."""

    past: Past | None = None
    joins: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def _keys(self) -> Any:
        assert self.past is not None
        return self.op.Add(self.op.Shape(self.past.key, start=2, end=3), self.op.Shape(self.k, start=2, end=3))

    def _past(self) -> tuple[Any, Any]:
        assert self.past is not None
        return self.past.key, self.past.value

    def _present(self, key: Any, value: Any) -> None:
        assert self.past is not None
        for made, old in ((key, self.past.keys), (value, self.past.values)):
            made.dtype, made.shape = old.dtype, old.shape
            self.joins.setdefault(old, made)
        self.k, self.v = key, value  # rows without a key are an average of all


def join(model: ir.Model, joins: Mapping[ir.Value, ir.Value]) -> None:
    """Let whoever reads joined keys and values read the operator's; what nobody reads then goes."""
    for old, made in joins.items():
        producer, name = old.producer(), old.name
        assert producer is not None
        if old.is_graph_output():
            old.name, made.name = f"{name}_joined", name
        ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
        model.graph.remove(producer, safe=True)
    model.graph.sort()
