"""Verification: the optimized against the original, each measured by its distance from a float64 truth.

``verify_graphs`` compares a captured graph with its optimized form, site by site and as a whole; ``verify_and_repair`` puts back the
sites that fail; ``verify_modules`` compares any two modules as black boxes. What is allowed stands in ``budget``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule

from attnopt.report import Verdict
from attnopt.verify.bisect import GraphPair, Repair, first_bad_site, verify_and_repair
from attnopt.verify.dynamic import DynamicDim, DynamicShapes, from_graph
from attnopt.verify.end_to_end import Comparison, Progress, compare_graphs
from attnopt.verify.inputs import Variant, variants
from attnopt.verify.modules import verify_modules
from attnopt.verify.oracle import Float64Interpreter
from attnopt.verify.regions import Outputs

__all__ = [
    "Comparison",
    "DynamicDim",
    "DynamicShapes",
    "Float64Interpreter",
    "GraphPair",
    "Outputs",
    "Progress",
    "Repair",
    "Variant",
    "compare_graphs",
    "first_bad_site",
    "from_graph",
    "variants",
    "verify_and_repair",
    "verify_graphs",
    "verify_modules",
]


def verify_graphs(
    reference: GraphModule,
    optimized: GraphModule,
    outputs: Outputs,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    root: nn.Module | None = None,
    training: bool = False,
    progress: Progress | None = None,
) -> tuple[Verdict, frozenset[str]]:
    """The verdict on an optimized graph, and the sites that fail on their own. See ``compare_graphs``."""
    result = compare_graphs(reference, optimized, outputs, args, kwargs, root=root, training=training, progress=progress)
    return result.verdict, frozenset(result.failed)
