"""Reading ONNX files: what is no model, or none that can be rewritten, is refused in one sentence."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TypeAlias

import onnx
import onnx_ir as ir
import onnxscript.version_converter
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from attnopt.errors import AttnoptError

Source: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | ir.Model"

OLDEST, NEWEST = 13, 25
"""Opsets of files that can be read. From 13 on Softmax is along one axis; ONNX Runtime 1.31 runs none beyond 26."""

_RUNTIME = {"com.microsoft"}


def read_model(source: Source) -> ir.Model:
    """A model of its own, from a file or a model in memory. Raises AttnoptError when it is no model that can be rewritten."""
    if isinstance(source, ir.Model):
        return checked(source.clone(), "The model")
    if isinstance(source, onnx.ModelProto):
        try:
            model = ir.from_proto(source)
        except ir.serde.SerdeError as error:
            raise AttnoptError(f"The model is damaged: {_reason(error)}") from error
        return checked(model, "The model")
    path = Path(source)
    if path.is_dir():
        raise AttnoptError(f"{path} is a folder; expected an ONNX file.")
    if not path.is_file():
        raise AttnoptError(f"{path} does not exist.")
    try:
        model = ir.load(path)
    except OSError as error:
        raise AttnoptError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (DecodeError, ir.serde.SerdeError) as error:
        raise AttnoptError(f"{path} is no ONNX model, or a damaged one: {_reason(error)}") from error
    return checked(model, str(path))


def checked(model: ir.Model, name: str) -> ir.Model:
    """``model``, when it can be rewritten: an opset that is known, nodes, and all of its data there."""
    if len(model.graph) == 0 or not model.opset_imports:
        raise AttnoptError(f"{name} is no ONNX model, or a damaged one: it holds {len(model.graph)} nodes and imports no operators.")
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if opset is None:
        raise AttnoptError(f"{name} imports no standard operators, only {', '.join(model.opset_imports)}; there is nothing to find in it.")
    if not OLDEST <= opset <= NEWEST:
        raise AttnoptError(f"{name} is of opset {opset}; supported are {OLDEST} to {NEWEST}.")
    for graph in model.graphs():
        for value in graph.initializers.values():
            _check_data(value, name)
    return model


def _reason(error: BaseException) -> str:
    """What the innermost cause of an error says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200]


def _check_data(value: ir.Value, name: str) -> None:
    tensor = value.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        return
    place = Path(tensor.path)
    if not place.is_file():
        raise AttnoptError(f"{name} keeps {value.name} in {place}, which does not exist.")
    end = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
    size = place.stat().st_size
    if size < end:
        raise AttnoptError(f"{name} keeps {value.name} in {place}, which is too short for it: {size} bytes, and {end} are needed.")


def prepared(model: ir.Model, opset: int) -> ir.Model:
    """``model`` without functions of its own, at opset ``opset`` or its own if that is higher, with the shapes that can be inferred."""
    # A function of a runtime's own operator is there for other runtimes: the operator stays.
    model = InlinePass(criteria=lambda f: f.domain not in _RUNTIME)(model).model
    if "ai.onnx" in model.opset_imports:
        model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
    before = model.opset_imports[""]
    level = logging.getLogger("onnxscript").level
    try:
        logging.getLogger("onnxscript").setLevel(logging.CRITICAL)
        if before < opset:
            onnxscript.version_converter.convert_version(model, opset, fallback=True)
        model = ShapeInferencePass()(model).model
    finally:
        logging.getLogger("onnxscript").setLevel(level)
    if model.opset_imports[""] < opset:
        raise AttnoptError(f"The model cannot be brought from opset {before} to opset {opset}, which has the operator Attention.")
    return model
