"""From an optimized module to a verified file: written beside its place, compared there, and only then moved."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx_ir as ir
import torch

from attnopt.capture.call import CallForm
from attnopt.capture.captured import Example
from attnopt.capture.with_past import WithPast
from attnopt.emit.module import OptimizedModule, graph_variants
from attnopt.emit.onnx.decoder import finish
from attnopt.emit.onnx.layers import measure
from attnopt.emit.onnx.model import OPSETS, onnx_model, tensors
from attnopt.emit.onnx.plan import TARGETS, Target
from attnopt.emit.onnx.report import OnnxReport
from attnopt.emit.onnx.run import OnnxFile
from attnopt.errors import AttnoptError, VerificationError
from attnopt.report import Verdict

Compare = Callable[[OnnxFile, Example], Verdict]
"""Compares a file with the original on inputs made from the captured example."""

EXTERNAL = 1_900_000_000
"""Bytes of weights above which they stand in a file of their own (``model.onnx.data``): a protobuf holds at most 2 GiB."""


def check_place(path: str | os.PathLike[str]) -> None:
    """Refuse a place where no file can be written. Raises AttnoptError."""
    place = Path(path)
    if place.is_dir():
        raise AttnoptError(f"{place} is a folder; expected the name of a file.")
    if not place.parent.is_dir():
        raise AttnoptError(f"{place} cannot be written: the folder {place.parent} does not exist.")
    if not os.access(place.parent, os.W_OK):
        raise AttnoptError(f"{place} cannot be written: the folder {place.parent} does not permit it.")


def check_request(module: torch.nn.Module, path: str | os.PathLike[str], opset: int, target: str) -> None:
    """Refuse what cannot succeed, before any work. Raises AttnoptError."""
    if target not in TARGETS:
        raise AttnoptError(f"Target {target!r} is unknown; supported are {', '.join(TARGETS)}.")
    if opset not in OPSETS:
        raise AttnoptError(f"Opset {opset} is not supported; supported are {' and '.join(map(str, OPSETS))} (Attention is in the standard since 23).")
    check_place(path)
    if any(m.training for m in module.modules()):
        raise AttnoptError(f"{type(module).__name__} is in training mode, and an exported model is for inference: call eval() first.")
    held = [*module.parameters(), *module.buffers()]
    if any(t.is_meta for t in held):
        raise AttnoptError("The weights are on the meta device: there is nothing to write and nothing to compare.")
    refuse_bfloat16([t.dtype for t in held], "the model")


def external_name(model: ir.Model, place: Path) -> str | None:
    """The name of the file for the weights of a model at ``place``; None where they stand in the model itself."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    return f"{place.name}.data" if size > EXTERNAL else None


def refuse_bfloat16(dtypes: list[torch.dtype], what: str) -> None:
    if torch.bfloat16 in dtypes:
        raise AttnoptError(
            f"ONNX Runtime computes no bfloat16 on a CPU, and {what} is in bfloat16; supported are float16, float32 and float64.", "Pass --dtype float32."
        )


def write_onnx(
    optimized: OptimizedModule,
    path: str | os.PathLike[str],
    opset: int,
    target: Target,
    compare: Compare,
    decoder: WithPast | None = None,
    strip_metadata: bool = False,
) -> OnnxReport:
    """Write and verify; no file is left, and one that was there before stays, when anything fails.

    ``optimized`` holds every attention as ``attnopt::attention``; it is made from ``decoder`` where that is given, which gets the names and files that
    onnxruntime-genai expects. Raises VerificationError when ``compare`` finds a difference.
    """
    start = time.perf_counter()
    place = Path(path)
    example = graph_variants(optimized)[-1].example
    refuse_bfloat16([x.dtype for x in tensors((example.args, example.kwargs))], "an input")
    model, layers = onnx_model(optimized, opset, target, strip_metadata)
    beside: dict[str, str] = {}
    if decoder is not None:
        beside = finish(model, decoder, [x.spec for x in layers if x.spec is not None], place.name)
        for layer in layers:
            layer.name = layer.name.removeprefix("decoder.")
    data = external_name(model, place)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as folder:
            draft = Path(folder) / place.name
            ir.save(model, draft, external_data=data)
            runner = OnnxFile(draft, CallForm(optimized.forward))
            verdict = compare(runner, example)
            if not verdict.passed:
                worst = verdict.worst
                detail = "nothing could be compared" if worst is None else f"{worst.name}: error {worst.error:.2e}, budget {worst.budget:.2e}. {worst.detail}"
                raise VerificationError(f"The exported model differs from the original in ONNX Runtime, so {place} was not written: {detail.strip()}")
            inputs, outputs = shapes_of(model.graph.inputs), shapes_of(model.graph.outputs)
            measure(model, layers, optimized, Path(folder), example.args, example.kwargs)
            for name, text in beside.items():
                (Path(folder) / name).write_text(text)
            for made in (*([] if data is None else [data]), *beside, place.name):
                os.replace(Path(folder) / made, place.parent / made)  # noqa: PTH105 - over a file that exists
    except OSError as error:
        raise AttnoptError(f"{place} cannot be written: {error.strerror or error}.") from error
    return OnnxReport(str(place), opset, target, inputs, outputs, layers, verdict, time.perf_counter() - start)


def shapes_of(values: Iterable[ir.Value]) -> dict[str, list[int | str]]:
    return {str(v.name): [d if isinstance(d, int) else str(d.value) for d in v.shape or ()] for v in values}
