"""Specs of every kind as ONNX, run in ONNX Runtime against the float64 reference, at another size than they were exported with."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from attnopt.emit.onnx import parts
from attnopt.emit.onnx import plan as plans
from attnopt.emit.onnx.contrib import attach_functions
from attnopt.emit.onnx.lost import bias_of
from attnopt.emit.onnx.model import IR_VERSION, Translation
from attnopt.emit.onnx.plan import plan
from attnopt.emit.onnx.program import WRITTEN
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec, Dims, Load
from attnopt.kernels import reference

HQ, HKV, D = 4, 2, 8


def dims(square: bool, groups: bool = True, Dv: int = D) -> Dims:
    b, sq = E.sym("B", 1), E.sym("Sq", 1)
    return Dims(b, E.const(HQ), E.const(HKV if groups else HQ), sq, sq if square else E.sym("Skv", 1), E.const(D), E.const(Dv))


@dataclass
class Case:
    name: str
    spec: AttentionSpec
    lowered_to: str
    why: str
    ort: str
    """What ``--target ort`` makes of it."""
    ort_why: str

    @property
    def square(self) -> bool:
        return self.spec.dims.Sq is self.spec.dims.Skv


GQA, MHA = "GroupQueryAttention", "MultiHeadAttention"


def _cases() -> list[Case]:
    r, s, m, n = dims(False), dims(True), dims(False, groups=False), dims(True, groups=False)
    narrow, narrow_m = dims(True, Dv=4), dims(True, groups=False, Dv=4)
    x = E.mul(E.const(0.25), E.score())
    pad = E.load(0, (r.b, r.k), "bool")
    spad = E.load(0, (s.b, s.k), "bool")
    padding, bias, slopes = Load("padding", "bool"), Load("bias", "float"), Load("slopes", "float")
    distance = E.as_float(E.sub(r.k, r.q))
    causal = E.le(s.k, s.q)
    chunk = E.eq(E.floordiv(r.q, E.const(3)), E.floordiv(r.k, E.const(3)))
    low, lost = E.const(float(torch.finfo(torch.float32).min)), E.const(-math.inf)
    right, lengths = E.load(0, (s.b, s.k), "bool"), E.lt(s.k, E.load(0, (s.b,), "int"))
    window = E.lt(E.sub(s.q, s.k), E.const(3))
    slope, mpad = E.load(1, (s.h,), "float"), E.load(0, (m.b, m.k), "bool")
    to_right, counted = Load("right", "bool"), Load("lengths", "int")

    def capped(factor: float) -> E.Expr:
        return E.mul(E.const(factor), E.function("tanh", E.mul(E.const(0.25 / factor), E.score())))

    def case(name: str, spec: AttentionSpec, lowered_to: str = "Attention", why: str = "", ort: str = "", ort_why: str = "") -> Case:
        return Case(name, spec, lowered_to, why, ort or lowered_to, ort_why)

    return [
        case(
            "full",
            AttentionSpec(r, x),
            why="no mask",
            ort_why="no mask; no GroupQueryAttention: as many queries as keys is not proven; no MultiHeadAttention: 2 query heads share a KV head",
        ),
        case("square causal", AttentionSpec(s, x, causal), why="is_causal", ort=GQA, ort_why="causal over as many queries as keys, proven"),
        case("rectangular causal", AttentionSpec(r, x, E.le(r.k, r.q)), why="boolean mask"),
        case("causal to the bottom right", AttentionSpec(r, x, E.le(r.k, E.add(r.q, E.sub(r.Skv, r.Sq))), sizes=("Sq", "Skv")), why="boolean mask"),
        case("reverse causal", AttentionSpec(s, x, E.le(s.q, s.k)), why="boolean mask", ort_why="no GroupQueryAttention: it is not causal"),
        case("window", AttentionSpec(s, x, E.all_of(causal, E.lt(E.sub(s.q, s.k), E.const(3)))), why="boolean mask", ort=GQA, ort_why="local_window_size 3"),
        case("chunks", AttentionSpec(r, x, chunk), why="boolean mask"),
        case("remainders of a negative number", AttentionSpec(r, x, E.le(E.mod(E.sub(r.k, r.q), E.const(3)), E.ONE)), why="boolean mask"),
        case("padding, empty rows NaN", AttentionSpec(r, x, pad, loads=(padding,)), why="boolean mask"),
        case("padding, empty rows zero", AttentionSpec(r, x, pad, empty_rows="zero", loads=(padding,)), why="boolean mask"),
        case("padding, empty rows uniform", AttentionSpec(r, x, pad, empty_rows="uniform", loads=(padding,)), why="boolean mask"),
        case(
            "causal padding, empty rows by program",
            AttentionSpec(s, x, E.all_of(causal, spad), "program", E.add(x, E.where(causal, E.FZERO, low)), loads=(padding,)),
            why="additive mask",
            ort_why="rows without a visible key see keys behind the query",
        ),
        case("padding, empty rows by the lowest number", AttentionSpec(r, x, pad, "program", E.add(x, low), loads=(padding,)), why="additive mask"),
        case("a bias of the lowest number", AttentionSpec(r, E.add(x, E.where(pad, E.FZERO, low)), loads=(padding,)), why="additive mask"),
        case("padding, empty rows by another scale", AttentionSpec(r, x, pad, "program", E.score(), loads=(padding,)), "standard ops", "another form"),
        case(
            "causal padding, empty rows by a choice of the lowest number, filled again",
            AttentionSpec(s, x, E.all_of(causal, spad), "program", E.add(E.where(causal, x, low), low), loads=(padding,)),
            why="additive mask",
            ort_why="rows without a visible key see keys behind the query",
        ),
        case(
            "slopes and padding, empty rows by a choice of the lowest number",
            AttentionSpec(r, E.add(x, E.mul(slope, E.as_float(r.k))), pad, "program", E.where(pad, low, E.add(x, E.mul(slope, E.as_float(r.k)))), loads=(padding, slopes)),
            why="additive mask",
        ),
        case(
            "padding, empty rows by a choice of a number that scores count beside",
            AttentionSpec(r, x, pad, "program", E.where(pad, E.const(-1e9), x), loads=(padding,)),
            "standard ops",
            "another form",
        ),
        case("bias of one load", AttentionSpec(r, E.add(x, E.load(0, (E.ZERO, r.h, r.q, r.k), "float")), loads=(bias,)), why="additive mask"),
        case(
            "bias by distance",
            AttentionSpec(r, E.add(x, E.load(0, (E.ZERO, r.h, E.ZERO, E.absolute(E.sub(r.k, r.q))), "float")), loads=(bias,)),
            why="additive mask",
        ),
        case("slopes", AttentionSpec(r, E.add(x, E.mul(E.load(0, (r.h,), "float"), distance)), loads=(slopes,)), why="additive mask"),
        case(
            "softcap",
            AttentionSpec(s, E.mul(E.const(5.0), E.function("tanh", E.mul(E.const(0.05), E.score()))), causal),
            "standard ops",
            "softcap 5",
            "standard ops",
            "no GroupQueryAttention: softcap 5",
        ),
        case(
            "sink",
            AttentionSpec(s, x, E.all_of(causal, E.lt(s.k, s.q)), "zero", sink=E.load(0, (s.h,), "float"), loads=(slopes,)),
            "Attention",
            "column for the sinks",
            GQA,
            "head_sink, attention_bias",
        ),
        case("negative scale", AttentionSpec(r, E.mul(E.const(-0.25), E.score())), "standard ops", "scale is -0.25"),
        case("a score of the score's square", AttentionSpec(r, E.mul(x, x)), "standard ops", "not scale * s + bias"),
        # what only --target ort tells apart
        *(
            case(
                f"causal, {side}, empty rows {empty}", AttentionSpec(s, x, E.all_of(causal, mask), empty, loads=(load,)), "Attention", "boolean mask", GQA, why
            )
            for side, mask, load, why in (
                ("left padding", spad, padding, "attention_bias"),
                ("right padding", right, to_right, "attention_bias"),
                ("lengths", lengths, counted, "seqlens_k"),
            )
            for empty in ("nan", "zero", "uniform")
        ),
        case(
            "causal to the right of padding by lengths",
            AttentionSpec(s, x, E.all_of(causal, E.le(E.load(0, (s.b,), "int"), s.k)), loads=(counted,)),
            "Attention",
            "boolean mask",
            GQA,
            "attention_bias",
        ),
        case("lengths that are not causal", AttentionSpec(s, x, lengths, loads=(counted,)), "Attention", "boolean mask", "Attention", "it is not causal"),
        case(
            "causal, slopes",
            AttentionSpec(s, E.add(x, E.mul(E.load(0, (s.h,), "float"), E.as_float(E.sub(s.k, s.q)))), causal, loads=(slopes,)),
            "Attention",
            "additive mask",
            GQA,
            "attention_bias",
        ),
        case(
            "causal, a bias of the lowest number",
            AttentionSpec(s, E.add(x, E.where(spad, E.FZERO, low)), causal, loads=(padding,)),
            "Attention",
            "additive mask",
            GQA,
            "attention_bias",
        ),
        case(
            "causal, a bias of minus infinity",
            AttentionSpec(s, E.add(x, E.where(spad, E.FZERO, lost)), causal, loads=(padding,)),
            "Attention",
            "additive mask",
            GQA,
            "attention_bias",
        ),
        case(
            "causal, padding, window, sink",
            AttentionSpec(s, x, E.all_of(causal, window, spad), "zero", sink=slope, loads=(padding, slopes)),
            "Attention",
            "column for the sinks",
            GQA,
            "local_window_size 3, head_sink, attention_bias",
        ),
        case("causal, softmax plus one", AttentionSpec(s, x, causal, "zero", sink=E.FZERO), "Attention", "column for the sinks", GQA, "head_sink"),
        case(
            "a sink for each query",
            AttentionSpec(s, x, causal, "zero", sink=E.as_float(s.q)),
            "Attention",
            "column for the sinks",
            ort_why="a sink differs between queries",
        ),
        case(
            "causal, window, padding",
            AttentionSpec(s, x, E.all_of(causal, window, spad), "uniform", loads=(padding,)),
            "Attention",
            "boolean mask",
            GQA,
            "local_window_size 3, attention_bias",
        ),
        case(
            "causal, window, padding, softcap",
            AttentionSpec(s, capped(2.0), E.all_of(causal, window, spad), "zero", loads=(padding,)),
            "standard ops",
            "softcap 2",
            "standard ops",
            "no GroupQueryAttention: softcap 2",
        ),
        case(
            "a window of one key more to the right",
            AttentionSpec(s, x, E.all_of(E.le(s.k, E.add(s.q, E.ONE)), window)),
            "Attention",
            "boolean mask",
            ort_why="it is not causal",
        ),
        case("causal, narrow values", AttentionSpec(narrow, x, causal), "Attention", "is_causal", "Attention", "values have 4 features and keys 8"),
        case("full, a KV head for each", AttentionSpec(m, x), "Attention", "no mask", MHA, "no mask"),
        *(
            case(
                f"padding, a KV head for each, empty rows {empty}",
                AttentionSpec(m, x, mpad, empty, loads=(padding,)),
                "Attention",
                "boolean mask",
                MHA,
                "attention_bias",
            )
            for empty in ("nan", "zero", "uniform")
        ),
        case(
            "padding, a KV head for each, by program",
            AttentionSpec(m, x, mpad, "program", E.add(x, low), loads=(padding,)),
            "Attention",
            "additive mask",
            MHA,
            "attention_bias",
        ),
        case("rectangular causal, a KV head for each", AttentionSpec(m, x, E.le(m.k, m.q)), "Attention", "boolean mask", MHA, "attention_bias"),
        case("causal, a KV head for each", AttentionSpec(n, x, causal), "Attention", "is_causal", GQA, "causal over"),
        case("causal, a KV head for each, narrow values", AttentionSpec(narrow_m, x, causal), "Attention", "is_causal", MHA, "attention_bias"),
        case("softcap, a KV head for each, full", AttentionSpec(m, capped(5.0)), "standard ops", "softcap 5", ort_why="no MultiHeadAttention: softcap 5"),
    ]


CASES = _cases()


def operands(c: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of the case's number of keys, heads and features."""
    if c.square:
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    if c.spec.groups == 1:
        k, v = (x.repeat_interleave(HQ // HKV, dim=1) for x in (k, v))
    return k, v[..., : c.spec.dims.Dv.value]


class Model(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor, right: Tensor, lengths: Tensor, bias: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
        named = {"padding": padding, "right": right, "lengths": lengths, "bias": bias, "slopes": slopes}
        outs = []
        for c in CASES:
            kk, vv = operands(c, q, k, v)
            sizes = [{"Sq": q.shape[2], "Skv": kk.shape[2]}[n] for n in c.spec.sizes]
            loads = [named[x.name] for x in c.spec.loads]
            outs.append(torch.ops.attnopt.attention(q, kk, vv, loads, sizes, c.spec.to_json(), "reference"))
        return tuple(outs)


NAMES = ("q", "k", "v", "padding", "right", "lengths", "bias", "slopes")


def inputs(B: int, Sq: int, Skv: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(B * 100 + Sq)
    q, k, v = (torch.randn(B, h, n, D, generator=g, dtype=torch.float64).to(dtype) for h, n in ((HQ, Sq), (HKV, Skv), (HKV, Skv)))
    padding = torch.ones(B, Skv, dtype=torch.bool)
    padding[0, :2] = False
    padding[-1] = False  # a row of the batch without any key
    if B > 2:
        padding[1, 1:4] = False  # a hole as wide as the window: query 3 sees nothing, between queries that do
    lengths = torch.tensor([Sq, 2, 0, Sq + 3][-B:])
    right = torch.arange(Skv)[None] < lengths[:, None]
    bias, slopes = torch.randn(1, HQ, 16, 16, generator=g, dtype=torch.float64).to(dtype), torch.rand(HQ, generator=g, dtype=torch.float64).to(dtype)
    return q, k, v, padding, right, lengths, bias, slopes


@functools.cache
def captured(dtype: torch.dtype) -> torch.export.ExportedProgram:
    """All cases as one program, which every target reads and none changes."""
    opened = ((0, 2), (0, 2), (0, 2), (0, 1), (0, 1), (0,), (), ())
    shapes = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in opened)
    return torch.export.export(Model(), inputs(2, 5, 7, dtype), dynamic_shapes=shapes)


def run(folder: Path, opset: int, target: Any, dtype: torch.dtype = torch.float32) -> tuple[Translation, list[tuple[tuple[Tensor, ...], list[Tensor]]]]:
    """Exported at one size and run at three: the inputs and results of each."""
    translation = Translation(opset, target)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        onnx_program = torch.onnx.export(captured(dtype), dynamo=True, opset_version=opset, custom_translation_table=translation.table(), verbose=False, optimize=False)
    attach_functions(onnx_program.model, opset)
    onnx_program.model.ir_version = IR_VERSION
    path = folder / "model.onnx"
    onnx_program.save(path)
    return translation, results(path, dtype)


def results(path: Path, dtype: torch.dtype = torch.float32) -> list[tuple[tuple[Tensor, ...], list[Tensor]]]:
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = []
    for sizes in ((2, 5, 7), (1, 4, 4), (3, 6, 9), (4, 5, 5)):
        given = inputs(*sizes, dtype)
        feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), given, strict=True)}
        found.append((given, [torch.from_numpy(np.asarray(x)) for x in session.run(None, feed)]))
    return found


def truth(c: Case, given: tuple[Tensor, ...]) -> Tensor:
    named = {name: x.double() if x.is_floating_point() else x for name, x in zip(NAMES, given, strict=True)}
    q = named["q"]
    k, v = operands(c, q, named["k"], named["v"])
    sizes = [{"Sq": q.shape[2], "Skv": k.shape[2]}[n] for n in c.spec.sizes]
    with torch.no_grad():
        return reference.attention(q, k, v, [named[x.name] for x in c.spec.loads], sizes, c.spec)[0]


def assert_true(found: list[tuple[tuple[Tensor, ...], list[Tensor]]], rtol: float = 2e-5, atol: float = 2e-6) -> None:
    for given, got in found:
        for c, o in zip(CASES, got, strict=True):
            torch.testing.assert_close(
                o.double(), truth(c, given), rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, c=c, given=given: f"{c.name} at {tuple(given[0].shape)}: {m}"
            )


@pytest.mark.parametrize(("opset", "target"), [(24, "onnx"), (24, "ort"), (24, "decomposed"), pytest.param(23, "onnx", marks=pytest.mark.slow)])
def test_every_spec_computes_what_the_reference_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opset: int, target: Any) -> None:
    monkeypatch.setattr(plans, "may_be_parted", lambda spec, dtype: False)
    translation, found = run(tmp_path, opset, target)
    assert len(translation.done) == len(CASES)
    for c, done in zip(CASES, translation.done, strict=True):
        to, why = {"onnx": (c.lowered_to, c.why), "ort": (c.ort, c.ort_why), "decomposed": ("standard ops", "--target decomposed")}[target]
        assert done.plan.lowered_to == to, c.name
        assert why in done.plan.why, c.name
    assert_true(found)
    if target == "ort":  # what a runtime without these operators computes
        model = onnx.inliner.inline_local_functions(onnx.load(tmp_path / "model.onnx"))
        assert {n.domain for n in model.graph.node} == {""}
        onnx.save(model, tmp_path / "inlined.onnx")
        assert_true(results(tmp_path / "inlined.onnx"))


@pytest.mark.parametrize("opset", [24, pytest.param(23, marks=pytest.mark.slow)])
def test_causal_specs_in_parts_compute_what_the_reference_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opset: int) -> None:
    monkeypatch.setattr(parts, "PART", 3)  # two or three of each example, whose last ones share rows
    translation, found = run(tmp_path, opset, "ort")
    causal = [c.square and E.le(c.spec.dims.k, c.spec.dims.q) in E.conjuncts(c.spec.mask) for c in CASES]
    whole = {"causal, slopes", *(c.name for c in CASES if c.spec.empty_rows == "program")}  # a bias of query and key, and rows that weigh all keys
    assert [c.name for c, x in zip(CASES, translation.done, strict=True) if x.plan.parts] == [c.name for c, x in zip(CASES, causal, strict=True) if x and c.name not in whole]
    for c, done in zip(CASES, translation.done, strict=True):
        assert not done.plan.parts or (done.plan.lowered_to == c.lowered_to and done.plan.why.startswith("in parts of at most 128 queries")), c.name
    loops = [n for n in onnx.load(tmp_path / "model.onnx").graph.node if n.op_type == "Loop"]
    assert len(loops) == sum(x.plan.parts for x in translation.done)
    assert_true(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "target", "tolerance"),
    [(torch.float16, "onnx", 4e-3), (torch.float16, "ort", 4e-3), (torch.float64, "onnx", 1e-10), (torch.float64, "ort", 1e-10)],
    ids=str,
)
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype, target: Any, tolerance: float) -> None:
    translation, found = run(tmp_path, 24, target, dtype)
    assert dtype != torch.float64 or not any(x.plan.fused for x in translation.done)
    assert all(got.dtype == dtype for _, results in found for got in results)
    assert_true(found, tolerance, tolerance)


def test_only_a_square_is_causal_by_the_attribute() -> None:
    square, rectangle = dims(True), dims(False)
    x = E.mul(E.const(0.25), E.score())
    for d, expected in ((square, True), (rectangle, False)):
        assert plan(AttentionSpec(d, x, E.le(d.k, d.q)), "onnx", "float32").causal is expected
    d = square
    for mask in (E.le(d.q, d.k), E.lt(d.k, d.q), E.le(d.k, E.add(d.q, E.ONE)), E.all_of(E.le(d.k, d.q), E.lt(E.sub(d.q, d.k), E.const(4))), E.TRUE):
        assert not plan(AttentionSpec(d, x, mask), "onnx", "float32").causal
    assert not plan(AttentionSpec(d, E.add(x, E.as_float(d.k)), E.le(d.k, d.q)), "onnx", "float32").causal


def test_a_fill_is_a_bias_only_where_every_score_is_lost_beside_it() -> None:
    d, s = dims(True), E.score()
    x, seen, bias = E.mul(E.const(0.25), s), E.le(d.k, d.q), E.as_float(d.k)
    deep, low = E.const(-(2.0**121)), E.const(float(torch.finfo(torch.float32).min))
    assert bias_of(E.add(x, bias, E.const(3.0)), 0.25) is E.add(bias, E.const(3.0))
    assert bias_of(E.where(seen, E.add(x, bias), deep), 0.25) is E.where(seen, bias, deep)
    assert bias_of(E.add(E.where(seen, low, x), bias), 0.25) is E.add(E.where(seen, low, E.FZERO), bias)
    assert bias_of(E.where(seen, E.where(E.lt(d.k, E.const(2)), x, low), E.const(-math.inf)), 0.25) is not None
    for wrong in (
        E.where(seen, x, E.const(-(2.0**100))),  # scores count beside it
        E.where(seen, x, E.const(-65504.0)),
        E.where(seen, x, E.const(2.0**121)),
        E.where(seen, x, E.mul(E.const(-(2.0**121)), bias)),  # zero for the first key
        E.where(E.le(s, E.FZERO), x, low),  # chosen by the score
        E.mul(E.const(0.5), E.where(seen, x, low)),
        E.add(E.where(seen, x, low), E.where(seen, low, x)),
        E.add(x, E.where(seen, x, low)),
        E.where(seen, s, low),
        E.function("tanh", x),
    ):
        assert bias_of(wrong, 0.25) is None, wrong


def test_every_operation_of_expressions_can_be_written() -> None:
    assert set(itertools.chain(E.OPERATIONS)) <= WRITTEN
