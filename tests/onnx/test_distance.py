"""Biases by distance and by weights whose size is known: written once for each distance, shared by attentions, and equal to the reference."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from attnopt.emit.onnx.bounds import greatest, largest
from attnopt.emit.onnx.contrib import attach_functions
from attnopt.emit.onnx.distance import read_by_distance
from attnopt.emit.onnx.model import IR_VERSION, Translation, weights_of
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec, Dims, Load
from attnopt.kernels import reference

HEADS, D, BUCKETS = 4, 8, 12


def dims(square: bool) -> Dims:
    sq = E.sym("Sq", 1)
    return Dims(E.sym("B", 1), E.const(HEADS), E.const(HEADS), sq, sq if square else E.sym("Skv", 1), E.const(D), E.const(D))


def bucket(d: Dims) -> E.Expr:
    """The logarithm of the distance, cut to an integer, with a side for keys behind the query."""
    distance = E.absolute(E.sub(d.k, d.q))
    far = E.as_int(E.mul(E.const(1.5), E.function("log", E.as_float(E.maximum(distance, E.ONE)))))
    return E.add(E.minimum(far, E.const(BUCKETS // 2 - 1)), E.where(E.lt(d.q, d.k), E.const(BUCKETS // 2), E.ZERO))


def spec(square: bool, padded: bool, empty: Any = "uniform", low: bool = False) -> AttentionSpec:
    d = dims(square)
    pad = E.load(1, (d.b, d.k), "bool")
    mask = E.all_of(E.le(d.k, d.q) if square else E.TRUE, pad if padded else E.TRUE)
    score = E.add(E.mul(E.const(0.25), E.score()), E.load(0, (bucket(d), d.h), "float"))
    lowest = E.add(score, E.const(float(torch.finfo(torch.float32).min)))
    return AttentionSpec(d, score, mask, empty, lowest if low else None, loads=(Load("table", "float"), Load("pad", "bool"))[: 2 if padded else 1])


class Model(nn.Module):
    def __init__(self, s: AttentionSpec, table: Tensor) -> None:
        super().__init__()
        self.spec, self.table = s, nn.Parameter(table)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        loads = [self.table, pad][: len(self.spec.loads)]
        for _ in range(2):
            q = torch.ops.attnopt.attention(q, k, v, loads, [], self.spec.to_json(), "reference")
        return q


def inputs(square: bool, B: int, Sq: int, Skv: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(Sq)
    Skv = Sq if square else Skv
    q, k, v = (torch.randn(B, HEADS, n, D, generator=g) for n in (Sq, Skv, Skv))
    pad = torch.rand(B, Skv, generator=g) < 0.7
    pad[0] = False  # no key at all
    return q, k, v, pad


def export(path: Path, square: bool, s: AttentionSpec, table: Tensor, target: Any) -> Any:
    auto = torch.export.Dim.DYNAMIC
    axes = {0: auto, 2: auto}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(Model(s, table), inputs(square, 2, 5, 7), dynamic_shapes=(axes, axes, axes, {0: auto, 1: auto}))
        translation = Translation(24, target, weights_of(program))
        made = torch.onnx.export(program, dynamo=True, opset_version=24, custom_translation_table=translation.table(), verbose=False, optimize=True)
    assert made is not None
    attach_functions(made.model, 24)
    made.model.ir_version = IR_VERSION
    made.save(path)
    return made.model


TABLE = torch.randn(BUCKETS, HEADS, generator=torch.Generator().manual_seed(1))


def _with(value: float, rows: Any) -> Tensor:
    table = TABLE.clone()
    table[rows] = value
    return table


@pytest.mark.parametrize("target", ["onnx", "ort", pytest.param("decomposed", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("square", "s", "table"),
    [
        pytest.param(True, spec(True, False), TABLE, id="causal"),
        pytest.param(False, spec(False, False), TABLE, id="full"),
        pytest.param(False, spec(False, True), TABLE, id="padded"),
        pytest.param(True, spec(True, True, "nan"), TABLE, id="causal-padded-nan"),
        pytest.param(False, spec(False, True, "program", low=True), TABLE, id="padded-by-program"),
        pytest.param(False, spec(False, True), _with(-math.inf, slice(0, 3)), id="a-table-that-hides"),
        pytest.param(False, spec(False, True), _with(-math.inf, slice(None)), id="a-table-that-hides-all"),
        pytest.param(False, spec(False, True), _with(float(torch.finfo(torch.float32).min), slice(None)), id="a-table-of-the-lowest-number"),
        pytest.param(True, spec(True, False), _with(math.inf, slice(BUCKETS // 2, None)), id="infinite-where-hidden"),
    ],
)
def test_a_table_by_distance(tmp_path: Path, square: bool, s: AttentionSpec, table: Tensor, target: Any) -> None:
    model = export(tmp_path / "model.onnx", square, s, table, target)
    biases = sum(n.op_type == "Slice" and n.inputs[0].producer().op_type == "Reshape" and n.inputs[0].producer().inputs[0].producer().op_type == "Gather" for n in model.graph)
    # Written out, a row without a key reads the bias of all rows; beside a fused node it has one of its own.
    assert biases == (2 if s.empty_rows == "program" and target != "decomposed" else 1), "two attentions share what is written"
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for sizes in ((2, 5, 7), (1, 1, 1), (1, 1, 33), (2, 37, 50), (3, 48, 16), (2, 16, 48)):
        q, k, v, pad = inputs(square, *sizes)
        named = dict(zip(("q", "k", "v", "pad"), (q, k, v, pad), strict=True))
        (got,) = session.run(None, {i.name: named[i.name].numpy() for i in session.get_inputs()})
        o, loads = q.double(), [table.double(), pad][: len(s.loads)]
        with torch.no_grad():
            for _ in range(2):
                o = reference.attention(o, k.double(), v.double(), loads, [], s)[0]
        torch.testing.assert_close(torch.from_numpy(got).double(), o, rtol=2e-5, atol=2e-6, equal_nan=True, msg=lambda m, sizes=sizes: f"at {sizes}: {m}")


def test_what_is_a_table_by_distance() -> None:
    d = dims(False)
    away = E.sub(d.k, d.q)

    def read(*index: E.Expr) -> E.Expr:
        return E.load(0, index, "float")

    assert read_by_distance(read(bucket(d), d.h)) is not None
    assert read_by_distance(E.mul(E.load(1, (d.h,), "float"), read(E.absolute(away)))) is not None
    for other in (
        read(d.b, away),  # another one for each sequence
        read(E.sub(E.mul(E.const(2), d.k), d.q)),  # not the same along a diagonal
        read(away, d.k),
        E.mul(E.load(1, (d.h,), "float"), E.as_float(away)),  # no table
        E.add(E.score(), read(away)),  # the score is another one for each query and key
        read(d.k, d.h),
    ):
        assert read_by_distance(other) is None, other


def test_the_largest_value() -> None:
    d = dims(False)
    held = E.load(0, (bucket(d), d.h), "float")

    def found(e: E.Expr, value: float = 3.0) -> float:
        return largest(e, lambda _: value)

    assert found(E.add(E.mul(E.const(0.25), E.score()), held, E.const(-2.0))) == 5.0
    assert found(E.mul(E.const(-4.0), held)) == 12.0
    assert found(E.where(E.le(d.k, d.q), held, E.const(-7.0))) == 7.0
    assert found(E.mul(held, E.function("tanh", E.score()))) == 3.0
    assert found(E.function("tanh", held), math.inf) == 1.0
    for unknown in (held, E.add(held, E.score()), E.mul(held, E.as_float(d.k)), E.where(E.le(d.k, d.q), held, E.FZERO)):
        assert found(unknown, math.inf) == math.inf
    for function in ("log", "exp", "sqrt"):
        assert found(E.function(function, held)) == math.inf
    whole = E.load(1, (d.b, d.k), "int")
    assert found(E.as_float(E.mul(whole, whole, whole)), math.inf) == 2.0**63, "an integer is one of 64 bits"
    half = E.power(E.const(0.5), E.as_float(E.add(d.h, E.ONE)))
    assert found(E.mul(half, E.as_float(whole)), math.inf) == 2.0**63
    for power in (E.power(E.const(0.5), E.as_float(E.sub(d.h, E.ONE))), E.power(E.const(2.0), E.as_float(d.h)), E.power(E.const(0.5), held)):
        assert found(power) == math.inf, power
    assert greatest(torch.tensor([1.0, -2.0])) == 2.0
    assert greatest(torch.tensor([1.0, math.nan])) == greatest(torch.tensor([1.0, -math.inf])) == math.inf
    assert greatest(torch.empty(0)) == 0.0
