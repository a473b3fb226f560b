"""Attentions that were found in the graph of an ONNX file, written into that file in place of the nodes that they stand for."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import evaluator
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.capture.onnx.translate import ONNX
from attnopt.emit.onnx.bounds import greatest
from attnopt.emit.onnx.lower import Lowering
from attnopt.emit.onnx.model import Layer
from attnopt.emit.onnx.parts import InParts
from attnopt.emit.onnx.plan import Plan, Target, plan
from attnopt.emit.onnx.tape import Tape
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.passes.attention_nodes import attentions, spec_of
from attnopt.passes.edit import ORIGINAL
from attnopt.passes.group_heads import site_name
from attnopt.passes.pipeline import PipelineResult
from attnopt.passes.raise_attention import SITE

Rule = Callable[["Writer", dict[str, Any]], ir.Value]
RULES: dict[str, Rule] = {}


class Unwritable(Exception):
    """A node of the graph that no ONNX operators were found for."""


@dataclass
class FileLayer(Layer):
    """``old``: the name of the value in the file that this attention's result stands for."""

    old: str = field(default="", repr=False, compare=False)


def splice(model: ir.Model, captured: fx.GraphModule, result: PipelineResult, target: Target) -> list[FileLayer]:
    """Replace every raised attention of ``result`` in ``model``, whose graph is ``captured``. Gives all attentions, in order.

    One that has no fused form stays as it is: its parts are what the file holds already.
    """
    originals = {n.name: n.meta.get(ONNX) for n in captured.graph.nodes}
    found = {site_name(n): n for n in attentions(result.graph_module.graph)}
    writer = Writer(_homes(captured), int(model.opset_imports[""]))
    layers: list[FileLayer] = []
    for i, site in enumerate(s for s in result.sites if s.is_attention):
        node = found.get(site.name)
        if node is None:
            layers.append(FileLayer(site.name, "not replaced", None, KEPT, site.why))
            continue
        spec = spec_of(node)
        dtype = str(N.value(_node(node.args[0])).dtype).removeprefix("torch.")
        form = plan(spec, target, dtype)
        if not form.fused:
            layers.append(FileLayer(site.name, str(spec), None, KEPT, form.why))
            continue
        known = dict(writer.known)
        try:
            old, new = _replace(writer, node, spec, form, dtype, originals, f"attnopt/{i}")
        except Unwritable as error:
            writer.known = known
            layers.append(FileLayer(site.name, str(spec), None, KEPT, str(error)))
            continue
        layers.append(FileLayer(site.name, str(spec), spec, form.lowered_to, form.why, value=new, old=old))
    return layers


KEPT = "as it was"
"""What an attention that stays in the file's own operators is lowered to."""


def _replace(
    writer: Writer, node: fx.Node, spec: AttentionSpec, form: Plan, dtype: str, originals: Mapping[str, ir.Value | None], prefix: str
) -> tuple[str, ir.Value]:
    """The name of the value that was replaced, and the new value."""
    out = node
    while SITE not in out.meta:
        (out,) = out.users
    old = originals.get(str(out.meta[ORIGINAL]))
    producer = None if old is None else old.producer()
    if old is None or producer is None or producer.graph is None:
        raise Unwritable("its result is no value of the file")
    tape = writer.begin()
    q, k, v = (writer.operand(_node(x)) for x in node.args[:3])
    loads, sizes = ([writer.value(x) if isinstance(x, fx.Node) else x for x in _list(node.args[i])] for i in (3, 4))
    with evaluator.default_as(_Recorder(tape)):
        given = (tape, q, k, v, loads, sizes, spec, dtype, [_greatest(x) for x in loads])
        lowering = InParts(*given, name=f"{prefix}/part", counts_keys=writer.opset >= 24) if form.parts else Lowering(*given)
        writer.known[node] = lowering.build(form)
    new = writer.value(out)
    new.type, new.shape = old.type, old.shape
    made = tape.named(prefix)
    graph = producer.graph
    assert isinstance(graph, ir.Graph)
    graph.insert_before(producer, made)
    name = str(old.name)
    if old.is_graph_output():
        old.name, new.name = f"{prefix}/replaced", name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    writer.replaced[old] = new
    return name, new


def _greatest(x: ir.Value) -> float | None:
    return None if x.const_value is None or x.is_graph_input() else greatest(torch.from_numpy(x.const_value.numpy()))


def _node(x: Any) -> fx.Node:
    assert isinstance(x, fx.Node)
    return x


def _list(x: Any) -> list[Any]:
    assert isinstance(x, (list, tuple))
    return list(x)


def _homes(captured: fx.GraphModule) -> dict[str, tuple[ir.Value, int]]:
    """For each symbol an input of the file, and the axis of it, that has this size."""
    homes: dict[str, tuple[ir.Value, int]] = {}
    for node in captured.graph.find_nodes(op="placeholder"):
        for axis, n in enumerate(N.shape(node)):
            if n.op == "sym":
                homes.setdefault(n.value[0], (node.meta[ONNX], axis))
    return homes


class _Tape(Tape):
    """Sizes of operands are read from the inputs of the file, so that attentions of equal sizes share what is computed from them."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[ir.Value, list[ir.Value | None]] = {}

    def Shape(self, x: ir.Value, start: int = 0, end: int | None = None) -> ir.Value:
        known = self.sizes.get(x, [])[start:end] if end == start + 1 else []
        return known[0] if known and known[0] is not None else super().Shape(x, start, end)


@dataclass
class _Recorder:
    """An evaluator of onnxscript: a call of one of its operators becomes a node on the tape."""

    tape: _Tape

    def eval_op(self, op: Any, args: Sequence[ir.Value | None], kwargs: Mapping[str, Any]) -> ir.Value | Sequence[ir.Value]:
        n = len(op.op_schema.outputs)
        made = self.tape.op_multi_out(op.name, args, kwargs, num_outputs=n, domain=op.opset.domain)
        return made if n > 1 else made[0]

    def eval_function(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ir.Value:
        raise NotImplementedError(f"{function} is a function of onnxscript, and a lowering is made of operators")


@dataclass
class Writer:
    """Writes what passes put between the values of the file and an attention: views, casts, joins and sizes."""

    homes: Mapping[str, tuple[ir.Value, int]] = field(default_factory=dict)
    opset: int = 24
    """That of the file as it will be."""
    tape: Any = None
    known: dict[fx.Node, ir.Value] = field(default_factory=dict)
    replaced: dict[ir.Value, ir.Value] = field(default_factory=dict)
    """Values of the file whose readers now read another one."""

    def begin(self) -> Any:
        self.tape = _Tape()
        return self.tape

    def operand(self, x: fx.Node) -> ir.Value:
        """The value of a node whose sizes will be asked for."""
        value = self.value(x)
        held = N.value(x)
        if value.dtype is None or value.shape is None:
            value.dtype = ir.DataType.from_numpy(_numpy(held.dtype))
            value.shape = ir.Shape([n if isinstance(n, int) else None for n in held.shape])
        self.tape.sizes[value] = [self._size(n) for n in N.shape(x)]
        return value

    def _size(self, n: E.Expr) -> ir.Value | None:
        if n.is_const:
            return self.ints([int(n.value)])
        if n.op == "sym" and n.value[0] in self.homes:
            value, axis = self.homes[n.value[0]]
            return self.tape.op("Shape", [value], {"start": axis, "end": axis + 1})
        return None

    def value(self, x: Any) -> ir.Value:
        """The value of a node: the file's own, or one that is written now. A size is an int64 scalar."""
        if isinstance(x, int):
            return self.ints(x)
        assert isinstance(x, fx.Node)
        if x not in self.known:
            held = x.meta.get(ONNX)
            if held is not None and SITE not in x.meta:
                return self.replaced.get(held, held)
            self.known[x] = self._written(x)
        return self.known[x]

    def _written(self, x: fx.Node) -> ir.Value:
        name = N.op_name(x)
        if name in RULES:
            return RULES[name](self, N.arguments(x))
        if x.target in _ARITHMETIC:
            op_type = _ARITHMETIC[x.target]
            a, b = (self.value(a) for a in x.args)
            if op_type == "FloorDiv":  # ONNX divides integers towards zero; less the remainder the division is exact
                return self.tape.Div(self.tape.Sub(a, self.tape.Mod(a, b)), b)
            return getattr(self.tape, op_type)(a, b)
        raise Unwritable(f"{N.said(x)} cannot be written in ONNX operators")

    def ints(self, value: int | list[int]) -> ir.Value:
        return self.tape.Constant(value=ir.tensor(np.array(value, dtype=np.int64)))

    def sizes(self, items: Any) -> ir.Value:
        """Sizes as one vector."""
        if all(isinstance(n, int) for n in items):
            return self.ints(list(items))
        return self.tape.Concat(*(self.vector(n) for n in items), axis=0)

    def vector(self, n: Any) -> ir.Value:
        return self.ints([n]) if isinstance(n, int) else self.tape.Reshape(self.value(n), self.ints([1]))


_ARITHMETIC = {
    operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.floordiv: "FloorDiv", operator.mod: "Mod", torch.sym_min: "Min", torch.sym_max: "Max"
}  # fmt: skip


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        RULES.update({f"aten::{n}": f for n in names})
        return f

    return register


@rule("reshape", "view")
def _reshape(w: Writer, args: dict[str, Any]) -> ir.Value:
    sizes = _list(args.get("shape", args.get("size")))
    return w.tape.Reshape(w.value(args["self"]), w.sizes(sizes), allowzero=0 if -1 in sizes else 1)


@rule("expand")
def _expand(w: Writer, args: dict[str, Any]) -> ir.Value:
    # -1 keeps a size, as 1 does in ONNX
    return w.tape.Expand(w.value(args["self"]), w.sizes([1 if n == -1 else n for n in args["size"]]))


@rule("permute")
def _permute(w: Writer, args: dict[str, Any]) -> ir.Value:
    rank = len(N.shape(args["self"]))
    return w.tape.Transpose(w.value(args["self"]), perm=[N.axis(d, rank) for d in args["dims"]])


@rule("transpose")
def _transpose(w: Writer, args: dict[str, Any]) -> ir.Value:
    rank = len(N.shape(args["self"]))
    perm, (a, b) = list(range(rank)), (N.axis(args[n], rank) for n in ("dim0", "dim1"))
    perm[a], perm[b] = perm[b], perm[a]
    return w.tape.Transpose(w.value(args["self"]), perm=perm)


@rule("unsqueeze")
def _unsqueeze(w: Writer, args: dict[str, Any]) -> ir.Value:
    return w.tape.Unsqueeze(w.value(args["self"]), w.ints([args["dim"]]))


@rule("select")
def _select(w: Writer, args: dict[str, Any]) -> ir.Value:
    return w.tape.Gather(w.value(args["self"]), w.value(args["index"]), axis=args["dim"])


@rule("slice")
def _slice(w: Writer, args: dict[str, Any]) -> ir.Value:
    start, end = args["start"] or 0, args["end"]
    end = (1 << 63) - 1 if end is None else end
    x = w.value(args["self"])
    return w.tape.Slice(x, w.vector(start), w.vector(end), w.ints([args["dim"]]), w.ints([args["step"]]))


@rule("cat")
def _cat(w: Writer, args: dict[str, Any]) -> ir.Value:
    return w.tape.Concat(*(w.value(x) for x in args["tensors"]), axis=args["dim"])


@rule("matmul")
def _matmul(w: Writer, args: dict[str, Any]) -> ir.Value:
    return w.tape.MatMul(w.value(args["self"]), w.value(args["other"]))


@rule("to", "_to_copy")
def _to(w: Writer, args: dict[str, Any]) -> ir.Value:
    return w.tape.Cast(w.value(args["self"]), to=int(ir.DataType.from_numpy(_numpy(args["dtype"]))))


@rule("scalar_tensor")
def _scalar(w: Writer, args: dict[str, Any]) -> ir.Value:
    s, to = args["s"], _numpy(args["dtype"] or torch.float32)
    if isinstance(s, fx.Node):
        return w.tape.Cast(w.value(s), to=int(ir.DataType.from_numpy(to)))
    return w.tape.Constant(value=ir.tensor(np.array(s, dtype=to)))


@rule("full")
def _full(w: Writer, args: dict[str, Any]) -> ir.Value:
    filled = _scalar(w, {"s": args["fill_value"], "dtype": args["dtype"]})
    return filled if not args["size"] else w.tape.Expand(filled, w.sizes(args["size"]))


@rule("sym_size")
def _size(w: Writer, args: dict[str, Any]) -> ir.Value:
    rank = len(N.shape(args["self"]))
    d = N.axis(args["dim"], rank)
    return w.tape.Squeeze(w.tape.Shape(w.value(args["self"]), start=d, end=d + 1))


def _numpy(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty((), dtype=dtype).numpy().dtype
