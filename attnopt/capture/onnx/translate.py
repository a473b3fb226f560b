"""From an ONNX graph to a graph of ATen operators over symbolic sizes, node for node the same function.

Each ONNX operator has a rule in ``shapes`` or ``pointwise``. What has none, or one that does not apply (sizes that data decide), becomes an
opaque call: its operands count as read, and its results as tensors of which nothing is known but their shape. Every FX node that
holds an ONNX value has it in ``meta["onnx"]``.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from attnopt.capture.onnx.builder import Builder, Size
from attnopt.capture.onnx.conditions import Sum, beyond, equations
from attnopt.capture.onnx.known import LIMIT, Known, known
from attnopt.errors import CaptureError

ONNX = "onnx"
"""Key in a node's meta: the ``onnx_ir.Value`` that it holds."""

Result = fx.Node | Known
Rule = Callable[["Translator", ir.Node], "Result | Sequence[Result | None] | None"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the translation of operators of the standard domain. A rule returns None where it does not apply."""

    def register(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, f))
        return f

    return register


@dataclass
class LiftedFile:
    """The graph of a file. ``opaque`` counts the operators that have no translation."""

    graph_module: fx.GraphModule
    opaque: dict[str, int]
    sums: dict[str, Sum]
    """Named dimensions of the inputs that follow from others: the graph holds only where they do."""
    conditions: list[str] = field(default_factory=list)
    """What must hold between sizes beyond what the names of dimensions say, in words."""
    beyond: list[tuple[str, int]] = field(default_factory=list)
    """A dimension and a size of it at which a slice ends elsewhere than in the example: there a condition may not hold."""


Observed = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape that a value had in a run."""


class ShapesNeeded(Exception):
    """Shapes of intermediate values have to be observed in a run: nothing in the file tells them."""


@dataclass
class _Held:
    node: fx.Node | None = None
    known: Known | None = None


class Translator:
    """``sizes``: the example's size of each named dimension of the inputs. ``observed``: intermediate values in a run of the example."""

    def __init__(self, model: ir.Model, sizes: Mapping[str, int], observed: Mapping[str, Observed] | None = None) -> None:
        self.model = model
        self.opset = int(model.opset_imports[""])
        self.sizes = sizes
        self.observed = observed
        self.builder = Builder()
        self.held: dict[ir.Value, _Held] = {}
        self.opaque: dict[str, int] = {}
        self.edges: list[tuple[Any, int]] = []
        """A size, and a value of it at which a slice ends elsewhere than in the example or a larger one."""
        self._clamped: list[Any] = []

    def run(self) -> LiftedFile:
        graph = self.model.graph
        named: set[str] = set()
        for value in graph.inputs:
            if value in graph.initializers.values():
                continue
            if value.dtype is None or value.shape is None:
                raise CaptureError(f"The input {value.name} of the file is no tensor of a known rank; supported are tensors.")
            named |= {d.value for d in value.shape if isinstance(d, ir.SymbolicDim) and d.value}
            self._placeholder(value)
        # an equation that is found later replaces one symbol by others
        self._first = {s.node.expr: name for name, s in self.builder.symbols.items()}
        for node in graph:
            self._translate(node)
        results = [self.tensor(v) for v in graph.outputs if not self._is_nothing(v)]
        self.builder.graph.output(tuple(results))
        module = fx.GraphModule(self.builder.module, self.builder.graph)
        guards = [g.expr for g in self.builder.env.guards]
        sums, words = equations(guards, self._clamped, self._first, named)
        return LiftedFile(module, self.opaque, sums, words, beyond(self.edges, self._clamped, self._first))

    # ---- what rules read

    def entry(self, value: ir.Value) -> _Held:
        if value not in self.held:
            self.held[value] = self._initializer(value)
        return self.held[value]

    def tensor(self, value: ir.Value | None) -> fx.Node:
        """The node of a value; one is made of what is only known so far."""
        assert value is not None
        held = self.entry(value)
        if held.node is None:
            assert held.known is not None
            held.node = self.materialise(held.known)
            held.node.meta.setdefault(ONNX, value)
        return held.node

    def known(self, value: ir.Value | None) -> Known | None:
        return None if value is None else self.entry(value).known

    def result(self, value: ir.Value) -> Result:
        held = self.entry(value)
        return held.known if held.known is not None else self.tensor(value)

    def number(self, value: ir.Value, beside: int) -> Any:
        """The one element of a value that broadcasts to a tensor of rank ``beside`` without changing it; None where it is no such value."""
        found = self.known(value)
        return None if found is None or found.single is None or found.values.ndim > beside else found.single

    def rank(self, value: ir.Value) -> int:
        held = self.entry(value)
        return held.known.values.ndim if held.known is not None else int(self.tensor(value).meta["val"].dim())

    def dtype(self, value: ir.Value) -> torch.dtype:
        held = self.entry(value)
        return held.known.dtype if held.known is not None else self.tensor(value).meta["val"].dtype

    def materialise(self, x: Known) -> fx.Node:
        """A tensor with the elements of ``x``."""
        b, aten = self.builder, torch.ops.aten
        if x.is_constant and len({*x.items()}) != 1:
            data = torch.tensor(x.values.tolist(), dtype=x.dtype).reshape(x.values.shape)
            return b.constant(data, _is_learnt(data))
        shape = list(x.values.shape)
        if x.single is not None or x.is_constant:
            first = x.items()[0]
            fill = first if isinstance(first, fx.Node) else bool(first) if x.dtype is torch.bool else float(first) if x.dtype.is_floating_point else int(first)
            return b.call(aten.full.default, shape, fill, dtype=x.dtype)
        parts = [b.call(aten.full.default, [1], i, dtype=x.dtype) for i in x.items()]
        flat = b.call(aten.cat.default, parts, 0)
        return flat if len(shape) == 1 else b.call(aten.reshape.default, flat, shape)

    def symbol_of(self, dim: Any, hint: int, low: int = 1) -> int | torch.SymInt:
        if isinstance(dim, int):
            return dim
        return self.builder.symbol(str(dim.value), hint, low)

    # ---- nodes

    def _placeholder(self, value: ir.Value) -> None:
        assert value.shape is not None and value.dtype is not None
        sizes: list[int | torch.SymInt] = []
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and not dim.value:
                dim = ir.SymbolicDim(f"{value.name}_{axis}")
            # A cache may be empty; ids, masks and features never are.
            low = 0 if len(value.shape) > 3 and axis > 0 else 1
            sizes.append(self.symbol_of(dim, 2 if isinstance(dim, int) else self.sizes[str(dim.value)], low))
        node = self.builder.input(_identifier(str(value.name)), torch_dtype(value.dtype, str(value.name)), sizes)
        node.meta[ONNX] = value
        self.held[value] = _Held(node)

    def _initializer(self, value: ir.Value) -> _Held:
        tensor = value.const_value
        if tensor is None:
            raise CaptureError(f"The file's value {value.name} is read before anything makes it.")
        dtype = torch_dtype(tensor.dtype, str(value.name))
        if tensor.size <= LIMIT and len(tensor.shape) <= 2:
            array = tensor.numpy()
            if dtype is torch.bfloat16:
                array = array.astype(np.float32)
            return _Held(known=known(array, dtype))
        data = _as_torch(tensor, dtype)
        node = self.builder.constant(data, _is_learnt(data))
        node.meta[ONNX] = value
        return _Held(node)

    def _translate(self, node: ir.Node) -> None:
        self.builder.origin = _origin(node)
        found = None
        assumed = len(self.builder.env.guards)
        if node.domain in ("", "ai.onnx") and node.op_type in RULES and not any(v is not None and self._is_nothing(v) for v in node.inputs):
            try:
                found = RULES[node.op_type](self, node)
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
                raise CaptureError(
                    f"The node {node.name or node.op_type} ({node.op_type}) of the file cannot be read: {' '.join(str(error).split())[:300]}"
                ) from error
        if found is None:
            self._opaque(node)
            return
        if node.op_type == "Slice":  # whether an end lies within the axis
            self._clamped += [g.expr for g in self.builder.env.guards[assumed:]]
        results = found if isinstance(found, (list, tuple)) else [found]
        for value, result in zip(node.outputs, results, strict=False):
            if isinstance(result, Known):
                self.held[value] = _Held(known=result)
            elif result is not None:
                result.meta.setdefault(ONNX, value)
                self.held[value] = _Held(result)

    def _is_nothing(self, value: ir.Value) -> bool:
        """Whether not even the shape of a value is known."""
        return value in self.held and self.held[value] == _Held()

    def _opaque(self, node: ir.Node) -> None:
        self.opaque[node.op_type] = self.opaque.get(node.op_type, 0) + 1
        read = [v for v in node.inputs if v is not None] + [v for g in _subgraphs(node) for v in _captured(g)]
        operands = [self.tensor(v) for v in read if not self._is_nothing(v)]
        shapes = [self._described(v) for v in node.outputs]
        for value, result in zip(node.outputs, self.builder.opaque(node.op_type, operands, shapes), strict=True):
            if result is not None:
                result.meta[ONNX] = value
            self.held[value] = _Held(result)

    def _described(self, value: ir.Value) -> tuple[torch.dtype, list[int | torch.SymInt]] | None:
        """Dtype and shape of the result of an operator without a translation; None for what is not used, or no tensor."""
        if not value.name or not (value.uses() or value.is_graph_output()) or not isinstance(value.type, (ir.TensorType, type(None))):
            return None
        complete = value.dtype is not None and value.shape is not None and all(isinstance(d, int) or d.value in self.sizes for d in value.shape)
        if not complete and self.observed is None:
            raise ShapesNeeded
        seen = None if self.observed is None else self.observed.get(value.name)
        if seen is None and not complete:
            return None
        dims = list(value.shape) if value.shape is not None else [ir.SymbolicDim(None)] * len(seen[1] if seen else ())
        out: list[int | torch.SymInt] = []
        for axis, dim in enumerate(dims):
            if isinstance(dim, int):
                out.append(dim)
                continue
            name = dim.value
            if name is None and seen is not None and seen[1][axis] == 1:
                out.append(1)  # for want of better knowledge; the comparison at other sizes has the last word
                continue
            name = name or f"{value.name}_{axis}"
            hint = self.sizes[name] if name in self.sizes else 2 if seen is None else seen[1][axis]
            out.append(self.builder.symbol(name, hint, 0))
        if value.dtype is not None:
            return torch_dtype(value.dtype, value.name), out
        assert seen is not None
        return seen[0], out


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """An attribute's value; ``default`` where the node has none."""
    found = node.attributes.get(name)
    if found is None or found.is_ref():
        return default
    return list(found.value) if isinstance(found.value, (list, tuple)) else found.value


def torch_dtype(dtype: ir.DataType, name: str) -> torch.dtype:
    if dtype not in _DTYPES:
        raise CaptureError(f"{name} is of type {dtype.name}; supported are {', '.join(d.name for d in _DTYPES)}.")
    return _DTYPES[dtype]


_DTYPES = {
    ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16, ir.DataType.DOUBLE: torch.float64,
    ir.DataType.INT64: torch.int64, ir.DataType.INT32: torch.int32, ir.DataType.INT16: torch.int16, ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8, ir.DataType.BOOL: torch.bool,
}  # fmt: skip


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else "_" for c in name)


_WEIGHT, _TABLE = 1 << 22, 1 << 26
"""Elements beyond which nothing is said of the values of a matrix of floats, and of any other constant."""


def _as_torch(tensor: ir.TensorProtocol, dtype: torch.dtype) -> torch.Tensor:
    """A constant that may be looked through, or the bare shape of one that is too large for it. A copy: the file's own memory is closed when it is saved."""
    if tensor.size > (_WEIGHT if len(tensor.shape) == 2 and dtype.is_floating_point else _TABLE):
        return torch.empty(tensor.shape.numpy(), dtype=dtype, device="meta")
    array = tensor.numpy()
    return torch.from_numpy(array.astype(np.float32)).to(dtype) if dtype is torch.bfloat16 else torch.from_numpy(array.copy())


def _is_learnt(data: torch.Tensor) -> bool:
    """Whether a constant is a weight: ordinary numbers that follow no pattern. A mask is whole, or reaches far."""
    if not data.is_floating_point() or data.dim() > 2 or data.is_meta:
        return False
    return bool((data.abs() <= 1e3).all()) and bool((data != data.round()).any())


def path_of(node: ir.Node) -> str:
    """The module that a node was exported from: by the exporter's own record, or the path in its name; empty where neither says."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes is None:
        return ".".join(str(node.name or "").split("/")[1:-1])
    paths = list(ast.literal_eval(scopes))[:-1]
    return str(paths[-1]) if paths else ""


def _origin(node: ir.Node) -> dict[str, Any]:
    """Where a node comes from, in the form that captured graphs have."""
    out: dict[str, Any] = {"nn_module_stack": {"file": (path_of(node), "")}}
    trace = node.metadata_props.get("pkg.torch.onnx.stack_trace")
    return {**out, "stack_trace": trace} if trace else out


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    graphs: list[ir.Graph] = []
    for a in node.attributes.values():
        if a.type == ir.AttributeType.GRAPH:
            graphs.append(a.as_graph())
        elif a.type == ir.AttributeType.GRAPHS:
            graphs.extend(a.as_graphs())
    return graphs


def _captured(graph: ir.Graph) -> list[ir.Value]:
    """Values of the graphs around that a subgraph reads."""
    made = {*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)}
    read = [v for n in graph for v in n.inputs if v is not None] + list(graph.outputs)
    read += [v for n in graph for g in _subgraphs(n) for v in _captured(g)]
    return [v for v in dict.fromkeys(read) if v not in made]


def size_of(x: Any) -> Size:
    return x if isinstance(x, fx.Node) else int(x)
