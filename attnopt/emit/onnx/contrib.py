"""Operators of ONNX Runtime's own domain, and a function of standard operators for each, with which any other runtime runs the file.

ONNX Runtime prefers its kernel to a function of the same name. Operands are packed as [B, S, H * D]. Facts about the kernels that nothing documents
stand in docs/decisions/0032-operators-of-onnx-runtime.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir import tape
from onnxscript import values

DOMAIN = "com.microsoft"
_FLOATS = ["tensor(float)", "tensor(float16)"]
_INPUTS = {
    "GroupQueryAttention": "query key value past_key past_value seqlens_k total_sequence_length cos_cache sin_cache position_ids attention_bias head_sink".split(),
    "MultiHeadAttention": "query key value bias key_padding_mask attention_bias".split(),
}
_OUTPUTS = {"GroupQueryAttention": ["output", "present_key", "present_value"], "MultiHeadAttention": ["output"]}
"""Without names for its present GroupQueryAttention takes half as long again."""
_INTEGERS = {"seqlens_k", "total_sequence_length", "position_ids"}
_REQUIRED = {"GroupQueryAttention": {"query", "seqlens_k", "total_sequence_length"}, "MultiHeadAttention": {"query"}}
_ATTRIBUTES = {
    "GroupQueryAttention": {"num_heads": "INT", "kv_num_heads": "INT", "scale": "FLOAT", "local_window_size": "INT"},
    "MultiHeadAttention": {"num_heads": "INT", "scale": "FLOAT"},
}


@cache
def operator(name: str) -> Any:
    """The operator, to be called with its inputs (None: left out) and attributes while torch.onnx translates a graph."""
    S = onnx.defs.OpSchema
    inputs = []
    for x in _INPUTS[name]:
        optional = x not in _REQUIRED[name]
        option = S.FormalParameterOption.Optional if optional else S.FormalParameterOption.Single
        inputs.append(S.FormalParameter(x, "tensor(int32)" if x in _INTEGERS else "T", param_option=option))
    attributes = [S.Attribute(n, getattr(S.AttrType, kind), required=n != "local_window_size") for n, kind in _ATTRIBUTES[name].items()]
    outputs = [S.FormalParameter(x, "T") for x in _OUTPUTS[name]]
    schema = S(name, DOMAIN, 1, inputs=inputs, outputs=outputs, type_constraints=[("T", _FLOATS, "")], attributes=attributes)
    return values.Op(values.Opset(DOMAIN, 1), name, schema)


def attach_functions(model: ir.Model, opset: int) -> None:
    """Give the model a function for each form in which it uses these operators. The first form of a name has no overload: not all tools know them."""
    forms: dict[str, list[_Form]] = {}
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN or node.op_type not in _INPUTS:
            continue
        form = _Form.of(node)
        known = forms.setdefault(node.op_type, [])
        if form not in known:
            known.append(form)
        node.overload = f"form{known.index(form)}" if known.index(form) else ""
    for name, known in forms.items():
        for i, form in enumerate(known):
            function = form.function(name, f"form{i}" if i else "", opset)
            model.functions[function.identifier()] = function
    if forms:
        model.opset_imports[DOMAIN] = 1


@dataclass(frozen=True)
class _Form:
    """Which inputs and attributes a node has: an absent one cannot be asked for inside a function."""

    inputs: frozenset[str]
    attributes: frozenset[str]

    @staticmethod
    def of(node: ir.Node) -> _Form:
        given = frozenset(n for n, x in zip(_INPUTS[node.op_type], node.inputs, strict=False) if x is not None)
        return _Form(given, frozenset(node.attributes))

    def function(self, name: str, overload: str, opset: int) -> ir.Function:
        body = _Body(_ATTRIBUTES[name], {x: ir.val(x) for x in _INPUTS[name]})
        grouped = name == "GroupQueryAttention"
        heads = {"q_num_heads": body.given("num_heads"), "kv_num_heads": body.given("kv_num_heads" if grouped else "num_heads"), "scale": body.given("scale")}
        if grouped:
            present = [body.heads_first(x, "kv_num_heads") for x in ("key", "value")]
            if "past_key" in self.inputs:
                present = [body.op("Concat", body.inputs[f"past_{x}"], new, axis=2) for x, new in zip(("key", "value"), present, strict=True)]
                for x, whole in zip(("key", "value"), present, strict=True):
                    body.whole[x] = body.op("Reshape", body.op("Transpose", whole, perm=[0, 2, 1, 3]), body.ints([0, 0, -1]))
            outputs = [self._grouped(body, heads), *present]
        else:
            outputs = [body.attention(self._bias(body), heads)]
        for x, value in zip(_OUTPUTS[name], outputs, strict=True):
            value.name = x
        graph = ir.Graph(list(body.inputs.values()), outputs, nodes=body.tape.nodes, opset_imports={"": opset}, name=name)
        attributes = [ir.Attr(n, ir.AttributeType[kind], None) for n, kind in _ATTRIBUTES[name].items() if n in self.attributes]
        return ir.Function(DOMAIN, name, overload, graph=graph, attributes=attributes)

    def _bias(self, body: _Body) -> ir.Value | None:
        return body.inputs["attention_bias"] if "attention_bias" in self.inputs else None

    def _grouped(self, body: _Body, heads: dict[str, Any]) -> ir.Value:
        """One mask of all that hides a key; a sink is one more key of zeros, whose additive mask is its logit."""
        op, bias = body.op, self._bias(body)
        rows, columns = op("Unsqueeze", body.positions("query"), body.ints([1])), op("Unsqueeze", body.positions("key"), body.ints([0]))
        if "past_key" in self.inputs:
            rows = op("Add", rows, op("Shape", body.inputs["past_key"], start=2, end=3))
        seen = op("LessOrEqual", columns, rows)  # [Sq, Skv]
        if "local_window_size" in self.attributes:
            seen = op("And", seen, op("Less", op("Sub", rows, columns), op("Constant", value_int=body.given("local_window_size"))))
        last = op("Unsqueeze", op("Cast", body.inputs["seqlens_k"], to=7), body.ints([1, 2, 3]))
        seen = op("And", seen, op("LessOrEqual", columns, last))  # [B, 1, Sq, Skv]
        if bias is None and "head_sink" not in self.inputs:
            return body.attention(seen, heads)
        zero, low = (op("CastLike", op("Constant", value_float=x), body.inputs["query"]) for x in (0.0, float("-inf")))
        mask = op("Where", seen, zero if bias is None else bias, low)
        return body.attention(self._with_sink(body, mask) if "head_sink" in self.inputs else mask, heads)

    def _with_sink(self, body: _Body, mask: ir.Value) -> ir.Value:
        op, sink = body.op, body.inputs["head_sink"]
        batch, rows = (op("Shape", body.inputs["query"], start=i, end=i + 1) for i in range(2))
        heads, columns = op("Shape", sink), op("Shape", body.operand("key"), start=1, end=2)
        for x in ("key", "value"):
            body.whole[x] = op("Pad", body.operand(x), body.ints([0, 0, 0, 0, 1, 0]))
        mask = op("Expand", mask, op("Concat", batch, heads, rows, columns, axis=0))
        column = op("Expand", op("Unsqueeze", sink, body.ints([0, 2, 3])), op("Concat", batch, heads, rows, body.ints([1]), axis=0))
        return op("Concat", mask, column, axis=3)


@dataclass
class _Body:
    """A function's nodes as they are written."""

    attributes: dict[str, str]
    inputs: dict[str, ir.Value]
    tape: tape.Tape = field(default_factory=tape.Tape)
    whole: dict[str, ir.Value] = field(default_factory=dict)
    """Keys and values of all, [B, S, H * D], where these are more than the inputs."""

    def operand(self, name: str) -> ir.Value:
        return self.whole.get(name, self.inputs[name])

    def op(self, name: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        given = {n: ir.RefAttr(n, a.ref_attr_name, a.type) if isinstance(a, ir.Attr) else a for n, a in attributes.items()}
        return self.tape.op(name, list(inputs), given)

    def given(self, name: str) -> ir.Attr:
        """The attribute of the node that calls the function."""
        return ir.RefAttr(name, name, ir.AttributeType[self.attributes[name]])

    def ints(self, x: Sequence[int]) -> ir.Value:
        return self.op("Constant", value_ints=list(x))

    def positions(self, name: str) -> ir.Value:
        """0, 1, ... for the tokens of the operand [B, S, H * D]."""
        length = self.op("Squeeze", self.op("Shape", self.operand(name), start=1, end=2))
        return self.op("Range", self.op("Constant", value_int=0), length, self.op("Constant", value_int=1))

    def heads_first(self, name: str, heads: str) -> ir.Value:
        """The input [B, S, H * D] as [B, H, S, D]."""
        zero, rest = self.ints([0, 0]), self.ints([-1])
        count = self.op("Unsqueeze", self.op("Constant", value_int=self.given(heads)), self.ints([0]))
        split = self.op("Reshape", self.inputs[name], self.op("Concat", zero, count, rest, axis=0))
        return self.op("Transpose", split, perm=[0, 2, 1, 3])

    def attention(self, mask: ir.Value | None, attributes: dict[str, Any]) -> ir.Value:
        q, k, v = (self.operand(x) for x in ("query", "key", "value"))
        return self.op("Attention", q, k, v, *(() if mask is None else (mask,)), **attributes)
