"""Reading FX nodes: operator names, arguments by schema name, shapes, element kinds, and where in the model they stand."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import fx

from attnopt.ir import dims
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.remarks.lines import frames_of, own_line


def op_name(node: fx.Node) -> str:
    """``aten::add`` and so on, without the overload; ``getitem`` for tuple access; empty for what is no operator call."""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name
    if node.target is operator.getitem:
        return "getitem"
    return ""


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by the name that the operator's schema gives them, defaults included."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return dict(node.kwargs)
    out: dict[str, Any] = {}
    for i, a in enumerate(target._schema.arguments):
        if i < len(node.args):
            out[a.name] = node.args[i]
        elif a.name in node.kwargs:
            out[a.name] = node.kwargs[a.name]
        elif a.has_default_value():
            out[a.name] = a.default_value
    return out


def value(node: fx.Node) -> Any:
    """The fake value that capture recorded for a node."""
    return node.meta.get("val")


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(value(node), torch.Tensor)


def shape(node: fx.Node) -> tuple[Expr, ...]:
    return dims.shape(value(node).shape)


def said(node: fx.Node) -> str:
    """A node for a sentence: its operator, dtype and shape, as in ``aten::softmax float32[2, 4, s0, s0]``."""
    known = {"placeholder": "the input", "get_attr": "the constant"}
    name = op_name(node) or (f"{known[node.op]} {node.target}" if node.op in known else str(getattr(node.target, "__name__", node.target)))
    if not is_tensor(node):
        return name
    return f"{name} {str(value(node).dtype).removeprefix('torch.')}[{', '.join(map(str, shape(node)))}]"


def kind_of(dtype: torch.dtype) -> E.Kind:
    if dtype is torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "int"


def kind(node: fx.Node) -> E.Kind:
    return kind_of(value(node).dtype)


def attribute(node: fx.Node) -> object:
    """What a get_attr node stands for; None where the graph's module has it no more."""
    found: object = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found


def is_parameter(node: fx.Node) -> bool:
    """Whether a node is a parameter of the model: by its value or, where torch.compile made it an input, by the name that it has there."""
    if node.op == "placeholder":
        return "_parameters_" in str(node.target)
    return node.op == "get_attr" and isinstance(attribute(node), torch.nn.Parameter)


def axis(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def scalar(x: Any) -> Expr | None:
    """A number argument (a Python number, or a node that holds a symbolic size) as an expression."""
    if isinstance(x, fx.Node):
        x = value(x)
    if isinstance(x, (bool, int, float)):
        return E.const(x)
    if isinstance(x, torch.SymInt):
        return dims.size(x)
    return None


def source(node: fx.Node) -> str:
    """file:line of the innermost frame of the model's own code that made the node; empty when unknown."""
    return own_line(frames_of(node.meta.get("stack_trace") or ""))


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that the node was made in, as in ``model.layers.0.self_attn``."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
    return _clean_path(paths[-1]) if paths else ""


def _clean_path(path: str) -> str:
    path = path.removeprefix("L['self']").lstrip(".")
    path = re.sub(r"\._modules\['([^']+)'\]|\[['\"]?([^'\"\]]+)['\"]?\]", lambda m: "." + (m.group(1) or m.group(2)), path)
    path = re.sub(r"@\d+", "", path)
    return path.lstrip(".")
