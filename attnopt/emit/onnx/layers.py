"""The error of each attention by itself: its result in ONNX Runtime beside PyTorch's, on one call."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.capture.call import CallForm
from attnopt.emit.onnx.model import Draft
from attnopt.emit.onnx.run import OnnxFile


class _Recorder(TorchDispatchMode):
    """Keeps the result of every attention, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if str(func) in ("attnopt.attention.default", "attnopt.static_attention.default"):
            self.found.append(result)
        return result


def measure(draft: Draft, folder: Path, form: CallForm) -> None:
    """Set ``error`` of each layer whose result still stands in the model, which gets further outputs by this. Call it after the model was saved."""
    model, layers = draft.model, draft.layers
    have = {id(v) for node in model.graph for v in node.outputs}
    with torch.no_grad(), _Recorder() as recorder:
        draft.run(*draft.args, **draft.kwargs)
    lowered = [x for x in layers if x.spec is not None]
    if len(lowered) != len(recorder.found):
        return  # results cannot be told apart: a call whose result nobody reads was left out of the file
    expected = {}
    for layer, o in zip(lowered, recorder.found, strict=True):
        if id(layer.value) in have:
            expected[id(layer)] = (layer.value, o)
        elif id(layer.packed) in have:
            expected[id(layer)] = (layer.packed, o.transpose(1, 2).flatten(2))
    known = {id(v) for v in model.graph.outputs}
    added = [value for value, _ in expected.values() if id(value) not in known]
    before = len(model.graph.outputs)
    model.graph.outputs.extend(added)
    where = {id(v): i for i, v in enumerate(model.graph.outputs)}
    path = folder / "layers.onnx"
    ir.save(model, path, external_data="layers.data")
    results = OnnxFile(path, form)(*draft.args, **draft.kwargs)
    assert len(results) == before + len(added)
    for layer in lowered:
        if id(layer) in expected:
            value, o = expected[id(layer)]
            layer.error = distance(results[where[id(value)]], o)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference relative to the norm of ``expected``; infinite where shapes or the places of NaN differ."""
    a, b = got.double(), expected.detach().cpu().double()
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return math.inf
    norm = float(b.nan_to_num(nan=0.0).norm())
    return float((a - b).nan_to_num(nan=0.0).norm()) / (norm or 1.0)
