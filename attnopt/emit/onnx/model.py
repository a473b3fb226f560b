"""An optimized module as an ONNX model in memory."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import onnx_opset
from torch.utils import _pytree as pytree

from attnopt.capture.call import Args, CallForm, Kwargs
from attnopt.capture.export import quiet
from attnopt.emit.module import OptimizedModule, graph_variants
from attnopt.emit.onnx import experts
from attnopt.emit.onnx.bounds import greatest
from attnopt.emit.onnx.chosen import by_groups
from attnopt.emit.onnx.contrib import attach_functions
from attnopt.emit.onnx.lower import Lowering
from attnopt.emit.onnx.names import dimension_names, output_names, rename_dimensions, restore_input_names
from attnopt.emit.onnx.norms import join_norms
from attnopt.emit.onnx.parts import InParts
from attnopt.emit.onnx.past import Past, PastLowering, join
from attnopt.emit.onnx.plan import Plan, Target, plan
from attnopt.emit.pt2 import export_optimized
from attnopt.errors import AttnoptError, CaptureError
from attnopt.ir.spec import AttentionSpec

IR_VERSION = 10
OPSETS = {23: onnx_opset.opset23, 24: onnx_opset.opset24}


@dataclass
class Layer:
    """One attention in the file. ``error`` is the relative distance of its result in ONNX Runtime from PyTorch's, on the captured example."""

    name: str
    words: str
    spec: AttentionSpec | None
    lowered_to: str
    why: str
    error: float | None = None
    value: Any = field(default=None, repr=False, compare=False)
    packed: Any = field(default=None, repr=False, compare=False)
    """Its result in the model, [B, Hq, Sq, Dv] and, where an operator gives it so, [B, Sq, Hq * Dv]: either may be left out of the file by the exporter."""

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "what": self.words, "lowered_to": self.lowered_to, "why": self.why, "error": self.error}


@dataclass(frozen=True)
class Lowered:
    """One attention, its form, and its result in the model: [B, Hq, Sq, Dv], and [B, Sq, Hq * Dv] where an operator gives it so."""

    spec: AttentionSpec
    plan: Plan
    value: Any
    packed: Any


class _WithSizes:
    """The operators of an opset. The size of an axis is read from the first tensor that was seen to have it, so that attentions
    of equal sizes share what is computed from them.
    """

    def __init__(self, opset: Any) -> None:
        self.opset = opset
        self.known: dict[str, Any] = {}

    def __getattr__(self, op_type: str) -> Any:
        return getattr(self.opset, op_type)

    def Shape(self, x: Any, start: int = 0, end: int | None = None) -> Any:
        name = x.shape[start].value if end == start + 1 and x.shape is not None and not isinstance(x.shape[start], int) else None
        if name is None:
            return self.opset.Shape(x, start=start, end=end)
        if name not in self.known:
            self.known[name] = self.opset.Shape(x, start=start, end=end)
        return self.known[name]


@dataclass
class Translation:
    """The translation table's entry for ``attnopt::attention``: called once for each attention, in the order of the graph."""

    opset: int
    target: Target
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Those of the program, by the names of its inputs."""
    done: list[Lowered] = field(default_factory=list)
    joins: dict[ir.Value, ir.Value] = field(default_factory=dict)
    """Values of the graph that an operator gives too."""

    def __post_init__(self) -> None:
        self.op = _WithSizes(OPSETS[self.opset])

    def _greatest(self, x: Any) -> float | None:
        return None if x.name not in self.weights else greatest(self.weights[x.name])

    def table(self) -> dict[Any, Any]:
        def attention(q, k, v, loads, sizes, spec: str, backend: str = "reference", counts=None, indices=None, block_sizes: Sequence[int] = (), tables=None):  # type: ignore[no-untyped-def]
            parsed = AttentionSpec.from_json(spec)
            dtype = str(ir.DataType(q.dtype).numpy())
            past = Past.of(q, k, v)
            form = plan(parsed, self.target, dtype, past is not None)
            given = (list(loads or ()), list(sizes or ()), parsed, dtype, [self._greatest(x) for x in loads or ()])
            if form.past and past is not None:
                lowering: Lowering = PastLowering(self.op, q, past.new_key, past.new_value, *given, past=past, joins=self.joins)
            elif form.parts:
                lowering = InParts(self.op, q, k, v, *given, name=f"attnopt/{len(self.done)}", counts_keys=self.opset >= 24)
            else:
                lowering = Lowering(self.op, q, k, v, *given)
            result = lowering.build(form)
            self.done.append(Lowered(parsed, form, result, lowering.as_packed(result)))
            return result

        return {torch.ops.attnopt.attention.default: attention, **experts.table(OPSETS[self.opset])}


@dataclass
class Draft:
    """A model that is to be written, and the call of a module that it was made of: ``run(*args, **kwargs)``."""

    model: ir.Model
    layers: list[Layer]
    run: Callable[..., Any]
    args: Args
    kwargs: Kwargs
    one_row: bool = False
    """Several new tokens after a past are taken with a batch of one only."""
    beside: dict[str, str] = field(default_factory=dict)
    """Texts of the files that belong beside it, by name."""


def onnx_model(optimized: OptimizedModule, opset: int, target: Target, strip_metadata: bool = False) -> Draft:
    """``optimized`` holds a captured graph with every attention as ``attnopt::attention``.

    What torch.onnx says of nodes (source lines, text of the graph) is dropped; a node that gives the result of an attention names it as ``attnopt.site``.
    ``strip_metadata``: no metadata at all.
    """
    variants = graph_variants(optimized)
    if not variants:
        raise CaptureError(f"{type(optimized).__name__} holds no captured graph to export: torch.export has to take the model for that.")
    example = variants[-1].example
    args, kwargs = CallForm(optimized.forward).spread(example.args, example.kwargs, optimized._attnopt.positional)
    with torch.no_grad(), quiet():
        program = export_optimized(optimized)
        results = plain(optimized(*args, **kwargs))
    translation = Translation(opset, target, weights_of(program))
    model = translated(program, translation, results)
    layers = _layers(optimized, translation)
    if not strip_metadata:
        record(model, layers, target)
    one_row = any(x.plan.past for x in translation.done)
    args, kwargs = (example.one_row() if one_row else None) or (example.args, example.kwargs)
    return Draft(model, layers, optimized, args, kwargs, one_row)


def translated(program: torch.export.ExportedProgram, translation: Translation, results: Any) -> ir.Model:
    """``program`` in ONNX, with readable names and without metadata. ``results`` are some of its results, with their names."""
    inputs = [x for x in program.graph_signature.user_inputs if isinstance(x, str)]
    model = _exported(program, translation.opset, translation, output_names(results, inputs))
    join(model, translation.joins)
    by_groups(model)
    if translation.target == "ort":
        join_norms(model)
    attach_functions(model, translation.opset)
    restore_input_names(model, inputs)
    rename_dimensions(model, dimension_names(list(model.graph.inputs)))
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "attnopt", version("attnopt")
    _clear(model)
    return model


def weights_of(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """Parameters, buffers and constants by the names of the inputs that stand for them."""
    s = program.graph_signature
    held = {**dict(program.named_parameters()), **dict(program.named_buffers()), **{n: x for n, x in program.constants.items() if isinstance(x, torch.Tensor)}}
    return {n: held[t] for names in (s.inputs_to_parameters, s.inputs_to_buffers, s.inputs_to_lifted_tensor_constants) for n, t in names.items() if t in held}


def record(model: ir.Model, layers: Sequence[Layer], target: Target) -> None:
    """Write into the model's metadata what made it, and for each attention what it computes and what it became; into its node, which it is."""
    model.metadata_props["attnopt.version"] = version("attnopt")
    model.metadata_props["attnopt.target"] = target
    for i, layer in enumerate(layers):
        for value in (layer.value, layer.packed):
            if value is not None and value.producer() is not None:
                value.producer().metadata_props["attnopt.site"] = layer.name
        facts = {"name": layer.name, "lowered_to": layer.lowered_to, "why": layer.why, "spec": None if layer.spec is None else json.loads(layer.spec.to_json())}
        model.metadata_props[f"attnopt.site.{i}"] = json.dumps(facts, separators=(",", ":"))


def _clear(model: ir.Model) -> None:
    """Drop metadata and descriptions of everything."""
    model.doc_string = model.graph.doc_string = None
    nodes = [*model.graph.all_nodes(), *(n for f in model.functions.values() for n in f.all_nodes())]
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values(), *(v for n in nodes for v in n.outputs)]
    for x in (model, model.graph, *nodes, *values):
        x.metadata_props.clear()
    for node in nodes:
        node.doc_string = None


def _exported(program: torch.export.ExportedProgram, opset: int, translation: Translation, outputs: list[str]) -> ir.Model:
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            found = torch.onnx.export(
                program, dynamo=True, opset_version=opset, custom_translation_table=translation.table(), output_names=outputs, verbose=False, optimize=True
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        text = " ".join(str(reason).split())[:300]
        unknown = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
        if unknown is None:
            raise AttnoptError(f"torch.onnx cannot export this model: {text}") from error
        hint = "Choose an implementation of that part of the model in basic operators."
        raise AttnoptError(f"torch.onnx cannot export this model: it has no translation of the operator {unknown.group(1)}.", hint) from error
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    assert found is not None
    return found.model


def _layers(optimized: OptimizedModule, translation: Translation) -> list[Layer]:
    """What was lowered, beside what the report of the passes says of each attention."""
    report = optimized.attnopt_report
    replaced = [s for s in report.sites if s.status == "replaced"]
    if [s.spec.to_json() for s in replaced if s.spec is not None] != [x.spec.to_json() for x in translation.done]:
        names = [f"attention {i}" for i in range(len(translation.done))]
    else:
        names = [s.name for s in replaced]
    layers = [
        Layer(n, str(x.spec), x.spec, x.plan.lowered_to, x.plan.why, value=x.value, packed=x.packed) for n, x in zip(names, translation.done, strict=True)
    ]
    return layers + [Layer(s.name, "not replaced", None, "as torch.onnx exports it", s.why) for s in report.attentions if s.status != "replaced"]


def plain(value: Any) -> Any:
    """Results of a library's class as mappings, so that their fields have names."""
    if isinstance(value, dict) or hasattr(value, "items"):
        return {k: plain(v) for k, v in value.items()}
    return value


def tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
