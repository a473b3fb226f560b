"""Writing into a graph: new nodes with their fake values, symbolic sizes, and views."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode

from attnopt.analysis import nodes as N
from attnopt.ir import dims
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.index import View

aten = torch.ops.aten
ORIGINAL = "attnopt_original"
"""Key in a node's meta: the name of the node of the captured graph whose value it computes."""
_ARITHMETIC = {"add": operator.add, "mul": operator.mul, "floordiv": operator.floordiv, "mod": operator.mod, "min": torch.sym_min, "max": torch.sym_max}


class Editor:
    """Inserts nodes before ``anchor``, with ``meta`` (where they come from) taken from it."""

    def __init__(self, graph: fx.Graph, anchor: fx.Node) -> None:
        self.graph = graph
        self.anchor = anchor

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call whose fake value is computed from those of its operands.

        In their fake mode, since operators that PyTorch composes of others may make tensors of symbolic sizes from nothing; and by its Python
        forms of such operators, as export does, since those in C++ may ask for sizes as numbers.
        """
        with self.graph.inserting_before(self.anchor):
            node: fx.Node = self.graph.call_function(target, args, kwargs)
        self._copy_origin(node)
        values: tuple[Any, ...] = fx.map_arg(args, N.value)
        with detect_fake_mode(values) or contextlib.nullcontext(), enable_python_dispatcher():
            node.meta["val"] = target(*values, **fx.map_arg(kwargs, N.value))
        return node

    def _copy_origin(self, node: fx.Node) -> None:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in self.anchor.meta:
                node.meta[key] = self.anchor.meta[key]

    def matmul(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """``a @ b`` for operands of one rank and equal batch. Its fake value is made by hand: computed, it may fix symbolic sizes."""
        with self.graph.inserting_before(self.anchor):
            node: fx.Node = self.graph.call_function(aten.matmul.default, (a, b))
        left, right = N.value(a), N.value(b)
        node.meta["val"] = left.new_empty((*left.shape[:-1], right.shape[-1]))
        self._copy_origin(node)
        return node

    def einsum(self, equation: str, a: fx.Node, b: fx.Node) -> fx.Node:
        """A product of two operands whose letters each stand for one size. Its fake value is made by hand, as that of ``matmul``."""
        with self.graph.inserting_before(self.anchor):
            node: fx.Node = self.graph.call_function(aten.einsum.default, (equation, [a, b]))
        inputs, out = equation.split("->")
        sizes = {ch: n for word, x in zip(inputs.split(","), (a, b), strict=True) for ch, n in zip(word, N.value(x).shape, strict=True)}
        node.meta["val"] = N.value(a).new_empty([sizes[ch] for ch in out])
        self._copy_origin(node)
        return node

    def size(self, x: Expr) -> int | fx.Node:
        """A symbolic size as a node, a constant one as an int."""
        if x.is_const:
            return int(x.value)
        if x.op == "sym":
            return self._symbol(x)
        if x.op in ("add", "mul"):
            total = self.size(x.args[0])
            for a in x.args[1:]:
                total = self.call(_ARITHMETIC[x.op], total, self.size(a))
            return total
        if x.op in _ARITHMETIC:
            return self.call(_ARITHMETIC[x.op], self.size(x.args[0]), self.size(x.args[1]))
        raise ValueError(f"a size of the form {x} cannot be written into a graph")

    def _symbol(self, x: Expr) -> fx.Node:
        for node in self.graph.nodes:
            if node is self.anchor:
                break
            value = N.value(node)
            if isinstance(value, torch.SymInt) and dims.size(value) is x:
                found: fx.Node = node
                return found
        for node in self.graph.nodes:
            if node is self.anchor:
                break
            if N.is_tensor(node):
                for d, n in enumerate(N.value(node).shape):
                    if isinstance(n, torch.SymInt) and dims.size(n) is x:
                        return self.call(aten.sym_size.int, node, d)
        raise ValueError(f"no tensor before {self.anchor.name} has the size {x}")

    def views(self, node: fx.Node, views: Iterable[View]) -> fx.Node:
        """``node`` seen through ``views``."""
        for name, args in views:
            if name == "select":
                node = self.call(aten.select.int, node, args[0], self.size(_expr(args[1])))
            elif name == "narrow":
                start = _expr(args[1])
                node = self.call(aten.slice.Tensor, node, args[0], self.size(start), self.size(E.add(start, _expr(args[2]))))
            elif name == "permute":
                node = self.call(aten.permute.default, node, list(args))
            elif name == "reshape":
                node = self.call(aten.reshape.default, node, [self.size(_expr(a)) for a in args])
            elif name == "expand":
                node = self.call(aten.expand.default, node, [self.size(_expr(a)) for a in args])
            else:
                raise ValueError(f"unknown view {name}")
        return node


def _expr(x: object) -> Expr:
    assert isinstance(x, Expr)
    return x
