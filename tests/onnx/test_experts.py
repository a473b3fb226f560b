"""Products of groups of rows, as mixtures of experts have them, in ONNX Runtime beside PyTorch."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.config import OptimizeConfig
from attnopt.emit.onnx.model import IR_VERSION, Translation
from attnopt.errors import AttnoptError

LAZY = OptimizeConfig(backend="reference", verify=False, capture="export")


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, self.weight, ends)  # type: ignore[no-any-return]


def test_each_row_meets_the_matrix_of_its_group(tmp_path: Path) -> None:
    pytest.importorskip("transformers.integrations.moe")
    model, table = Grouped(), Translation(24, "onnx").table()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        example = torch.randn(7, 6), torch.tensor([2, 3, 5, 7], dtype=torch.int32)
        program = torch.export.export(model, example, dynamic_shapes=({0: torch.export.Dim.AUTO}, {}))
        made = torch.onnx.export(program, dynamo=True, opset_version=24, custom_translation_table=table, verbose=False)
    assert made is not None
    assert Counter(n.op_type for n in made.model.graph)["MatMul"] == 4
    made.model.ir_version = IR_VERSION
    made.save(tmp_path / "experts.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "experts.onnx", providers=["CPUExecutionProvider"])
    # groups of any size, without a row, all in one, and rows that are in none
    for rows, ends in ((9, [2, 2, 8, 9]), (3, [0, 0, 3, 3]), (5, [5, 5, 5, 5]), (6, [1, 2, 2, 4]), (1, [0, 0, 0, 0])):
        x, offs = torch.randn(rows, 6), torch.tensor(ends, dtype=torch.int32)
        (got,) = session.run(None, {i.name: y.numpy() for i, y in zip(session.get_inputs(), (x, offs), strict=True)})
        group = [next((e for e, end in enumerate(ends) if i < end), None) for i in range(rows)]
        expected = torch.stack([torch.zeros(5) if e is None else x[i] @ model.weight[e] for i, e in enumerate(group)]).detach()
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-5, atol=1e-6)


@torch.library.custom_op("attnopt_tests::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x / 2


@halved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.attnopt_tests.halved(nn.functional.scaled_dot_product_attention(x, x, x))  # type: ignore[no-any-return]


def test_an_operator_that_nobody_translates_is_named(tmp_path: Path) -> None:
    module = attnopt.optimize(Unknown().eval(), torch.randn(2, 3, 4, 8), config=LAZY)
    with pytest.raises(AttnoptError, match="it has no translation of the operator attnopt_tests.halved") as error:
        module.export_onnx(tmp_path / "model.onnx")
    assert "basic operators" in error.value.hint
    assert list(tmp_path.iterdir()) == []
