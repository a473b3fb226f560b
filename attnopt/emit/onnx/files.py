"""From one ONNX file to another whose attentions are fused nodes: written beside its place, compared there, and only then moved."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, NameFixPass, RemoveUnusedNodesPass

from attnopt.capture.onnx.examples import dimension, examples, inputs_of
from attnopt.capture.onnx.lift import lift
from attnopt.capture.onnx.read import prepared, read_model
from attnopt.capture.onnx.translate import LiftedFile, Observed, path_of
from attnopt.config import OptimizeConfig
from attnopt.emit.onnx.chosen import by_groups
from attnopt.emit.onnx.contrib import attach_functions
from attnopt.emit.onnx.layers import distance
from attnopt.emit.onnx.model import IR_VERSION, OPSETS, Layer, record
from attnopt.emit.onnx.plan import OPERATORS, TARGETS, Target
from attnopt.emit.onnx.report import OnnxReport
from attnopt.emit.onnx.run import OnnxSession, check_file
from attnopt.emit.onnx.splice import KEPT, FileLayer, splice
from attnopt.emit.onnx.write import check_place, external_name, refuse_bfloat16, shapes_of
from attnopt.errors import AttnoptError, VerificationError
from attnopt.passes.pipeline import run_pipeline
from attnopt.remarks import Remark
from attnopt.report import Report, Verdict

if TYPE_CHECKING:
    from attnopt.capture.onnx.read import Source

Inputs = dict[str, torch.Tensor]
Names = dict[str, tuple[str | None, ...]]
"""For each input the names of its dimensions; None for a constant size."""
Sites = list[tuple[str, torch.Tensor, torch.Tensor]]
"""For each attention its name, the original's result, and that of the fused node, on the example."""
Compare = Callable[[Callable[..., Any], Callable[..., Any], Inputs, Names, LiftedFile, Sites], Verdict]
"""Compares two files on inputs made from the example, where both take a tensor for each name, and their attentions."""
Progress = Callable[[str, int, int], None]

@dataclass
class FileReport(OnnxReport):
    """What became of a file. ``model`` is the result; ``path`` is empty where none was written."""

    source: str = ""
    analysis: Report = field(default_factory=Report)
    """What was found: every softmax with its spec or the reason why it has none, and remarks."""
    conditions: list[str] = field(default_factory=list)
    """Equalities of sizes, beyond those that names of dimensions say, without which the file's own operators do not fit together."""
    model: ir.Model | None = field(default=None, repr=False, compare=False)

    @property
    def missed(self) -> list[Layer]:
        """Attentions that stayed as they were, and are no fused nodes."""
        return [x for x in self.layers if x.spec is None and x.lowered_to == KEPT]

    @property
    def replaced(self) -> list[Layer]:
        return [x for x in self.layers if x.spec is not None]

    def to_dict(self) -> dict[str, Any]:
        found = self.analysis.to_dict()
        return {
            "source": self.source,
            **super().to_dict(),
            "path": self.path or None,
            "conditions": self.conditions,
            "sites": found["sites"],
            "remarks": found["remarks"],
        }


def rewrite_file(
    source: Source,
    output: str | os.PathLike[str] | None,
    given: Mapping[str, Any] | None,
    opset: int,
    target: Target,
    compare: Compare,
    progress: Progress = lambda *_: None,
) -> FileReport:
    """Write ``source`` anew with its attentions fused, and verify it. Nothing is left, and a file that was there before stays, when anything fails.

    Without ``output`` the result is only in the report. Raises AttnoptError for what cannot be read, run or written, and
    VerificationError when the result is over its budget.
    """
    start = time.perf_counter()
    if target not in TARGETS:
        raise AttnoptError(f"Target {target!r} is unknown; supported are {', '.join(TARGETS)}.")
    if opset not in OPSETS:
        raise AttnoptError(f"Opset {opset} is not supported; supported are {' and '.join(map(str, OPSETS))} (Attention is in the standard since 23).")
    if output is not None:
        check_place(output)
    progress("read", 0, 1)
    original = read_model(source)
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "the model"
    refuse_bfloat16([torch.bfloat16 for v in _tensors(original) if v.dtype is ir.DataType.BFLOAT16][:1], name)
    place = None if output is None else Path(output)
    try:
        with tempfile.TemporaryDirectory(prefix=".attnopt.", dir=None if place is None else place.parent) as folder:
            job = _Job(original, name, Path(folder), target, compare, progress)
            report = job.run(Path(source) if isinstance(source, (str, os.PathLike)) else None, given, opset, place.name if place is not None else "model.onnx")
            if place is not None and report.replaced:
                for file in (f"{place.name}.data", place.name):  # the weights first: a model without them is no model
                    if (Path(folder) / file).exists():
                        os.replace(Path(folder) / file, place.parent / file)  # noqa: PTH105 - over a file that exists
                report.path = str(place)
    except OSError as error:
        raise AttnoptError(f"{place or name} cannot be written: {error.strerror or error}.") from error
    report.seconds = time.perf_counter() - start
    return report


@dataclass
class _Job:
    original: ir.Model
    name: str
    folder: Path
    target: Target
    compare: Compare
    progress: Progress

    def run(self, path: Path | None, given: Mapping[str, Any] | None, opset: int, file: str) -> FileReport:
        before = OnnxSession(path if path is not None else self._save(self.original.clone(), "original.onnx"), self.name)
        inputs, sizes = self._example(before, given)
        self.progress("capture", 0, 1)
        model = prepared(self.original.clone(), opset)
        there = [Layer(path_of(n) or str(n.name), "fused already", None, n.op_type, "an operator of the file") for n in model.graph if n.op_type in OPERATORS]
        # A size of one is broadcast, and says nothing of others: the file is read at sizes of at least two.
        larger, sizes = (inputs, sizes) if min(sizes.values(), default=2) > 1 else self._example(before, None)
        lifted = lift(model, sizes, lambda: self._observed(model, larger))
        self.progress("passes", 0, 1)
        result = run_pipeline(lifted.graph_module, OptimizeConfig(backend="reference", disable_passes=("merge-projections", "share-block-maps")))
        layers = splice(model, lifted.graph_module, result, self.target)
        attach_functions(model, int(model.opset_imports[""]))
        analysis = Report(result.sites, list(result.remarks))
        for site, layer in zip(analysis.attentions, layers, strict=True):
            site.kernel, site.why = layer.lowered_to, layer.why
            if layer.spec is None:
                site.status, site.kernel = "missed", ""
        unknown = {op: n for op, n in lifted.opaque.items() if op not in OPERATORS}
        if unknown:
            words = ", ".join(f"{op} ({n})" if n > 1 else op for op, n in sorted(unknown.items()))
            analysis.remarks.append(Remark("AO307", f"Of the results of {words} only the shape is known."))
        report = FileReport(
            "", int(model.opset_imports[""]), self.target, shapes_of(inputs_of(model)), shapes_of(model.graph.outputs), [*layers, *there], Verdict()
        )
        report.source, report.analysis, report.conditions, report.model = self.name, analysis, lifted.conditions, model
        if not report.replaced:
            return report
        by_groups(model)
        _tidy(model)
        record(model, layers, self.target)
        draft = self._save(model, file)
        if _is_valid(path if path is not None else self.folder / "original.onnx"):
            check_file(draft, "the rewritten model")
        after = OnnxSession(draft, "the rewritten model")
        names = {str(v.name): tuple(dimension(d, str(v.name), i) for i, d in enumerate(v.shape or ())) for v in inputs_of(model)}
        self.progress("verify", 0, 1)
        report.verdict = analysis.verdict = self.compare(before, after, inputs, names, lifted, self._sites(model, layers, inputs))
        if not report.verdict.passed:
            worst = report.verdict.worst
            detail = "nothing could be compared" if worst is None else f"{worst.name}: error {worst.error:.2e}, budget {worst.budget:.2e}. {worst.detail}"
            raise VerificationError(f"The rewritten model differs from {self.name} in ONNX Runtime, so nothing was written: {detail.strip()}")
        return report

    def _example(self, run: OnnxSession, given: Mapping[str, Any] | None) -> tuple[Inputs, dict[str, int]]:
        """The first example that the file takes."""
        refusals: list[Exception] = []
        for inputs, sizes in examples(self.original, given):
            try:
                run(**inputs)
            except Exception as error:  # noqa: BLE001 - a runtime raises what it likes
                refusals.append(error)
            else:
                return inputs, sizes
        raise AttnoptError(
            f"ONNX Runtime does not run {self.name} on {'the inputs that were given' if given else 'inputs made for it'}: {' '.join(str(refusals[0]).split())[:300]}",
            "Give inputs that it takes: --input NAME=DTYPE[SIZES], or example_inputs in Python.",
        ) from refusals[0]

    def _save(self, model: ir.Model, file: str) -> Path:
        place = self.folder / file
        data = external_name(model, place)
        if data is None:
            ir.external_data.load_to_model(model)
        ir.save(model, place, external_data=data)
        return place

    def _observed(self, model: ir.Model, inputs: Inputs) -> dict[str, Observed]:
        """Dtypes and shapes of all tensors inside of ``model`` in a run."""
        names = [v.name for n in model.graph for v in n.outputs if v.name and isinstance(v.type, (ir.TensorType, type(None))) and v.uses()]
        return {n: (x.dtype, tuple(x.shape)) for n, x in zip(names, self._values(model, names, inputs), strict=True)}

    def _sites(self, model: ir.Model, layers: Sequence[FileLayer], inputs: Inputs) -> Sites:
        """Each attention's result on the example beside that of the nodes that it stands for; sets ``error`` of each."""
        old = {v.name for n in self.original.graph for v in n.outputs}
        here = {id(v) for n in model.graph for v in n.outputs}
        shown = [x for x in layers if x.value is not None and id(x.value) in here and x.old in old]
        if not shown:
            return []
        expected, got = self._values(self.original, [x.old for x in shown], inputs), self._values(model, [x.value.name for x in shown], inputs)
        for layer, e, g in zip(shown, expected, got, strict=True):
            layer.error = distance(g, e)
        return [(x.name, e, g) for x, e, g in zip(shown, expected, got, strict=True)]

    def _values(self, model: ir.Model, names: Sequence[str], inputs: Inputs) -> list[torch.Tensor]:
        """Values inside of a model in a run."""
        copy = model.clone()
        made = {v.name: v for n in copy.graph for v in n.outputs}
        have = {v.name for v in copy.graph.outputs}
        copy.graph.outputs.extend(made[n] for n in dict.fromkeys(names) if n not in have)
        session = OnnxSession(self._save(copy, "values.onnx"), self.name)
        found = dict(zip((o.name for o in session.session.get_outputs()), session(**inputs), strict=True))
        return [found[n] for n in names]


def _tidy(model: ir.Model) -> None:
    for p in (RemoveUnusedNodesPass(), CommonSubexpressionEliminationPass(), RemoveUnusedNodesPass(), NameFixPass()):
        p(model)
    model.ir_version = max(model.ir_version, IR_VERSION)


def _is_valid(path: Path) -> bool:
    """Whether the original passes the check that the result should pass."""
    try:
        check_file(path, "the original")
    except VerificationError:
        return False
    return True


def _tensors(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]
