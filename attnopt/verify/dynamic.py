"""Which sizes of the inputs may change, and which of them change together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class DynamicDim:
    """One dimension of an input: its size is ``times * symbol + plus``, with ``min <= symbol <= max`` (None: unbounded)."""

    symbol: str
    min: int = 2
    max: int | None = None
    times: int = 1
    plus: int = 0


@dataclass(frozen=True)
class DynamicShapes:
    """``dims[i][d]`` describes dimension d of the i-th leaf of the flattened ``(args, kwargs)``; what is absent is fixed.

    ``admits`` says whether the captured graph holds for a choice of all symbols, as far as its guards are known.
    """

    dims: Mapping[int, Mapping[int, DynamicDim]] = field(default_factory=dict)
    admits: Callable[[Mapping[str, int]], bool] = lambda sizes: True

    def values(self, leaves: Sequence[Any]) -> dict[str, int]:
        """The symbols' values in an example."""
        found: dict[str, int] = {}
        for i, dims in self.dims.items():
            for d, dim in dims.items():
                found.setdefault(dim.symbol, (leaves[i].shape[d] - dim.plus) // dim.times)
        return found

    def shape(self, i: int, example: Tensor, values: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of leaf i where the symbols have ``values``."""
        dims = self.dims.get(i, {})
        return tuple(dims[d].times * values[dims[d].symbol] + dims[d].plus if d in dims else n for d, n in enumerate(example.shape))

    @property
    def symbols(self) -> dict[str, DynamicDim]:
        """A description of each symbol: its range."""
        return {dim.symbol: dim for dims in self.dims.values() for dim in dims.values()}

    def groups(self, leaves: Sequence[Any]) -> list[tuple[str, ...]]:
        """Symbols that are changed together: those that stand at the same dimension with the same size in the example.

        A capture keeps two symbols apart that no operation related (the batch of the ids and of a mask that is gathered from),
        but the caller gave equal sizes, and unequal ones need not be inputs of the model.
        """
        place: dict[tuple[int, int], list[str]] = {}
        for i, dims in self.dims.items():
            for d, dim in dims.items():
                place.setdefault((d, leaves[i].shape[d]), []).append(dim.symbol)
        merged: list[set[str]] = []
        for names in place.values():
            touching = [g for g in merged if g & set(names)]
            merged = [g for g in merged if not g & set(names)] + [set(names).union(*touching)]
        return [tuple(sorted(g)) for g in merged]

    def is_batch(self, symbols: Sequence[str]) -> bool:
        """Whether all of ``symbols`` are sizes of leading dimensions only."""
        return all(d == 0 for dims in self.dims.values() for d, dim in dims.items() if dim.symbol in symbols)


def flatten(gm: GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The leaves of the inputs in the order of the graph's placeholders.

    Raises ValueError when they do not have the structure that the graph was captured with.
    """
    info = getattr(gm.graph._codegen, "pytree_info", None)
    spec = getattr(info, "in_spec", None)
    if spec is not None and spec.num_children == 2 and spec.child(1).type is dict:
        names = spec.child(1).context
        if set(names) != set(kwargs):
            raise ValueError(f"the graph takes the keyword arguments {sorted(names)}, not {sorted(kwargs)}")
        kwargs = {name: kwargs[name] for name in names}
    leaves = list(pytree.tree_leaves((tuple(args), dict(kwargs))))
    count = sum(n.op == "placeholder" for n in gm.graph.nodes)
    if len(leaves) != count:
        raise ValueError(f"the graph takes {count} inputs, not {len(leaves)}")
    return leaves


def from_graph(gm: GraphModule) -> DynamicShapes:
    """Read off which sizes are dynamic from the placeholders of a captured graph.

    Their ``meta["val"]`` are fake tensors whose symbolic sizes tell which change together; ranges and guards stand in the shape
    environment. Sizes that are neither a symbol nor linear in one are left at the example's.
    """
    import sympy

    dims: dict[int, dict[int, DynamicDim]] = {}
    environments: list[Any] = []
    fixed: set[str] = set()
    for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        sizes: list[Any] = list(value.shape)
        for d, size in enumerate(sizes):
            if not isinstance(size, torch.SymInt):
                continue
            env, e = size.node.shape_env, sympy.sympify(size.node.expr)
            if all(env is not x for x in environments):
                environments.append(env)
            free = sorted(e.free_symbols, key=str)
            if not free:
                continue
            times, plus = e.coeff(free[0], 1), e.coeff(free[0], 0)
            if len(free) > 1 or not (times.is_Integer and plus.is_Integer) or sympy.expand(times * free[0] + plus - e) != 0:
                fixed |= {str(s) for s in free}
                continue
            bounds = env.var_to_range.get(free[0])
            low = int(bounds.lower) if bounds is not None and bounds.lower.is_Integer else 2
            high = int(bounds.upper) if bounds is not None and bounds.upper.is_Integer else None
            dims.setdefault(i, {})[d] = DynamicDim(str(free[0]), max(low, 1), high, int(times), int(plus))
    dims = {i: {d: x for d, x in found.items() if x.symbol not in fixed} for i, found in dims.items()}
    guards = [g.expr for env in environments for g in env.guards]

    def admits(values: Mapping[str, int]) -> bool:
        for g in guards:
            held = g.subs({s: values[str(s)] for s in g.free_symbols if str(s) in values})
            if held == sympy.false:
                return False
        return True

    return DynamicShapes({i: x for i, x in dims.items() if x}, admits)
