"""What the rewrites left without a reader is removed, and what they left as an empty step is skipped."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.raise_attention import SITE


@dataclass(frozen=True)
class Cleanup:
    name: str = "cleanup"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        changed = False
        for node in list(module.graph.nodes):
            if N.op_name(node) == "aten::reshape" and SITE not in node.meta and N.shape(node) == N.shape(node.args[0]):
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
                changed = True
        return PassResult(drop_unread(module.graph) or changed)


def drop_unread(graph: fx.Graph) -> bool:
    """Remove what nothing reads; whether there was any."""
    # Drawing random numbers that nobody reads is no effect to keep: a dropout would hold on to a whole replaced attention.
    return bool(graph.eliminate_dead_code(lambda node: bool(node.is_impure(impure_random=False))))
