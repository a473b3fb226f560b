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
from attnopt.emit.onnx.layers import measure
from attnopt.emit.onnx.model import OPSETS, Draft
from attnopt.emit.onnx.plan import TARGETS, Target
from attnopt.emit.onnx.report import OnnxReport
from attnopt.emit.onnx.run import OnnxFile
from attnopt.errors import AttnoptError, VerificationError
from attnopt.report import Verdict

Compare = Callable[[OnnxFile], Verdict]
"""Compares a file with the original."""

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


def write_onnx(draft: Draft, path: str | os.PathLike[str], opset: int, target: Target, compare: Compare) -> OnnxReport:
    """Write and verify; no file is left, and one that was there before stays, when anything fails.

    Raises VerificationError when ``compare`` finds a difference.
    """
    start = time.perf_counter()
    place = Path(path)
    model, layers = draft.model, draft.layers
    data = external_name(model, place)
    form = CallForm(draft.run.forward if isinstance(draft.run, torch.nn.Module) else draft.run)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as folder:
            file = Path(folder) / place.name
            ir.save(model, file, external_data=data)
            verdict = compare(OnnxFile(file, form))
            if not verdict.passed:
                worst = verdict.worst
                detail = "nothing could be compared" if worst is None else f"{worst.name}: error {worst.error:.2e}, budget {worst.budget:.2e}. {worst.detail}"
                raise VerificationError(f"The exported model differs from the original in ONNX Runtime, so {place} was not written: {detail.strip()}")
            inputs, outputs = shapes_of(model.graph.inputs), shapes_of(model.graph.outputs)
            measure(draft, Path(folder), form)
            for name, text in draft.beside.items():
                (Path(folder) / name).write_text(text)
            for made in (*([] if data is None else [data]), *draft.beside, place.name):
                os.replace(Path(folder) / made, place.parent / made)  # noqa: PTH105 - over a file that exists
    except OSError as error:
        raise AttnoptError(f"{place} cannot be written: {error.strerror or error}.") from error
    return OnnxReport(str(place), opset, target, inputs, outputs, layers, verdict, time.perf_counter() - start)


def shapes_of(values: Iterable[ir.Value]) -> dict[str, list[int | str]]:
    return {str(v.name): [d if isinstance(d, int) else str(d.value) for d in v.shape or ()] for v in values}
