"""What a capture hands on: the graph, and what it holds for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from attnopt.capture.call import Args, Kwargs, Leaf
from attnopt.capture.relations import Relation
from attnopt.errors import CaptureError
from attnopt.remarks import Remark


class ModelError(CaptureError):
    """The model itself fails with these inputs: ``original`` is what it raised."""

    def __init__(self, message: str, original: Exception) -> None:
        super().__init__(message)
        self.original = original


@dataclass(frozen=True)
class DynamicDim:
    """One dimension of one input leaf that may vary, within inclusive bounds (``upper`` None: unbounded)."""

    leaf: int
    name: str
    dim: int
    symbol: str
    lower: int
    upper: int | None


@dataclass(frozen=True)
class Example:
    """The call that was captured, and which others the graph holds for.

    ``args`` and ``kwargs`` are inputs in canonical form (``CallForm.normalise``; a batch of one is repeated, since
    export would fix it). ``holds(leaves)`` says whether the graph may be used for other leaves of the same structure,
    dtypes, devices and values.
    """

    args: Args
    kwargs: Kwargs
    leaves: tuple[Leaf, ...]
    dynamic: tuple[DynamicDim, ...]
    holds: Callable[[Sequence[Any]], bool]

    def one_row(self) -> tuple[Args, Kwargs] | None:
        """The call with a batch of one; None where the first axis is not open."""
        first = {d.leaf for d in self.dynamic if d.dim == 0 and d.lower <= 1}
        if not first:
            return None
        leaves, form = pytree.tree_flatten((self.args, self.kwargs))
        leaves = [x[:1] if i in first else x for i, x in enumerate(leaves)]
        return cast("tuple[Args, Kwargs]", pytree.tree_unflatten(leaves, form)) if self.holds(leaves) else None


@dataclass
class Captured:
    """A captured call of a model.

    ``graph_module`` is called as the model was: ``graph_module(*example.args, **example.kwargs)``. It is training IR
    (ATen, not decomposed) without submodules for ``torch.no_grad`` regions, its get_attr targets are the model's own
    parameter names, and parameters are the model's own objects.
    """

    graph_module: torch.fx.GraphModule
    program: ExportedProgram
    example: Example
    remarks: list[Remark] = field(default_factory=list)
    relations: list[Relation] = field(default_factory=list)
    """Sizes of the inputs that belong together; ``example.holds`` tests them."""
    seconds: float = 0.0
