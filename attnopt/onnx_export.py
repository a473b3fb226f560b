"""From a model to a verified ONNX file: as it is called, with a past that grows, or over caches of a fixed length."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from attnopt.capture.call import Args, Kwargs
from attnopt.capture.export import DynamicShapes, capture
from attnopt.capture.with_past import WithPast
from attnopt.config import OptimizeConfig
from attnopt.emit.module import OptimizedModule, graph_variants
from attnopt.errors import AttnoptError
from attnopt.original_call import ExampleCall
from attnopt.passes.insert_kv_cache import PLAN
from attnopt.passes.insert_static_cache import InsertStaticCache
from attnopt.passes.pipeline import SERVING_NAMES, run_pipeline
from attnopt.report import Report, Verdict
from attnopt.varied import varied_shapes
from attnopt.verify.decoding import verify_decoding
from attnopt.verify.exported import verify_exported
from attnopt.verify.static_cache import verify_static

if TYPE_CHECKING:
    from attnopt.emit.onnx.plan import Target
    from attnopt.emit.onnx.report import OnnxReport

Progress = Callable[[str, int, int], None]
_LEFT_OUT = ("absorb-latent", "merge-projections")


def export_captured(
    captured: OptimizedModule, original: nn.Module, path: str | os.PathLike[str], opset: int, target: Target, strip_metadata: bool, progress: Progress | None
) -> OnnxReport:
    """Write and verify ``captured``, made of ``original`` with every attention as ``attnopt::attention``; where that is a ``WithPast``, for onnxruntime-genai too."""
    from attnopt.emit.onnx.decoder import finish
    from attnopt.emit.onnx.model import onnx_model
    from attnopt.emit.onnx.write import write_onnx

    example = graph_variants(captured)[-1].example
    draft = onnx_model(captured, opset, target, strip_metadata)
    if isinstance(original, WithPast):
        finish(draft, original, path)

    window = max((x.spec.window[0] + 1 for x in draft.layers if x.spec is not None and x.spec.window[0] is not None), default=0)

    def compare(file: Callable[..., Any]) -> Verdict:
        verdict = verify_exported(original, file, example, varied_shapes(example), progress, draft.one_row)
        if not isinstance(original, WithPast) or not verdict.passed:
            return verdict
        more = verify_decoding(original, file, example.kwargs["input_ids"], example.kwargs["past_key_values"], window)
        return Verdict(more.passed, [*verdict.checks, *more.checks])

    return write_onnx(draft, path, opset, target, compare)


def export_static(
    model: nn.Module,
    args: Args,
    kwargs: Kwargs,
    shapes: DynamicShapes,
    disabled: Sequence[str],
    path: str | os.PathLike[str],
    opset: int,
    target: Target,
    max_length: int,
    strip_metadata: bool,
    progress: Progress | None,
) -> OnnxReport:
    """Write and verify the model over caches of ``max_length`` tokens; ``args`` and ``kwargs`` are a call of ``model`` without a cache, ``disabled`` passes that are left out.

    Raises AttnoptError where the model has no such form, or fewer positions.
    """
    from attnopt.emit.onnx.static import StaticDecoder, static_model
    from attnopt.emit.onnx.write import write_onnx

    captured = capture(model, args, kwargs, shapes)
    call = ExampleCall.of(captured)
    config = OptimizeConfig(kv_cache="contiguous", disable_passes=tuple(n for n in dict.fromkeys((*disabled, *_LEFT_OUT)) if n in SERVING_NAMES))
    result = run_pipeline(captured.graph_module, config, cache=InsertStaticCache(call.form.positions(), call.form.output, max_length))
    plan = result.graph_module.meta.get(PLAN)
    if plan is None:
        raise _refused(model, Report(result.sites, [*captured.remarks, *result.remarks]))
    longest = call.longest(plan)
    if longest is not None and max_length > longest:
        raise AttnoptError(f"max_length is {max_length}, and {type(model).__name__} takes at most {longest} tokens; supported are 1 to {longest}.")
    decoder = StaticDecoder(result.graph_module, plan, max_length)
    ids: Tensor = next(x for name, x in zip(call.form.names, call.form.leaves, strict=True) if name == plan.ids)
    window = max((x.window or 0 for x in plan.layers), default=0)

    def compare(file: Callable[..., Any]) -> Verdict:
        return verify_static(
            model, file, decoder.empty, max_length, window, ids, lambda x, _: call.form.call(x, plan), lambda result: call.form.logits(result, plan), progress
        )

    return write_onnx(static_model(decoder, ids, opset, target, strip_metadata), path, opset, target, compare)


def _refused(model: nn.Module, report: Report) -> AttnoptError:
    why = next(r for r in report.remarks if r.level == "missed")
    missed = "".join(f" {s.name} was not understood: {s.why}" for s in report.missed[:1])
    where = f" ({why.source})" if why.source else ""
    return AttnoptError(f"{type(model).__name__} has no form with a static cache: {why.message.rstrip('.')}{where}.{missed}", why.advice)
