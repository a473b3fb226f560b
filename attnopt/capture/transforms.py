"""Function transforms of torch.func that are left in a captured graph, as calls that begin and end them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from attnopt.errors import CaptureError
from attnopt.remarks.lines import frames_of, own_line


def without_transforms(program: ExportedProgram) -> ExportedProgram:
    """``program``; raises CaptureError where a transform is left in it.

    The tensors between its begin and its end have a hidden axis, and no node says so: such a graph runs, and cannot be rewritten.
    """
    if any(is_transform(n) for n in program.graph.nodes):
        raise CaptureError(f"{odd_operators(program.graph_module)[0]} stand in the graph; supported are ATen operators")
    return program


def is_transform(node: fx.Node) -> bool:
    return node.op == "call_function" and "functorch" in str(getattr(node.target, "__module__", ""))


def odd_operators(gm: fx.GraphModule) -> tuple[str, str]:
    """The operators of a graph that are no functions of tensors alone, by name, and the line of the first whose line is known."""
    odd: list[Any] = [n for n in gm.graph.nodes if is_transform(n) or (n.op == "call_function" and isinstance(n.target, torch._ops.HigherOrderOperator))]
    names = sorted({str(getattr(n.target, "__name__", n.target)) for n in odd})
    return ", ".join(names), next(filter(None, (own_line(frames_of(n.meta.get("stack_trace") or "")) for n in odd)), "")
