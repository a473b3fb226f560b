"""How the model that is served is called: for one request alone, for capture and for whoever compares the two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.capture.call import Args, Kwargs
from attnopt.capture.captured import Captured
from attnopt.errors import ServingError
from attnopt.passes.insert_kv_cache import PackedPlan

LONGEST = 1 << 20
"""A capture that holds for this many tokens is taken to hold for more."""


@dataclass(frozen=True)
class OriginalCall:
    """How the original is called, and what it gives: the leaves of its example call, by the names that its graph has for them."""

    names: tuple[str, ...]
    leaves: tuple[Any, ...]
    structure: pytree.TreeSpec
    output: int | None = None
    """The place among its results of what it calls its logits; None where it has no such name, or one result only."""

    def positions(self) -> tuple[str, ...]:
        """Inputs that count 0, 1, 2, ... in the example, where another one can hold the ids: integers [B, S] that are no mask of zeros and ones."""
        found = tuple(n for n, x in zip(self.names, self.leaves, strict=True) if _counts(x))
        others = [x for n, x in zip(self.names, self.leaves, strict=True) if n not in found and isinstance(x, Tensor) and x.dim() == 2 and not x.is_floating_point()]
        return found if any(not x.is_meta and bool((x > 1).any()) for x in others) else ()

    def row(self, name: str, request: int) -> Tensor:
        """One row of an input of the example."""
        x: Tensor = self.leaves[self.names.index(name)]
        return x[request % x.shape[0]][None]

    def call(self, ids: Tensor, plan: PackedPlan, request: int = 0) -> tuple[Args, Kwargs]:
        """The call for requests ids [B, n] of one length, without padding. What another sequence is made of is a row of the example, for one request."""
        tokens, positions = plan.ids, self.positions()
        size = next(x.shape for name, x in zip(self.names, self.leaves, strict=True) if name == tokens)
        out: list[Any] = []
        for name, x in zip(self.names, self.leaves, strict=True):
            if name in plan.context:
                x = self.row(name, request)
            elif plan.context and isinstance(x, Tensor) and name != tokens and x.shape[:1] == size[:1] and x.shape != size:
                x = torch.ones_like(x[:1])
            elif name == tokens:
                x = ids.to(x.dtype)
            elif name in positions:
                x = torch.arange(ids.shape[1], dtype=x.dtype, device=x.device).expand(ids.shape if x.dim() == 2 else ids.shape[1:])
            elif isinstance(x, Tensor) and x.shape == size:
                x = torch.ones(ids.shape, dtype=x.dtype, device=x.device)
            out.append(x)
        args, kwargs = pytree.tree_unflatten(out, self.structure)
        return args, kwargs

    def logits(self, result: Any, plan: PackedPlan) -> Tensor:
        """[B, n, V], or [B, 1, V] of the last token, out of the original's result."""
        found = pytree.tree_leaves(result)
        x: Tensor = found[self.output] if self.output is not None else next(x for x in found if isinstance(x, Tensor) and x.is_floating_point())
        return x[:, None] if plan.last_only and x.dim() == 2 else x


@dataclass(frozen=True)
class ExampleCall:
    """The example call by its roles: which leaf holds the ids, which the positions, and where the logits stand among the results."""

    captured: Captured
    form: OriginalCall

    @staticmethod
    def of(captured: Captured) -> ExampleCall:
        leaves, structure = pytree.tree_flatten((captured.example.args, captured.example.kwargs))
        names = tuple(str(n.target) for n in captured.graph_module.graph.find_nodes(op="placeholder"))
        return ExampleCall(captured, OriginalCall(names, tuple(leaves), structure, _logits_place(captured)))

    def longest(self, plan: PackedPlan) -> int | None:
        """How many tokens a request may have: as many as the tables of the model and its capture admit; None where nothing limits them.

        Raises ServingError where the capture does not hold for all shorter requests.
        """
        bounds = [d.upper for d in self.captured.example.dynamic if self.form.names[d.leaf] == plan.ids and d.dim == 1]
        known = min((n for n in (*bounds, plan.max_positions) if n is not None), default=None)
        low, high = 1, known or LONGEST
        if self._holds(high, plan):
            low = high
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if self._holds(middle, plan) else (low, middle)
        gap = next((n for n in (*range(1, min(low, 64) + 1), low) if not self._holds(n, plan)), None)
        if gap is not None:
            raise ServingError(f"The capture of the model does not hold for a single request of {gap} tokens.", "Its report says for which sizes it holds (AO301).")
        return known if low in (known, LONGEST) else low

    def _holds(self, length: int, plan: PackedPlan) -> bool:
        """Whether the captured graph may be used for one request of this length."""
        args, kwargs = self.form.call(torch.empty((1, length), dtype=torch.int64, device="meta"), plan)
        return self.captured.example.holds(pytree.tree_leaves((args, kwargs)))


def _logits_place(captured: Captured) -> int | None:
    info = captured.graph_module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    result = pytree.tree_unflatten(list(range(info.out_spec.num_leaves)), info.out_spec)
    named = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    return named if isinstance(named, int) else None


def _counts(x: Any) -> bool:
    return (
        isinstance(x, Tensor) and not x.is_floating_point() and not x.is_meta and x.dim() in (1, 2) and x.shape[-1] > 1
        and bool((x == torch.arange(x.shape[-1], device=x.device)).all())
    )  # fmt: skip
