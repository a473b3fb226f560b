"""The sizes of a captured example that verification may vary."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.utils import _pytree as pytree

from attnopt.capture.captured import Example
from attnopt.verify import DynamicDim, DynamicShapes


def varied_shapes(example: Example) -> DynamicShapes:
    """Which sizes verification may vary, and together with which others."""
    leaves = pytree.tree_leaves((example.args, example.kwargs))
    dims: dict[int, dict[int, DynamicDim]] = {}
    for d in example.dynamic:
        dims.setdefault(d.leaf, {})[d.dim] = DynamicDim(d.symbol, d.lower, d.upper)
    shapes = DynamicShapes(dims)

    def admits(values: Mapping[str, int]) -> bool:
        return example.holds([torch.empty(shapes.shape(i, x, values), device="meta") if isinstance(x, torch.Tensor) else x for i, x in enumerate(leaves)])

    return DynamicShapes(dims, admits)
