"""Each ONNX operator and what it is translated to: ONNX Runtime beside PyTorch, at sizes other than the file was read with."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from exported import run

from attnopt.capture.onnx.lift import lift
from attnopt.capture.onnx.read import prepared
from attnopt.capture.onnx.translate import RULES, LiftedFile

X, I, M = "float[b, s, 6] x", "int64[b, s] i", "bool[b, s] m"
CASES: dict[str, tuple[str, str]] = {
    "Add": (X, "y = Add(x, x)"),
    "Add of a number": (X, "c = Constant<value = float {2.5}>() y = Add(c, x)"),
    "Sub": (X, "c = Constant<value = float {2.5}>() y = Sub(c, x)"),
    "Sub of a number": (X, "c = Constant<value = float {2.5}>() y = Sub(x, c)"),
    "Mul": (X, "c = Constant<value = float[6] {1.0, 2.0, -3.0, 0.5, 7.0, 0.0}>() y = Mul(c, x)"),
    "Div": (X, "a = Abs(x) c = Constant<value = float {1.0}>() d = Add(a, c) y = Div(x, d)"),
    "Div of negative integers": (I, "c = Constant<value = int64 {-3}>() p = Add(i, c) t = Constant<value = int64 {2}>() y = Div(p, t)"),
    "Mod of negative integers": (I, "c = Constant<value = int64 {-3}>() p = Add(i, c) t = Constant<value = int64 {4}>() y = Mod(p, t)"),
    "Mod<fmod>": (X, "c = Constant<value = float[1] {0.7}>() y = Mod<fmod = 1>(x, c)"),
    "Mod of tensors": (I, "c = Constant<value = int64[2] {3, 4}>() h = Shape(i) o = Constant<value = int64 {7}>() p = Mul(i, o) e = Constant<value = int64 {1}>() d = Add(i, e) y = Mod(p, d)"),
    "Pow": (X, "c = Constant<value = float {2.0}>() y = Pow(x, c)"),
    "Pow of tensors": (X, "a = Abs(x) y = Pow(a, x)"),
    "Max": (X, "n = Neg(x) c = Constant<value = float[1] {0.3}>() y = Max(x, n, c)"),
    "Min": (X, "n = Neg(x) y = Min(x, n)"),
    "Sin, Cos": (X, "a = Sin(x) b_ = Cos(x) y = Mul(a, b_)"),
    "Exp, Log, Sqrt": (X, "a = Abs(x) e = Exp(x) l = Log(e) q = Sqrt(a) y = Add(l, q)"),
    "Reciprocal, Tanh": (X, "e = Exp(x) r = Reciprocal(e) t = Tanh(x) y = Add(r, t)"),
    "Sigmoid, Erf, Relu": (X, "g = Sigmoid(x) f = Erf(x) r = Relu(x) a = Add(g, f) y = Add(a, r)"),
    "Floor, Ceil, Round": (X, "a = Floor(x) c = Ceil(x) r = Round(x) d = Add(a, c) y = Add(d, r)"),
    "And, Or, Xor, Not": (M, "n = Not(m) c = Constant<value = bool {1}>() a = And(m, n) o = Or(a, m) y = Xor(o, c)"),
    "Equal": (I, "c = Constant<value = int64 {1}>() y = Equal(i, c)"),
    "Equal of booleans": (M, "c = Constant<value = bool {0}>() y = Equal(m, c)"),
    "Less, Greater": (I, "c = Constant<value = int64 {1}>() l = Less(i, c) g = Greater(c, i) a = LessOrEqual(i, c) e = GreaterOrEqual(i, i) p = And(l, g) q = And(a, e) y = Or(p, q)"),
    "IsNaN": (X, "l = Log(x) y = IsNaN(l)"),
    "Where": (X, "c = Constant<value = float {0.0}>() g = Greater(x, c) y = Where(g, x, c)"),
    "Where for NaN": (X, "l = Log(x) z = Constant<value = float {0.0}>() n = IsNaN(l) y = Where(n, z, l)"),
    "Where for NaN and infinities": (X, "zero = Constant<value = float {0.0}>() l = Log(x) r = Reciprocal(zero) g = Neg(x) e = Sqrt(g) big = Mul(l, r) v = Add(big, e) lo = Constant<value = float {-5.0}>() hi = Constant<value = float {3.4028234663852886e38}>() i = IsInf(v) n = IsNaN(v) p = Greater(v, zero) m = Less(v, zero) a = And(p, i) c = And(m, i) w = Where(n, zero, v) u = Where(c, lo, w) y = Where(a, hi, u)"),
    "Where for NaN of another value": (X, "zero = Constant<value = float {0.0}>() l = Log(x) n = IsNaN(l) y = Where(n, zero, x)"),
    "IsInf": (X, "zero = Constant<value = float {0.0}>() d = Div(x, zero) y = IsInf(d)"),
    "Clip": (X, "l = Constant<value = float {-0.5}>() h = Constant<value = float {0.25}>() y = Clip(x, l, h)"),
    "Clip from above": (X, "h = Constant<value = float {0.25}>() y = Clip(x, , h)"),
    "Cast": (X, "c = Cast<to = 7>(x) y = Cast<to = 9>(c)"),
    "CastLike": (I, "c = Constant<value = float {0.25}>() y = CastLike(i, c)"),
    "Identity, Dropout": (X, "z = Identity(x) y = Dropout(z)"),
    "Gelu": (X, "a = Gelu(x) t = Gelu<approximate = \"tanh\">(x) y = Add(a, t)"),
    "Softmax": (X, "y = Softmax<axis = 1>(x)"),
    "LogSoftmax": (X, "y = LogSoftmax(x)"),
    "LayerNormalization": (X, "c = Constant<value = float[6] {1.0, 2.0, -3.0, 0.5, 7.0, 0.0}>() y = LayerNormalization<epsilon = 0.01>(x, c, c)"),
    "LayerNormalization of two axes": ("float[b, 2, 3] x", "c = Constant<value = float[2, 3] {1.0, 2.0, -3.0, 0.5, 7.0, 0.0}>() y = LayerNormalization<axis = 1>(x, c)"),
    "ReduceSum": (X, "c = Constant<value = int64[2] {0, -1}>() y = ReduceSum<keepdims = 0>(x, c)"),
    "ReduceMean": (X, "y = ReduceMean(x)"),
    "ReduceMax, ReduceMin": (X, "c = Constant<value = int64[1] {1}>() a = ReduceMax(x, c) z = ReduceMin(x, c) y = Sub(a, z)"),
    "ReduceLogSumExp": (X, "c = Constant<value = int64[1] {-1}>() y = ReduceLogSumExp(x, c)"),
    "ReduceSum of no axes": (X, "c = Constant<value = int64[0] {}>() y = ReduceSum<noop_with_empty_axes = 1>(x, c)"),
    "ReduceProd of a shape": (X, "h = Shape(x) y = ReduceProd(h)"),
    "CumSum": (I, "c = Constant<value = int64 {1}>() y = CumSum(i, c)"),
    "CumSum of int32": (I, "j = Cast<to = 6>(i) c = Constant<value = int64 {1}>() y = CumSum(j, c)"),
    "MatMul": (X, "t = Transpose<perm = [0, 2, 1]>(x) y = MatMul(x, t)"),
    "MatMul with a vector": (X, "c = Constant<value = float[6] {1.0, 2.0, -3.0, 0.5, 7.0, 0.0}>() y = MatMul(x, c)"),
    "Gemm": ("float[s, 6] x", "c = Constant<value = float {0.3}>() y = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, x, c)"),
    "Gemm without a bias": ("float[s, 6] x", "y = Gemm<transA = 1, alpha = 0.5>(x, x)"),
    "Einsum": (X, "y = Einsum<equation = \"bsd,btd->bst\">(x, x)"),
    "Conv": ("float[b, 2, s] x", "c = Constant<value = float[2, 1, 3] {1.0, 2.0, -3.0, 0.5, 7.0, 0.0}>() d = Constant<value = float[2] {1.0, 2.0}>() y = Conv<pads = [1, 1], strides = [2], group = 2>(x, c, d)"),
    "Shape, Size": (X, "h = Shape<start = 1>(x) n = Size(x) y = Add(h, n)"),
    "Shape arithmetic": (X, "h = Shape(x) o = Constant<value = int64[1] {0}>() g = Gather(h, o) t = Constant<value = int64[1] {2}>() d = Div(g, t) u = Mul(d, t) w = Sub(g, u) p = Max(w, t) q = Min(p, g) y = Add(q, h)"),
    "ConstantOfShape": (X, "h = Shape<end = 2>(x) y = ConstantOfShape<value = float[1] {2.5}>(h)"),
    "Range": (X, "h = Shape<start = 1, end = 2>(x) n = Squeeze(h) o = Constant<value = int64 {1}>() t = Constant<value = int64 {2}>() y = Range(o, n, t)"),
    "Reshape": (X, "c = Constant<value = int64[4] {0, 0, 3, -1}>() y = Reshape(x, c)"),
    "Reshape by a shape": (X, "h = Shape<end = 2>(x) c = Constant<value = int64[2] {3, 2}>() s_ = Concat<axis = 0>(h, c) y = Reshape<allowzero = 1>(x, s_)"),
    "Flatten": (X, "y = Flatten<axis = 2>(x)"),
    "Transpose": (X, "y = Transpose(x)"),
    "Unsqueeze, Squeeze": (X, "c = Constant<value = int64[2] {1, -1}>() u = Unsqueeze(x, c) d = Constant<value = int64[1] {1}>() y = Squeeze(u, d)"),
    "Expand": (X, "c = Constant<value = int64[4] {3, 1, 1, 6}>() y = Expand(x, c)"),
    "Expand to a shape": ("float[b, 1, 6] x, float[b, s, 6] z", "h = Shape(z) y = Expand(x, h)"),
    "Tile": (X, "c = Constant<value = int64[3] {1, 2, 3}>() y = Tile(x, c)"),
    "Slice": (X, "b_ = Constant<value = int64[2] {1, -4}>() e = Constant<value = int64[2] {-1, 9223372036854775807}>() a = Constant<value = int64[2] {1, 2}>() t = Constant<value = int64[2] {1, 2}>() y = Slice(x, b_, e, a, t)"),
    "Slice of a shape": (X, "h = Shape(x) b_ = Constant<value = int64[1] {-2}>() e = Constant<value = int64[1] {9223372036854775807}>() y = Slice(h, b_, e)"),
    "Split": (X, "c = Constant<value = int64[2] {2, 4}>() a, y = Split<axis = -1>(x, c)"),
    "Split into equal parts": (X, "a, y, z = Split<axis = 2, num_outputs = 3>(x)"),
    "Concat": (X, "n = Neg(x) y = Concat<axis = 1>(x, n, x)"),
    "Gather": ("float[8, 3] x, int64[b, s] i", "y = Gather(x, i)"),
    "Gather of one": (X, "c = Constant<value = int64 {-1}>() y = Gather<axis = 1>(x, c)"),
    "Gather along an axis": (X, "c = Constant<value = int64[3] {0, -1, 2}>() y = Gather<axis = 2>(x, c)"),
    "Gather of a shape": (X, "h = Shape(x) c = Constant<value = int64[2] {2, 0}>() y = Gather(h, c)"),
    "GatherND": ("float[8, 8] x, int64[b, 2] i", "y = GatherND(x, i)"),
    "GatherElements": ("float[b, s, 6] x", "c = Constant<value = int64[1, 1, 2] {-1, 3}>() h = Shape<end = 2>(x) o = Constant<value = int64[1] {1}>() t = Concat<axis = 0>(h, o) i = Expand(c, t) y = GatherElements<axis = 2>(x, i)"),
    "Trilu": ("float[s, s] x", "c = Constant<value = int64 {-1}>() a = Trilu<upper = 0>(x) z = Trilu(x, c) y = Add(a, z)"),
    "Pad": (X, "p = Constant<value = int64[4] {1, 0, 0, 2}>() v = Constant<value = float {1.5}>() a = Constant<value = int64[2] {1, 2}>() y = Pad(x, p, v, a)"),
}  # fmt: skip
OPAQUE = {
    "another domain": (X, "y = HardSwish(x)"),
    "a shape that data decide": (I, "z = NonZero(i) y = Cast<to = 1>(z)"),
    "a reversed slice": (X, "b_ = Constant<value = int64[1] {-1}>() e = Constant<value = int64[1] {-9223372036854775807}>() a = Constant<value = int64[1] {1}>() t = Constant<value = int64[1] {-1}>() y = Slice(x, b_, e, a, t)"),
    "an exclusive sum": (I, "c = Constant<value = int64 {1}>() y = CumSum<exclusive = 1>(i, c)"),
}  # fmt: skip


def _model(inputs: str, body: str, result: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 24]> g ({inputs}) => ({result}) {{ {body} }}')


def _typed(inputs: str, body: str) -> onnx.ModelProto:
    """The model with the type of its result, which the text leaves open."""
    model = _model(inputs, body, "y")
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def _read(model: onnx.ModelProto, sizes: dict[str, int]) -> LiftedFile:
    return lift(prepared(ir.from_proto(model), 24), sizes, dict)


def _inputs(model: onnx.ModelProto, sizes: dict[str, int]) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    out: dict[str, np.ndarray[Any, Any]] = {}
    for v in model.graph.input:
        shape = [d.dim_value or sizes[d.dim_param] for d in v.type.tensor_type.shape.dim]
        kind = v.type.tensor_type.elem_type
        out[v.name] = rng.standard_normal(shape).astype(np.float32) if kind == 1 else rng.integers(0, 5, shape) if kind == 7 else rng.random(shape) < 0.5
    return out


@pytest.mark.parametrize("name", CASES)
def test_an_operator_is_translated_to_the_same_function(name: str) -> None:
    model = _typed(*CASES[name])
    lifted = _read(model, {"b": 2, "s": 5})
    assert lifted.opaque == {}
    for sizes in ({"b": 2, "s": 5}, {"b": 3, "s": 7}, {"b": 1, "s": 4}):
        given = _inputs(model, sizes)
        (expected,) = run(model, given)
        (got,) = lifted.graph_module(*(torch.from_numpy(x) for x in given.values()))
        assert got.numpy().dtype == expected.dtype
        np.testing.assert_allclose(got.numpy(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", OPAQUE)
def test_what_has_no_translation_is_left_out(name: str) -> None:
    model = _typed(*OPAQUE[name])
    found = lift(prepared(ir.from_proto(model), 24), {"b": 2, "s": 5}, lambda: {"z": (torch.int64, (2, 9)), "y": (torch.float32, (2, 5, 6))})
    assert sum(found.opaque.values()) == 1
    assert len(found.graph_module.graph.output_node().args[0]) == 1


def test_of_a_result_that_is_no_tensor_nothing_is_known() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 24]> g (float[b, s, 6] x) => (seq(float[b, s, 6]) y, float[b, s, 6] z) { y = SequenceConstruct(x) z = Neg(x) }'
    )
    found = _read(model, {"b": 2, "s": 5})
    assert found.opaque == {"SequenceConstruct": 1} and len(found.graph_module.graph.output_node().args[0]) == 1


def test_every_rule_has_a_case() -> None:
    used = {n.op_type for c in CASES.values() for n in _typed(*c).graph.node}
    assert set(RULES) <= used, set(RULES) - used


@pytest.mark.parametrize(("size", "dtype", "kept"), [(100, "float32", True), ((1 << 22) + 2, "float32", False), ((1 << 22) + 2, "int64", True)])
def test_a_large_matrix_of_weights_is_not_read(size: int, dtype: str, kept: bool) -> None:
    model = _model("float[b, 2] x", "y = Identity(w)", "y")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((size // 2, 2), dtype), "w"))
    lifted = lift(ir.from_proto(model), {"b": 2}, dict)
    (constant,) = [*lifted.graph_module.parameters(), *lifted.graph_module.buffers()]
    assert constant.is_meta is not kept and tuple(constant.shape) == (size // 2, 2)
