"""Files as plain ``torch.onnx.export`` writes them: tiny models of the transformers library with eager attention, open batch and sequence."""

from __future__ import annotations

import functools
import io
import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from tiny_models import hf_inputs, hf_model
from torch import Tensor, nn

from attnopt.capture.export import quiet

SITES = {"llama": 2, "bert": 2, "gpt2": 2, "whisper": 6}


class _ByPosition(nn.Module):
    """The first result of a model for tensors alone."""

    def __init__(self, model: nn.Module, names: list[str], rest: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.rest = model, names, rest

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True)), **self.rest)[0]


@functools.cache
def exported(kind: str, opset: int = 20, dynamo: bool = True) -> bytes:
    """The file's bytes. Weights are larger than a fresh model's, so that attention is far from uniform."""
    model, given = hf_model(kind), hf_inputs(kind)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4)
    tensors = {n: x for n, x in given.items() if isinstance(x, Tensor)}
    names = list(tensors)
    wrapped = _ByPosition(model, names, {n: x for n, x in given.items() if n not in tensors}).eval()
    open_dims = [{0: "batch"} if x.is_floating_point() else {0: "batch", 1: "sequence"} for x in tensors.values()]
    out = io.BytesIO()
    common: dict[str, Any] = {"opset_version": opset, "input_names": names, "output_names": ["result"]}
    with warnings.catch_warnings(), torch.no_grad(), quiet():
        warnings.simplefilter("ignore")
        if dynamo:
            program = torch.onnx.export(wrapped, tuple(tensors.values()), dynamo=True, dynamic_shapes=(tuple(open_dims),), verbose=False, **common)
            assert program is not None
            return program.model_proto.SerializeToString()
        torch.onnx.export(wrapped, tuple(tensors.values()), out, dynamo=False, dynamic_axes=dict(zip(names, open_dims, strict=True)), **common)  # type: ignore[arg-type]
    return out.getvalue()


def model_of(kind: str, opset: int = 20, dynamo: bool = True) -> onnx.ModelProto:
    return onnx.load_from_string(exported(kind, opset, dynamo))


def run(model: onnx.ModelProto | str, inputs: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    source = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, inputs)  # type: ignore[no-any-return]


def inputs(kind: str, batch: int, length: int) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs of another size than the file was made with, with ragged padding on both sides."""
    given = {n: x.numpy().copy() for n, x in hf_inputs(kind, batch, length).items() if isinstance(x, Tensor)}
    mask = given.get("attention_mask")
    if mask is not None:
        mask[0, : length // 3] = 0
    return given


def operators(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


# ------------------------------------------------------------------------------------------------ small files, written by hand

ATTENTION = "t = Transpose<perm = [0, 2, 1]>(x) c = Constant<value = float {0.4}>() s = MatMul(x, t) z = Mul(s, c) p = Softmax(z) y = MatMul(p, x)"
_X, _Y = "float[batch, sequence, 8] x", "float[batch, sequence, 8] y"


def text(body: str, inputs: str = _X, outputs: str = _Y, opset: int = 20, head: str = "") -> str:
    return f'<ir_version: 8, opset_import: ["": {opset}{head}]> example ({inputs}) => ({outputs}) {{ {body} }}'


def small(body: str = ATTENTION, **options: Any) -> onnx.ModelProto:
    return onnx.parser.parse_model(text(body, **options))


def weighted(path: Any, **options: Any) -> None:
    """An attention over a projection with weights ``w``, saved."""
    m = small("x = MatMul(x0, w) " + ATTENTION, inputs=_X.replace(" x", " x0"))
    m.graph.input[0].name = m.graph.node[0].input[0] = "x"
    for n in m.graph.node[1:]:
        n.input[:] = ["h" if i == "x" else i for i in n.input]
    m.graph.node[0].output[0] = "h"
    m.graph.initializer.append(onnx.numpy_helper.from_array(np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32), "w"))
    onnx.save(m, path, **options)
