"""Brings the bodies of ``torch.no_grad`` regions into the main graph.

Export keeps such a region as a submodule under a higher-order operator. A region without gradients computes the same as
its body on detached inputs, and that is one flat graph, which every later stage reads without a special case.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

SET_GRAD = "wrap_with_set_grad_enabled"
AUTOCAST = "wrap_with_autocast"


def inline_regions(gm: fx.GraphModule) -> int:
    """Inline in place; returns how many regions there were. Regions that turn gradients or autocast *on* stay."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        name = node.target.name()
        if name == SET_GRAD:
            enabled, body, *operands = node.args
            if enabled is True and torch.is_grad_enabled() is False:
                continue
            detach = enabled is False
        elif name == AUTOCAST:
            device_type, _dtype, enabled, _cache, body, *operands = node.args
            if enabled is not False or torch.is_autocast_enabled(device_type):
                continue
            detach = False
        else:
            continue
        if _inline(gm, node, body, operands, detach):
            count += 1
    if count:
        gm.graph.lint()
        gm.recompile()
    return count


def _inline(gm: fx.GraphModule, node: fx.Node, body: fx.Node, operands: list[fx.node.Argument], detach: bool) -> bool:
    region = getattr(gm, str(body.target))
    with torch.set_grad_enabled(not detach):
        inline_regions(region)
    if any(n.op == "get_attr" for n in region.graph.nodes):
        return False  # a region that was left standing inside: its submodule belongs to this one
    value: dict[fx.Node, fx.node.Argument] = {}
    with gm.graph.inserting_before(node):
        given = iter(operands)
        for inner in region.graph.nodes:
            if inner.op == "placeholder":
                operand = next(given)
                value[inner] = _detached(gm, node, operand) if detach else operand
            elif inner.op == "output":
                results = inner.args[0]
            else:
                value[inner] = gm.graph.node_copy(inner, lambda n: value[n])
    def result(x: fx.node.Argument) -> fx.node.Argument:
        return value[x] if isinstance(x, fx.Node) else x

    for user in list(node.users):
        assert user.target is operator.getitem, f"{node.name} is used as a whole by {user.name}"
        new = result(results[user.args[1]])
        if isinstance(new, fx.Node):
            user.replace_all_uses_with(new)
        else:
            _replace_constant(user, new)
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    if not body.users:
        gm.graph.erase_node(body)
        delattr(gm, str(body.target))
    return True


def _replace_constant(node: fx.Node, value: fx.node.Argument) -> None:
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: value if n is node else n)


def _detached(gm: fx.GraphModule, region: fx.Node, operand: fx.node.Argument) -> fx.node.Argument:
    if not isinstance(operand, fx.Node):
        return operand
    val = operand.meta.get("val")
    if not isinstance(val, torch.Tensor) or not (val.is_floating_point() or val.is_complex()):
        return operand
    new = gm.graph.call_function(torch.ops.aten.detach.default, (operand,))
    new.meta = {k: v for k, v in region.meta.items() if k in ("stack_trace", "nn_module_stack", "source_fn_stack")}
    new.meta["val"] = val.detach()
    return new
