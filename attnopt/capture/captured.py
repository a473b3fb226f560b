"""What a capture hands on: the graph, and what it holds for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram

from attnopt.capture.call import Args, Kwargs, Leaf
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


@dataclass
class Captured:
    """A captured call of a model.

    ``graph_module`` is called as the model was: ``graph_module(*args, **kwargs)`` with arguments in canonical form
    (``CallForm.normalise``). It is training IR (ATen, not decomposed) without submodules for ``torch.no_grad`` regions,
    its get_attr targets are the model's own parameter names, and parameters are the model's own objects.
    ``holds(leaves)`` says whether it may be used for other leaves of the same structure, dtypes, devices and values.
    ``args`` and ``kwargs`` are inputs on which it was captured (a batch of one is repeated, since export would fix it).
    """

    graph_module: torch.fx.GraphModule
    program: ExportedProgram
    args: Args
    kwargs: Kwargs
    leaves: tuple[Leaf, ...]
    dynamic: tuple[DynamicDim, ...]
    holds: Callable[[Sequence[Any]], bool]
    remarks: list[Remark] = field(default_factory=list)
    seconds: float = 0.0

    def dynamic_sizes(self) -> dict[str, list[DynamicDim]]:
        """The dynamic dimensions by symbol; those of one symbol always have the same size."""
        found: dict[str, list[DynamicDim]] = {}
        for d in self.dynamic:
            found.setdefault(d.symbol, []).append(d)
        return found
