"""The Python interface, where all the parts meet: ``optimize``, ``inspect``, ``verify`` and the torch.compile backend."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn

import attnopt.kernels.ops  # noqa: F401 - registers the operator that the passes put into graphs
from attnopt.capture.call import Args, CallForm, Kwargs
from attnopt.capture.captured import Captured, ModelError
from attnopt.capture.clone import clone_tree, tensors_of
from attnopt.capture.dynamo import Frames, compile_frame
from attnopt.capture.export import DynamicShapes, capture
from attnopt.capture.given import given_call
from attnopt.capture.relations import relations_of
from attnopt.capture.run import device_of, undisturbed
from attnopt.capture.with_past import WithPast
from attnopt.config import OptimizeConfig
from attnopt.emit.function import graph_function, is_state
from attnopt.emit.module import OptimizedModule, graph_variants, optimized_module
from attnopt.emit.onnx import WithPastForm, check_past, check_request
from attnopt.emit.variant import CompiledVariant, GraphVariant, Variant
from attnopt.errors import AttnoptError, CaptureError, VerificationError, named
from attnopt.onnx_export import export_captured, export_static
from attnopt.passes.pipeline import PipelineResult, passes, run_pipeline
from attnopt.remarks import Remark
from attnopt.report import Report, Verdict
from attnopt.serving import rewrite, serve
from attnopt.varied import varied_shapes
from attnopt.verify import GraphPair, verify_and_repair, verify_modules
from attnopt.verify.merged import verify_merged

if TYPE_CHECKING:
    from attnopt.emit.onnx.plan import Target
    from attnopt.emit.onnx.report import OnnxReport

Progress = Callable[[str, int, int], None]
"""Called with a stage (``capture``, ``passes``, ``verify``), how much of it is done, and how much there is (0: unknown)."""


def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = "auto",
    config: OptimizeConfig | None = None,
    copy: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """The same model with every attention replaced by the fastest kernel that computes the same function, and verified.

    ``example_inputs`` is a tuple of positional arguments, one tensor, or a mapping of keyword arguments; ``kwargs`` are
    further keyword arguments. Without inputs, or for a model that torch.export refuses, the model is optimized when it
    runs, by torch.compile (remark AO302). ``dynamic_shapes``: ``"auto"`` leaves batch and sequence open, ``"static"``
    nothing, anything else is torch.export's own argument by name.

    What comes back is an instance of a subclass of the model's class, with identical ``state_dict`` keys. It shares the
    parameters with ``model`` (``copy``: has copies), which is not changed. It captures the model again when it is called in another mode,
    dtype, device or form; ``.attnopt_report`` tells what was done.

    With ``config.kv_cache`` the result is a ``ServingModel`` of a decoder instead: see ``attnopt.serving``.

    Raises AttnoptError for bad options, ModelError (a CaptureError) when the model itself fails with the inputs,
    CaptureError when ``config.capture`` is "export" and the model cannot be exported, and VerificationError when
    ``config.require_all`` is set and an attention stayed as it was.
    """
    config = _checked(model, config)
    inputs = given_call(model, example_inputs, kwargs)
    if config.kv_cache:
        if inputs is None:
            raise AttnoptError("kv_cache needs example_inputs: the model is captured on them.")
        return serve(model, *inputs, dynamic_shapes, config, progress)
    builder = _Builder(config if inputs is not None else replace(config, capture="dynamo"), dynamic_shapes)
    optimized = optimized_module(model, builder, config.max_variants, copy_parameters=copy)
    if inputs is None:
        builder.compiled("No example inputs were given, so the model is optimized when it runs, by torch.compile.")
        optimized._attnopt.latest = builder.lazy
        return optimized
    builder.progress = progress
    try:
        optimized.attnopt_capture(*inputs)
    finally:
        builder.progress = None
    report = optimized.attnopt_report
    if config.require_all and report.missed:
        names = ", ".join(s.name for s in report.missed)
        raise VerificationError(f"{len(report.missed)} of {len(report.attentions)} attentions were not replaced: {names}.", "inspect() says why for each of them.")
    return optimized


def inspect(
    model: nn.Module,
    example_inputs: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = "auto",
    config: OptimizeConfig | None = None,
) -> Report:
    """What ``optimize`` would find and do, site by site. Changes nothing, compares nothing, and runs at no other sizes."""
    config = _checked(model, config)
    inputs = given_call(model, example_inputs, kwargs)
    if inputs is None:
        raise AttnoptError("inspect needs example_inputs: it captures the model on them.")
    if config.kv_cache:
        return rewrite(model, *inputs, dynamic_shapes, config, check=False)[2]
    if config.capture != "dynamo":
        try:
            captured = capture(model, *inputs, dynamic_shapes=dynamic_shapes, check=False)
        except ModelError:
            raise
        except CaptureError as error:
            if config.capture == "export":
                raise
            why = Remark("AO302", error.message, source=error.source)
        else:
            start = time.perf_counter()
            result = run_pipeline(captured.graph_module, config)
            seconds = {"capture": captured.seconds, "passes": time.perf_counter() - start}
            _relate(result, captured)
            return Report(result.sites, [*captured.remarks, *result.remarks], seconds=seconds)
    else:
        why = Remark("AO302", "capture='dynamo' was asked for.")
    frames = Frames()
    copy = clone_tree(model)
    compiled = torch.compile(copy.forward, backend=_backend(replace(config, inductor=False), frames))
    with undisturbed(device_of(copy)), torch.no_grad():
        _run_model(compiled, copy, *inputs)
    return frames.merged(why)


def verify(
    original: nn.Module, optimized: Callable[..., Any], example_inputs: Any, *, kwargs: Mapping[str, Any] | None = None, progress: Progress | None = None
) -> Verdict:
    """Compare any module with the original as black boxes, on inputs made from the example; see ``attnopt.verify``.

    Sizes vary where ``optimized`` came from ``optimize`` and left them open. Raises what the original raises on the example.
    """
    inputs = given_call(original, example_inputs, kwargs)
    if inputs is None:
        raise AttnoptError("verify needs example_inputs: it runs both models on them.")
    args, keywords = inputs
    dynamic = None
    if isinstance(optimized, OptimizedModule) and graph_variants(optimized):
        args, keywords = CallForm(original.forward).normalise(args, keywords)
        dynamic = varied_shapes(graph_variants(optimized)[0].example)
    return verify_modules(original, optimized, args, keywords, dynamic, progress=_verify_progress(progress))


# ---- torch.compile

_frames = Frames()


def dynamo_backend(gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """``torch.compile(model, backend="attnopt")``: the same passes just in time, then Inductor.

    ``options`` are fields of OptimizeConfig, such as ``{"inductor": False, "backend": "reference"}``; ``mode`` goes to Inductor.
    Verification needs the whole model and is left to ``optimize``. ``attnopt.compile_report()`` tells what was done.
    """
    known = {f.name for f in fields(OptimizeConfig)}
    unknown = sorted(set(options or {}) - known)
    if unknown:
        raise AttnoptError(f"The backend attnopt has no option {unknown[0]!r}; supported are {', '.join(sorted(known))}.")
    return _backend(OptimizeConfig(**dict(options or {})), _frames, mode)(gm, example_inputs)


def compile_report(clear: bool = False) -> Report:
    """What ``torch.compile(..., backend="attnopt")`` did in this process so far, over all functions that it compiled."""
    report = _frames.merged(Remark("AO304", "Functions compiled just in time are not compared with the original."))
    if clear:
        _frames.reports.clear()
        _frames.broken = False
    return report


def _backend(config: OptimizeConfig, frames: Frames, mode: str | None = None) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    if config.kv_cache:
        raise AttnoptError("kv_cache needs the whole model, and a compiler gives parts of it; attnopt.optimize(model, inputs, config=...) makes a serving model.")
    if config.merge_kv_heads:
        raise AttnoptError("merge_kv_heads needs the whole model, and a compiler gives parts of it; it goes with example inputs and a model that torch.export takes.")
    passes(config)  # a misspelt name is an error of the caller, not of the compiler

    def rewrite(graph: fx.GraphModule) -> tuple[fx.GraphModule, Report]:
        start = time.perf_counter()
        result = run_pipeline(graph, config)
        return result.graph_module, Report(result.sites, result.remarks, seconds={"passes": time.perf_counter() - start})

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_frame(gm, example_inputs, rewrite, frames, config.inductor, mode)

    return backend


def _differs(verdict: Verdict) -> Remark:
    worst = verdict.worst
    assert worst is not None
    return Remark("AO902", f"{worst.name}: error {worst.error:.2e}, budget {worst.budget:.2e}. {worst.detail}".strip())


def _relate(result: PipelineResult, captured: Captured) -> None:
    """Record with each site the relations between input sizes on which its proofs may rest."""
    for site in result.sites:
        if site.spec is not None:
            site.relations = relations_of(site.spec, captured.relations)


# ---- one variant of an optimized module


@dataclass(eq=False)
class _Builder:
    """Captures, rewrites and verifies the model for one call. Pickled without what it holds of this process."""

    config: OptimizeConfig
    dynamic_shapes: DynamicShapes = "auto"
    progress: Progress | None = None
    lazy: CompiledVariant | None = field(default=None, repr=False)

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs, why: Remark | None) -> Variant:
        assert isinstance(module, OptimizedModule)
        if self.lazy is not None:
            return self.lazy
        if self.config.capture == "dynamo":
            return self._compiled_now(module, args, kwargs, "capture='dynamo' was asked for, so the model is optimized by torch.compile.")
        self._tell("capture", 0, 1)
        try:
            # Shapes that the user wrote are for the first call; another form of call finds its own.
            captured = capture(module.attnopt_reference, args, kwargs, self.dynamic_shapes if why is None else "auto")
        except ModelError:
            raise
        except CaptureError as error:
            if self.config.capture == "export":
                raise
            return self._compiled_now(module, args, kwargs, error.message, error.source)
        self._tell("capture", 1, 1)
        result, report = self._rewritten(captured, module)
        if why is not None:
            report.remarks.insert(0, why)
        folded = {name: module.get_buffer(name).detach().clone() for name in result.folded if is_state(module, name)}
        return GraphVariant(graph_function(result.graph_module, module), captured.example.holds, report, captured.example, folded)

    def compiled(self, reason: str, source: str = "") -> CompiledVariant:
        """The variant that goes through torch.compile, for all further calls."""
        frames, remarks = Frames(), [Remark("AO302", reason, source=source)]
        if not self.config.verify:
            remarks.append(_unverified("verify=False"))
        verdict = Verdict()

        def make_report() -> Report:
            report = frames.merged(*remarks, *([_differs(verdict)] if verdict.passed is False else []))
            report.verdict = verdict
            return report

        self.lazy = CompiledVariant(_backend(self.config, frames), make_report, verdict)
        return self.lazy

    def _compiled_now(self, module: OptimizedModule, args: Args, kwargs: Kwargs, reason: str, source: str = "") -> CompiledVariant:
        """Compile by running once, so that the report is there, and compare on the example."""
        variant = self.compiled(reason, source)
        with undisturbed(device_of(module)):
            variant(module, args, kwargs, [])
        if self.config.verify:
            found = verify_modules(clone_tree(module.attnopt_reference), lambda *a, **k: variant(module, a, k, []), args, kwargs, progress=_verify_progress(self.progress))
            variant.verdict.passed, variant.verdict.checks = found.passed, found.checks
        return variant

    def _rewritten(self, captured: Captured, module: OptimizedModule) -> tuple[PipelineResult, Report]:
        """Passes and verification; sites that fail are put back."""
        results: dict[frozenset[str], PipelineResult] = {}
        spent = 0.0
        exact = replace(self.config, merge_kv_heads=None)

        def rebuild(skip: frozenset[str]) -> GraphPair:
            nonlocal spent
            if skip not in results:
                self._tell("passes", 0, 1)
                start = time.perf_counter()
                results[skip] = run_pipeline(captured.graph_module, exact, skip_sites=skip)
                spent += time.perf_counter() - start
                self._tell("passes", 1, 1)
            result = results[skip]
            return GraphPair(result.reference, result.graph_module, result.outputs)

        start = time.perf_counter()
        reverted: dict[str, Any] = {}
        verdict = Verdict()
        remarks: list[Remark] = []
        if self.config.verify:
            training = any(m.training for m in module.modules())
            repair = verify_and_repair(rebuild, captured.example.args, captured.example.kwargs, training=training, progress=_verify_progress(self.progress))
            verdict, reverted = repair.verdict, repair.reverted
        else:
            rebuild(frozenset())
            remarks.append(_unverified("verify=False"))
        result = results[frozenset(reverted)]
        if self.config.merge_kv_heads:
            result = run_pipeline(captured.graph_module, self.config, skip_sites=frozenset(reverted))
            remarks.append(Remark("AO109", verify_merged(result, captured.example.args, captured.example.kwargs, verdict, _verify_progress(self.progress))))
        if self.config.verify and verdict.passed is None:
            remarks.append(_unverified("the weights are on the meta device" if any(t.is_meta for t in tensors_of(module)) else "nothing could be compared"))
        elif verdict.passed is False:
            remarks.append(_differs(verdict))
        total = time.perf_counter() - start
        for site in result.sites:
            for check in reverted.get(site.name, ())[:1]:
                site.status = "reverted"
                site.why = f"error {check.error:.2e}, budget {check.budget:.2e} ({check.name})"
                site.remarks.append(Remark("AO901", f"{check.name}: error {check.error:.2e}, budget {check.budget:.2e}. {check.detail}".strip(), site.name, site.source))
        seconds = {"capture": captured.seconds, "passes": spent, "verify": total - spent}
        _relate(result, captured)
        return result, Report(result.sites, [*captured.remarks, *result.remarks, *remarks], verdict, seconds)

    def export_onnx(
        self, module: nn.Module, path: str | os.PathLike[str], opset: int, target: str, with_past: WithPastForm, max_length: int | None, strip_metadata: bool
    ) -> OnnxReport:
        """Capture again with every attention as one node of the graph, whatever its kernel, write that, and compare it with the original."""
        assert isinstance(module, OptimizedModule)
        reference = module.attnopt_reference
        check_request(reference, path, opset, target)
        check_past(with_past, max_length, opset, target)
        from attnopt.emit.onnx.model import tensors
        from attnopt.emit.onnx.write import refuse_bfloat16

        variant = next(reversed(graph_variants(module)), None)
        if variant is None:
            raise CaptureError(f"{type(reference).__name__} holds no captured graph to export; torch.export has to take the model for that.")
        if self.config.merge_kv_heads:
            raise AttnoptError(f"merge_kv_heads is {self.config.merge_kv_heads}, and an exported file is compared with the original; supported is None.")
        args, kwargs = variant.example.args, variant.example.kwargs
        refuse_bfloat16([x.dtype for x in tensors((args, kwargs))], "an input")
        form = cast("Target", target)
        told = _verify_progress(self.progress)
        if with_past == "static":
            assert max_length is not None
            call = CallForm(reference.forward).spread(args, kwargs, module._attnopt.positional)
            return export_static(reference, *call, self.dynamic_shapes, self.config.disable_passes, path, opset, form, max_length, strip_metadata, told)
        off = dict.fromkeys((*self.config.disable_passes, "merge-projections", "share-block-maps"))
        config = replace(self.config, backend="reference", autotune=False, verify=True, capture="export", disable_passes=tuple(off))
        builder = replace(self, config=config, lazy=None)
        source, positional = reference, module._attnopt.positional
        if with_past:
            source = decoder = WithPast(reference)
            args, kwargs, positional = (), decoder.example(kwargs.get("input_ids")), 0
            builder.dynamic_shapes = "auto"  # the user's are for another call
        again = optimized_module(source, builder, self.config.max_variants)
        again.attnopt_capture(*CallForm(source.forward).spread(args, kwargs, positional))
        return export_captured(again, source, path, opset, form, strip_metadata, told)

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "dynamic_shapes": self.dynamic_shapes, "progress": None, "lazy": None}


def _unverified(reason: str) -> Remark:
    return Remark("AO304", f"Not compared with the original: {reason}.")


def _verify_progress(progress: Progress | None) -> Progress | None:
    return None if progress is None else lambda what, done, total: progress("verify", done, total)


# ---- what the user gave


def _checked(model: Any, config: OptimizeConfig | None) -> OptimizeConfig:
    if not isinstance(model, nn.Module):
        raise AttnoptError(f"The model has to be a torch.nn.Module, got {type(model).__name__}.")
    config = config or OptimizeConfig()
    passes(config)
    return config


def _run_model(run: Callable[..., Any], model: nn.Module, args: Args, kwargs: Kwargs) -> Any:
    """Run, and tell the model's own failures from ours."""
    try:
        return run(*args, **kwargs)
    except AttnoptError:
        raise
    except Exception as error:
        try:
            clone_tree(model)(*args, **kwargs)
        except Exception as own:
            raise ModelError(f"{type(model).__name__} itself fails with these inputs: {named(own)}", own) from own
        raise CaptureError(f"torch.compile cannot run {type(model).__name__}: {named(error)}") from error
