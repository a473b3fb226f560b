"""What other tools make of an exported file: it loads, computes the same, and its attentions are still single nodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import attnopt
from attnopt.config import OptimizeConfig

LAZY = OptimizeConfig(backend="reference", verify=False, capture="export")


def by_onnxslim(model: onnx.ModelProto) -> onnx.ModelProto:
    onnxslim = pytest.importorskip("onnxslim", reason="onnxslim is not installed")
    return onnxslim.slim(model)


def by_onnxsim(model: onnx.ModelProto) -> onnx.ModelProto:
    onnxsim = pytest.importorskip("onnxsim", reason="onnxsim is not installed")
    simplified, agrees = onnxsim.simplify(model)
    assert agrees
    return simplified


def results(model: onnx.ModelProto, batch: int, length: int) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    mask = np.ones((batch, length), np.int64)
    mask[0, length - 3 :] = 0
    feed = {"input_ids": np.arange(batch * length).reshape(batch, length) % 100 + 3, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(-1) - 1, 0)}
    return session.run(None, feed)


@pytest.mark.parametrize("target", [pytest.param("onnx", marks=pytest.mark.slow), "ort"])
def test_simplified_files_agree(target: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from zoo.models import CASES

    # Positions as an input: onnxsim 0.8.1 fuses rotations whose angles have a batch of one into an operator that then takes no other batch.
    inputs: dict[str, Any] = {
        "input_ids": torch.arange(24).view(2, 12) + 3,
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
        "position_ids": torch.arange(12).repeat(2, 1),
    }
    inputs["use_cache"] = False
    attnopt.optimize(CASES["mistral"].build("eager"), kwargs=inputs, config=LAZY).export_onnx(tmp_path / "model.onnx", target=target)
    model = onnx.load(tmp_path / "model.onnx")
    simplifiers: tuple[Callable[[onnx.ModelProto], onnx.ModelProto], ...] = (by_onnxslim, by_onnxsim)
    for simplify in simplifiers:
        simplified = simplify(model)
        assert sum(n.op_type == "Attention" for n in ir.from_proto(simplified).graph.all_nodes()) == 2, simplify.__name__
        for batch, length in ((2, 12), (1, 31), (3, 5), (2, 90)):
            for got, expected in zip(results(simplified, batch, length), results(model, batch, length), strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=simplify.__name__)
