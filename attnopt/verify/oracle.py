"""Ways of running a captured graph: as it is, in float64 as the truth, and at a lower precision.

All three run any ATen graph in training IR (what ``ExportedProgram.module()`` gives), node by node, and leave out what
would make two runs differ or fail for reasons that are none of the graph's meaning: dropout is the identity (as in
evaluation mode), buffers are copies (batch norm would update the model's own), assertions on dtypes are not asked.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from attnopt.ir.spec import AttentionSpec
from attnopt.verify.memory import written_bases

_LOW = (torch.float16, torch.bfloat16, torch.float32)
_DROPOUT = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
_SDPA = "scaled_dot_product_attention"
# Ops that compute on mixed floating dtypes by themselves, or take no floating operands that have to agree.
_MIXES = frozenset(
    "to _to_copy type_as copy where add sub mul div pow rsub maximum minimum eq ne lt le gt ge __and__ __or__ masked_fill embedding index index_select gather attention".split()
)


def op_name(node: Node) -> str:
    """The name of a node's operator without namespace and overload, as in ``softmax``; empty for other nodes."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.split("::")[-1])
    return ""


class GraphInterpreter(Interpreter):
    """Runs a graph at its own dtypes.

    ``attributes`` replaces parameters and buffers by their fully qualified name (leaves to differentiate by, copies);
    ``root`` is the module that holds them, by default the graph module itself.
    """

    def __init__(self, gm: GraphModule, *, root: nn.Module | None = None, attributes: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(root or gm, garbage_collect_values=False, graph=gm.graph)  # run_nodes frees what is no longer read
        self.attributes = attributes or {}
        self._node: Node | None = None

    # ---- whole graphs and parts of them

    def run_leaves(self, leaves: Sequence[Any], keep: Iterable[Node] = ()) -> tuple[Any, dict[Node, Any]]:
        """Run the whole graph on the flattened inputs (one for each placeholder, in order).

        Returns the output as the graph gives it (flat, without the model's own structure), and the values of the nodes in ``keep``.
        """
        nodes = list(self.graph.nodes)
        env: dict[Node, Any] = dict(zip((n for n in nodes if n.op == "placeholder"), leaves, strict=True))
        env = {n: self.load_leaf(v) for n, v in env.items()}
        wanted = set(keep)
        output = nodes[-1]
        values = self.run_nodes((n for n in nodes if n.op != "placeholder"), env, {*wanted, output})
        return values[output], {n: values[n] for n in wanted}

    def run_nodes(self, nodes: Iterable[Node], env: dict[Node, Any], keep: set[Node]) -> dict[Node, Any]:
        """Run ``nodes`` (in order) from the values in ``env``; values that no later one of them reads are freed, except ``keep``'s."""
        order = [n for n in nodes if n not in env]
        last: dict[Node, Node] = {}
        for n in order:
            for a in n.all_input_nodes:
                last[a] = n
        free: dict[Node, list[Node]] = {}
        for a, n in last.items():
            if a not in keep:
                free.setdefault(n, []).append(a)
        self.env = dict(env)
        for n in order:
            value = self.run_node(n)
            if n in keep or n in last:
                self.env[n] = value
            for a in free.get(n, ()):
                self.env.pop(a, None)
        found = {n: self.env[n] for n in keep if n in self.env}
        self.env = {}
        return found

    # ---- one node

    def run_node(self, n: Node) -> Any:
        self._node = n
        return super().run_node(n)

    def load_leaf(self, value: Any) -> Any:
        """What an input of the graph is run as."""
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = self.attributes.get(target)
        if value is None:
            value = self.fetch_attr(target)
        if isinstance(value, GraphModule):
            return self._callable(value)
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and target not in self.attributes:
                value = value.detach().clone()
            return self.load_leaf(value)
        return value

    def _callable(self, gm: GraphModule) -> Callable[..., Any]:
        """A graph inside the graph (the body of a no_grad or autocast block), run in the same way."""
        inner = type(self)(gm)
        self.configure(inner)
        return lambda *args: inner.run_leaves(args)[0]

    def configure(self, inner: GraphInterpreter) -> None:
        """Give the interpreter of an inner graph what the outer one has."""

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, GraphModule):
            return self._callable(module)(*args)
        return self.call_guard(target, args, kwargs)

    def call_guard(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The only other modules in a captured graph check its inputs, and raise on those that it does not hold for."""
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = op_name(self._node) if self._node is not None else ""
        if name == "_assert_tensor_metadata":
            return None
        if name in _DROPOUT or (name.endswith("_") and name[:-1] in _DROPOUT):
            return (args[0], torch.ones_like(args[0], dtype=torch.bool)) if name == "native_dropout" else args[0]
        if name == _SDPA:
            args, kwargs = _set_argument(target, args, kwargs, "dropout_p", 0.0)
        if name == "attention" and target.namespace == "attnopt":
            args, kwargs = self.prepare_attention(target, args, kwargs)
        args, kwargs = self.prepare(name, target, args, kwargs)
        return super().call_function(target, args, kwargs)

    def prepare_attention(self, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments of our own op: the same spec without dropout."""
        spec = AttentionSpec.from_json(_get_argument(target, args, kwargs, "spec"))
        return _set_argument(target, args, kwargs, "spec", spec.replace(dropout=0.0).to_json()) if spec.dropout else (args, kwargs)

    def prepare(self, name: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The operands and options to call ``target`` with instead."""
        return args, kwargs


class Float64Interpreter(GraphInterpreter):
    """Runs a graph in float64: the truth that low-precision results are measured against.

    * Floating inputs, parameters and buffers are promoted when they are fetched, one at a time.
    * An op that reads a float64 value computes in float64: its other floating operands are promoted, and a floating dtype
      baked into it (a cast to float32, softmax's dtype) becomes float64.
    * What is computed from integers only keeps its own dtype: T5 takes the bucket of a distance by truncating a float32
      logarithm, and the truncation of a more exact one would be another bucket, that is another function.
    * A tensor that an op of the graph writes into is promoted when it is made, since it may have to take float64 values.
    * ``attnopt::attention`` runs its reference kernel.
    """

    def __init__(self, gm: GraphModule, *, root: nn.Module | None = None, attributes: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(gm, root=root, attributes=attributes)
        self.written = written_bases(gm.graph)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        return _promote(value) if n in self.written else value

    def load_leaf(self, value: Any) -> Any:
        return to_dtype(value, torch.float64, torch.complex128)

    def call_guard(self, target: Any, args: Any, kwargs: Any) -> Any:
        return None  # asked already when the graph ran at its own dtype; here the dtypes differ

    def prepare_attention(self, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        args, kwargs = super().prepare_attention(target, args, kwargs)
        return _set_argument(target, args, kwargs, "backend", "reference")

    def prepare(self, name: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if name == "view" and any(isinstance(a, torch.dtype) for a in args):
            return self._bits(args), kwargs
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(x.dtype in (torch.float64, torch.complex128) for x in tensors):
            return args, kwargs
        promoted = pytree.tree_map(_promote, (args, kwargs))
        return promoted[0], promoted[1]

    def _bits(self, args: Any) -> Any:
        """A bit cast reads the representation, so it needs the value in the dtype that it had in the graph."""
        source = self._node.args[0] if self._node is not None else None
        value = source.meta.get("val") if isinstance(source, Node) else None
        return (args[0].to(value.dtype), *args[1:]) if isinstance(value, Tensor) else args


class LowPrecisionInterpreter(GraphInterpreter):
    """Runs a part of a graph that was captured in another dtype as ``model.to(dtype)`` would run it.

    Its floating inputs come in ``dtype``. Casts that stand in the graph stay, elementwise ops promote as usual, and where
    an op needs operands of one dtype (matmul, linear, convolution, normalisation) the wider ones are rounded to
    ``dtype``: a model writes ``.to(query.dtype)`` there, of which the graph has kept only the dtype of the capture.
    """

    def __init__(
        self, gm: GraphModule, dtype: torch.dtype = torch.bfloat16, *, root: nn.Module | None = None, attributes: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(gm, root=root, attributes=attributes)
        self.dtype = dtype

    def configure(self, inner: GraphInterpreter) -> None:
        assert isinstance(inner, LowPrecisionInterpreter)
        inner.dtype = self.dtype

    def load_leaf(self, value: Any) -> Any:
        return to_dtype(value, self.dtype)

    def call_guard(self, target: Any, args: Any, kwargs: Any) -> Any:
        return None

    def prepare(self, name: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        found = {x.dtype for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()}
        if self.dtype not in found or not name:
            return args, kwargs
        mixes = name in _MIXES or len(found) == 1
        changed = pytree.tree_map(lambda x: self._number(x) if isinstance(x, float) else x if mixes else to_dtype(x, self.dtype), (args, kwargs))
        return changed[0], changed[1]

    def _number(self, x: float) -> float:
        """A constant within the range of the dtype: ``masked_fill(x, m, finfo(x.dtype).min)`` was captured with a wider dtype's."""
        limit = torch.finfo(self.dtype).max
        return max(-limit, min(limit, x)) if math.isfinite(x) else x


def to_dtype(value: Any, dtype: torch.dtype, complex_dtype: torch.dtype | None = None) -> Any:
    """A floating tensor in ``dtype`` (anything else as it is).

    When the range shrinks, finite values stay finite: a mask of ``finfo.min`` becomes the ``finfo.min`` of ``dtype``, as in a model of that dtype.
    """
    if not isinstance(value, Tensor):
        return value
    if value.is_complex() and complex_dtype is not None:
        return value.to(complex_dtype)
    if not value.is_floating_point() or value.dtype == dtype:
        return value
    if torch.finfo(dtype).max < torch.finfo(value.dtype).max:
        limit = torch.finfo(dtype).max
        value = torch.where(value.isfinite(), value.clamp(-limit, limit), value)
    return value.to(dtype)


def _promote(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(torch.float64) if value.dtype in _LOW else value.to(torch.complex128) if value.dtype == torch.complex64 else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _LOW else torch.complex128 if value == torch.complex64 else value
    return value


def _position(target: Any, name: str) -> int:
    return operator.indexOf((a.name for a in target._schema.arguments), name)


def _get_argument(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
    if name in kwargs:
        return kwargs[name]
    i = _position(target, name)
    return args[i] if i < len(args) else target._schema.arguments[i].default_value


def _set_argument(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    i = _position(target, name)
    if i < len(args) and name not in kwargs:
        return (*args[:i], value, *args[i + 1 :]), dict(kwargs)
    return args, {**kwargs, name: value}
