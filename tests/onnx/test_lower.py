"""Specs of every kind as ONNX, run in ONNX Runtime against the float64 reference, at another size than they were exported with."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from attnopt.emit.onnx.model import IR_VERSION, Translation
from attnopt.emit.onnx.plan import plan
from attnopt.emit.onnx.program import WRITTEN
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec, Dims, Load
from attnopt.kernels import reference

HQ, HKV, D = 4, 2, 8


def dims(square: bool, groups: bool = True) -> Dims:
    b, sq = E.sym("B", 1), E.sym("Sq", 1)
    return Dims(b, E.const(HQ), E.const(HKV if groups else HQ), sq, sq if square else E.sym("Skv", 1), E.const(D), E.const(D))


@dataclass
class Case:
    name: str
    spec: AttentionSpec
    lowered_to: str
    square: bool
    why: str = ""


def _cases() -> list[Case]:
    r, s = dims(False), dims(True)
    x = E.mul(E.const(0.25), E.score())
    pad = E.load(0, (r.b, r.k), "bool")
    spad = E.load(0, (s.b, s.k), "bool")
    padding, bias, slopes = Load("padding", "bool"), Load("bias", "float"), Load("slopes", "float")
    distance = E.as_float(E.sub(r.k, r.q))
    causal = E.le(s.k, s.q)
    chunk = E.eq(E.floordiv(r.q, E.const(3)), E.floordiv(r.k, E.const(3)))
    low = E.const(float(torch.finfo(torch.float32).min))

    def case(name: str, spec: AttentionSpec, lowered_to: str = "Attention", why: str = "") -> Case:
        return Case(name, spec, lowered_to, spec.dims.Sq is spec.dims.Skv, why)

    return [
        case("full", AttentionSpec(r, x), why="no mask"),
        case("square causal", AttentionSpec(s, x, causal), why="is_causal"),
        case("rectangular causal", AttentionSpec(r, x, E.le(r.k, r.q)), why="boolean mask"),
        case("causal to the bottom right", AttentionSpec(r, x, E.le(r.k, E.add(r.q, E.sub(r.Skv, r.Sq))), sizes=("Sq", "Skv")), why="boolean mask"),
        case("reverse causal", AttentionSpec(s, x, E.le(s.q, s.k)), why="boolean mask"),
        case("window", AttentionSpec(s, x, E.all_of(causal, E.lt(E.sub(s.q, s.k), E.const(3)))), why="boolean mask"),
        case("chunks", AttentionSpec(r, x, chunk), why="boolean mask"),
        case("remainders of a negative number", AttentionSpec(r, x, E.le(E.mod(E.sub(r.k, r.q), E.const(3)), E.ONE)), why="boolean mask"),
        case("padding, empty rows NaN", AttentionSpec(r, x, pad, loads=(padding,)), why="boolean mask"),
        case("padding, empty rows zero", AttentionSpec(r, x, pad, empty_rows="zero", loads=(padding,)), why="boolean mask"),
        case("padding, empty rows uniform", AttentionSpec(r, x, pad, empty_rows="uniform", loads=(padding,)), why="boolean mask"),
        case("causal padding, empty rows by program", AttentionSpec(s, x, E.all_of(causal, spad), "program", E.add(x, E.where(causal, E.FZERO, low)), loads=(padding,)), why="additive mask"),
        case("padding, empty rows by the lowest number", AttentionSpec(r, x, pad, "program", E.add(x, low), loads=(padding,)), why="additive mask"),
        case("a bias of the lowest number", AttentionSpec(r, E.add(x, E.where(pad, E.FZERO, low)), loads=(padding,)), why="additive mask"),
        case("padding, empty rows by another scale", AttentionSpec(r, x, pad, "program", E.score(), loads=(padding,)), "standard ops", "another form"),
        case("bias of one load", AttentionSpec(r, E.add(x, E.load(0, (E.ZERO, r.h, r.q, r.k), "float")), loads=(bias,)), why="additive mask"),
        case("bias by distance", AttentionSpec(r, E.add(x, E.load(0, (E.ZERO, r.h, E.ZERO, E.absolute(E.sub(r.k, r.q))), "float")), loads=(bias,)), why="additive mask"),
        case("slopes", AttentionSpec(r, E.add(x, E.mul(E.load(0, (r.h,), "float"), distance)), loads=(slopes,)), why="additive mask"),
        case("softcap", AttentionSpec(s, E.mul(E.const(5.0), E.function("tanh", E.mul(E.const(0.05), E.score()))), causal), "standard ops", "softcap 5"),
        case("sink", AttentionSpec(s, x, E.all_of(causal, E.lt(s.k, s.q)), "zero", sink=E.load(0, (s.h,), "float"), loads=(slopes,)), "standard ops", "sinks"),
        case("negative scale", AttentionSpec(r, E.mul(E.const(-0.25), E.score())), "standard ops", "scale is -0.25"),
        case("a score of the score's square", AttentionSpec(r, E.mul(x, x)), "standard ops", "not scale * s + bias"),
    ]


CASES = _cases()


class Model(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor, bias: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
        named = {"padding": padding, "bias": bias, "slopes": slopes}
        outs = []
        for c in CASES:
            kk, vv = (k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]) if c.square else (k, v)
            sizes = [{"Sq": q.shape[2], "Skv": kk.shape[2]}[n] for n in c.spec.sizes]
            loads = [named[x.name] for x in c.spec.loads]
            outs.append(torch.ops.attnopt.attention(q, kk, vv, loads, sizes, c.spec.to_json(), "reference"))
        return tuple(outs)


def inputs(B: int, Sq: int, Skv: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(B * 100 + Sq)
    q, k, v = (torch.randn(B, h, n, D, generator=g, dtype=torch.float64).to(dtype) for h, n in ((HQ, Sq), (HKV, Skv), (HKV, Skv)))
    padding = torch.ones(B, Skv, dtype=torch.bool)
    padding[0, :2] = False
    padding[-1] = False  # a row of the batch without any key
    bias, slopes = torch.randn(1, HQ, 16, 16, generator=g, dtype=torch.float64).to(dtype), torch.rand(HQ, generator=g, dtype=torch.float64).to(dtype)
    return q, k, v, padding, bias, slopes


def run(folder: Path, opset: int, target: Any, dtype: torch.dtype = torch.float32) -> tuple[Translation, list[tuple[tuple[Tensor, ...], list[Tensor]]]]:
    """Exported at one size and run at three: the inputs and results of each."""
    translation = Translation(opset, target)
    example = inputs(2, 5, 7, dtype)
    opened = ((0, 2), (0, 2), (0, 2), (0, 1), (), ())
    shapes = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in opened)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(Model(), example, dynamic_shapes=shapes)
        onnx_program = torch.onnx.export(program, dynamo=True, opset_version=opset, custom_translation_table=translation.table(), verbose=False)
    onnx_program.model.ir_version = IR_VERSION
    path = folder / "model.onnx"
    onnx_program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = []
    for sizes in ((2, 5, 7), (1, 4, 4), (3, 6, 9)):
        given = inputs(*sizes, dtype)
        feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), given, strict=True)}
        found.append((given, [torch.from_numpy(np.asarray(x)) for x in session.run(None, feed)]))
    return translation, found


def truth(c: Case, given: tuple[Tensor, ...]) -> Tensor:
    q, k, v, padding, bias, slopes = (x.double() if x.is_floating_point() else x for x in given)
    named = {"padding": padding, "bias": bias, "slopes": slopes}
    k, v = (x[:, :, : q.shape[2]] if c.square else x for x in (k, v))
    sizes = [{"Sq": q.shape[2], "Skv": k.shape[2]}[n] for n in c.spec.sizes]
    with torch.no_grad():
        return reference.attention(q, k, v, [named[x.name] for x in c.spec.loads], sizes, c.spec)[0]


@pytest.mark.parametrize(("opset", "target"), [(24, "onnx"), (24, "decomposed"), pytest.param(23, "onnx", marks=pytest.mark.slow)])
def test_every_spec_computes_what_the_reference_does(tmp_path: Path, opset: int, target: Any) -> None:
    translation, found = run(tmp_path, opset, target)
    assert len(translation.done) == len(CASES)
    for c, (_, form, _) in zip(CASES, translation.done, strict=True):
        assert form.lowered_to == (c.lowered_to if target == "onnx" else "standard ops"), c.name
        assert (c.why if target == "onnx" else "--target decomposed") in form.why, c.name
    for given, results in found:
        for c, got in zip(CASES, results, strict=True):
            torch.testing.assert_close(got.double(), truth(c, given), rtol=2e-5, atol=2e-6, equal_nan=True, msg=lambda m, c=c, given=given: f"{c.name} at {tuple(given[0].shape)}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.float64, 1e-10)], ids=str)
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    translation, found = run(tmp_path, 24, "onnx", dtype)
    assert dtype != torch.float64 or not any(form.fused for _, form, _ in translation.done)
    for given, results in found:
        for c, got in zip(CASES, results, strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), truth(c, given), rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, c=c: f"{c.name}: {m}")


def test_only_a_square_is_causal_by_the_attribute() -> None:
    square, rectangle = dims(True), dims(False)
    x = E.mul(E.const(0.25), E.score())
    for d, expected in ((square, True), (rectangle, False)):
        assert plan(AttentionSpec(d, x, E.le(d.k, d.q)), "onnx", "float32").causal is expected
    d = square
    for mask in (E.le(d.q, d.k), E.lt(d.k, d.q), E.le(d.k, E.add(d.q, E.ONE)), E.all_of(E.le(d.k, d.q), E.lt(E.sub(d.q, d.k), E.const(4))), E.TRUE):
        assert not plan(AttentionSpec(d, x, mask), "onnx", "float32").causal
    assert not plan(AttentionSpec(d, E.add(x, E.as_float(d.k)), E.le(d.k, d.q)), "onnx", "float32").causal


def test_every_operation_of_expressions_can_be_written() -> None:
    assert set(itertools.chain(E.OPERATIONS)) <= WRITTEN
