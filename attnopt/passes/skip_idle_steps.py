"""Steps of a serving model that give back what they are given: a cast to its own dtype, a dropout that is off, ``x + 0``, ``x * 1``.

Such a model stays in the dtype and on the device that it was made for, and is not trained. Any other may be moved, and then a cast does something. Each step takes the host two to four
microseconds, and a small decoder has a fifth of these among its steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.insert_kv_cache import PLAN
from attnopt.passes.raise_attention import SITE

_NAMES = ("aten::to", "aten::dropout", "aten::detach", "aten::add", "aten::mul")


@dataclass(frozen=True)
class SkipIdleSteps:
    name: str = "skip-idle-steps"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        idle = [n for n in module.graph.nodes if SITE not in n.meta and is_idle(n)] if PLAN in module.meta else []
        for node in idle:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        return PassResult(bool(idle))


def is_idle(node: fx.Node) -> bool:
    """Whether a step gives its first operand as it is, in its dtype and layout and on its device. None of these changes a shape."""
    name = N.op_name(node)
    operand = node.args[0] if node.args else None
    if name not in _NAMES or not isinstance(operand, fx.Node) or not N.is_tensor(operand):
        return False
    given, made = N.value(operand), N.value(node)
    if given.dtype != made.dtype or given.device != made.device:
        return False
    args = N.arguments(node)
    if name == "aten::dropout":
        return args["train"] is False or args["p"] == 0
    if name == "aten::to":
        return not args.get("copy") and args.get("memory_format") is None and args.get("layout") in (None, given.layout)
    if name == "aten::add":
        return N.kind(node) == "int" and type(args["other"]) is int and args["other"] == 0
    return name == "aten::detach" or (type(args["other"]) in (int, float) and args["other"] == 1)
