"""Reading and changing raised attention nodes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from attnopt.ir.spec import AttentionSpec


def attentions(graph: fx.Graph) -> Iterator[fx.Node]:
    """Every ``attnopt::attention`` node, in graph order."""
    for n in list(graph.nodes):
        if n.op == "call_function" and n.target is torch.ops.attnopt.attention.default:
            yield n


def spec_of(node: fx.Node) -> AttentionSpec:
    return AttentionSpec.from_json(str(node.args[5]))
