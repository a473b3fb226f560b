"""The graph verifier: run after every pass, so that a broken graph names the pass that broke it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attnopt.ir.expr import OPERATIONS
from attnopt.ir.spec import AttentionSpec

Rule = Callable[[fx.GraphModule, fx.Node], str | None]


def check(module: fx.GraphModule) -> list[str]:
    """All violations of the graph's rules, one sentence each; empty for a valid graph."""
    found: list[str] = []
    try:
        module.graph.lint()
    except RuntimeError as e:
        found.append(f"the graph is malformed: {e}")
    for node in module.graph.nodes:
        for rule in RULES:
            problem = rule(module, node)
            if problem:
                found.append(f"{node.name}: {problem}")
    return found


def _has_value(module: fx.GraphModule, node: fx.Node) -> str | None:
    if node.op == "call_function" and "val" not in node.meta and not isinstance(node.target, torch._ops.HigherOrderOperator):
        return "no recorded value (meta['val'])"
    return None


def _attention(module: fx.GraphModule, node: fx.Node) -> str | None:
    if node.op != "call_function" or getattr(node.target, "__module__", "") is None or str(node.target) != "attnopt.attention.default":
        return None
    spec = AttentionSpec.from_json(str(node.args[5]))
    loads, sizes = node.args[3], node.args[4]
    assert isinstance(loads, (list, tuple)) and isinstance(sizes, (list, tuple))
    if len(loads) != len(spec.loads):
        return f"{len(loads)} loads for a spec of {len(spec.loads)}"
    if len(sizes) != len(spec.sizes):
        return f"{len(sizes)} sizes for a spec of {len(spec.sizes)}"
    q, k, v = (a.meta["val"] for a in node.args[:3] if isinstance(a, fx.Node))
    if not q.dim() == k.dim() == v.dim() == 4:
        return f"operands of rank {q.dim()}, {k.dim()}, {v.dim()}; all must be 4"
    given = [a is not None for a in (node.kwargs.get("counts"), node.kwargs.get("indices"))]
    block_sizes = node.kwargs.get("block_sizes") or ()
    assert isinstance(block_sizes, (list, tuple))
    if given != [len(block_sizes) == 2] * 2:
        return "a map of blocks is counts, indices and two block sizes, all or none of them"
    tables: Any = node.kwargs.get("tables") or ()
    if any(x.meta["val"].dim() not in (1, 2) or x.meta["val"].dtype != torch.float32 for x in tables):
        return "a table over distances is float32 [Hq, distances] or [distances]"
    for program in spec.programs:
        for x in program.leaves:
            if x.op == "load" and (x.value >= len(loads) or len(x.args) != loads[x.value].meta["val"].dim()):
                return f"{x} does not fit its tensor"
    return None


def _known_operations(module: fx.GraphModule, node: fx.Node) -> str | None:
    if str(node.target) != "attnopt.attention.default":
        return None
    spec = AttentionSpec.from_json(str(node.args[5]))
    stack = list(spec.programs)
    while stack:
        x = stack.pop()
        if x.args and x.op not in OPERATIONS and x.op != "load":
            return f"unknown operation {x.op} in the spec"
        stack.extend(x.args)
    return None


RULES: tuple[Rule, ...] = (_has_value, _attention, _known_operations)
