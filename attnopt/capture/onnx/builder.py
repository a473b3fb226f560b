"""A graph of ATen operators that is built node by node, with fake values over symbolic sizes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.value_ranges import ValueRanges

aten = torch.ops.aten

Size = int | fx.Node
"""A constant size, or a node that holds a symbolic one."""


class Builder:
    """``module`` holds the constants, ``graph`` the nodes. Every node has ``meta["val"]``."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.module = nn.Module()
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env)
        self.origin: dict[str, Any] = {}
        """Goes into the meta of every new node: where it comes from."""
        self._symbols: dict[str, torch.SymInt] = {}
        self._constants = 0

    # ---- sizes

    def symbol(self, name: str, hint: int, low: int = 1) -> torch.SymInt:
        """The size called ``name``, at least ``low``; ``hint`` is what it is in the example."""
        if name not in self._symbols:
            # A size that is 0 or 1 in the example would be fixed.
            context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            like = self.mode.from_tensor(torch.empty(max(hint, 2), device="meta"), symbolic_context=context, source=ConstantSource(name))
            size: Any = like.shape[0]
            symbol = size.node.expr
            known = self.env.var_to_range[symbol]
            self.env.var_to_range[symbol] = ValueRanges(low, known.upper)
            self._symbols[name] = size
        return self._symbols[name]

    @property
    def symbols(self) -> dict[str, torch.SymInt]:
        return self._symbols

    def size(self, node: fx.Node, axis: int) -> Size:
        """The size of a tensor along an axis."""
        n = node.meta["val"].shape[axis]
        return n if isinstance(n, int) else self.call(aten.sym_size.int, node, axis)

    def shape(self, node: fx.Node) -> list[Size]:
        return [self.size(node, d) for d in range(node.meta["val"].dim())]

    def arithmetic(self, function: Any, *args: Size) -> Size:
        """``function`` of sizes; a number where it comes out as one."""
        if all(isinstance(a, int) for a in args):
            return int(function(*args))
        node = self.call(function, *args)
        value = node.meta["val"]
        if isinstance(value, torch.SymInt) and value.node.expr.is_Integer:
            value = int(value.node.expr)
        return value if isinstance(value, int) else node

    def product(self, sizes: Sequence[Size]) -> Size:
        total: Size = 1
        for s in sizes:
            total = s if total == 1 else self.arithmetic(operator.mul, total, s)
        return total

    # ---- nodes

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int | torch.SymInt]) -> fx.Node:
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(tuple(shape), dtype=dtype)
        return node

    def constant(self, value: torch.Tensor, learnt: bool) -> fx.Node:
        """``learnt``: a weight, which the analysis takes for an ordinary number and never for a mask."""
        name = f"constant_{self._constants}"
        self._constants += 1
        if learnt:
            self.module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            self.module.register_buffer(name, value)
        node = self.graph.create_node("get_attr", name)
        with self.mode:
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call whose fake value is computed from those of its operands."""
        values, keywords = fx.map_arg(args, _value), fx.map_arg(kwargs, _value)
        with self.mode, enable_python_dispatcher():
            result = target(*values, **keywords)
        return self._node(target, args, kwargs, result)

    def matmul(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """``a @ b``. Fake values of two tensors of at least two axes are made by hand: computed, they may fix symbolic sizes."""
        left, right = a.meta["val"], b.meta["val"]
        if min(left.dim(), right.dim()) < 2:
            return self.call(aten.matmul.default, a, b)
        with self.mode:
            batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
            result = left.new_empty((*batch, left.shape[-2], right.shape[-1]))
        return self._node(aten.matmul.default, (a, b), {}, result)

    def opaque(
        self, operator_name: str, args: Sequence[fx.Node], outputs: Sequence[tuple[torch.dtype, Sequence[int | torch.SymInt]] | None]
    ) -> list[fx.Node | None]:
        """What has no translation: it reads ``args``, and of its results only dtype and shape are known (None: nothing at all)."""
        with self.mode:
            results = tuple(None if o is None else torch.empty(tuple(o[1]), dtype=o[0]) for o in outputs)
        node = self._node(_marker(operator_name), tuple(args), {}, results)
        return [None if r is None else self._node(operator.getitem, (node, i), {}, r) for i, r in enumerate(results)]

    def _node(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update(self.origin)
        node.meta["val"] = result
        return node


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _marker(name: str) -> Any:
    """A function that stands for an operator without a translation; graphs that hold one are analysed and never run."""

    def function(*args: Any) -> Any:
        raise NotImplementedError(f"{name} has no translation")

    function.__name__ = function.__qualname__ = name
    return function
