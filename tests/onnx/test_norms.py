"""Root mean square norms in files for ONNX Runtime: one operator, where every value between is read by the next one alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from attnopt.emit.onnx.norms import join_norms

NORM = """
    square = Pow(x, two) mean = ReduceMean<keepdims = 1>(square, last) shifted = Add(mean, epsilon) root = Sqrt(shifted)
    inverse = Reciprocal(root) normal = Mul(x, inverse) y = Mul(weight, normal)
"""


def model(body: str = NORM, weight: str = "float[8] weight", more: str = "", outputs: str = "float[batch, sequence, 8] y") -> ir.Model:
    made = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 24]> norm (float[batch, sequence, 8] x{more}) => ({outputs})
        <{weight} = {{1.5, 0.5, -1.0, 2.0, 0.1, 3.0, 1.0, -2.0}}, float two = {{2.0}}, float three = {{3.0}}, int64[1] last = {{-1}}, int64[1] middle = {{1}}, float epsilon = {{1e-3}}> {{ {body} }}"""
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(made))


def run(m: ir.Model) -> list[np.ndarray]:
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: x if i.name == "x" else np.float32(0.5) for i in session.get_inputs()})


@pytest.mark.parametrize("swapped", [False, True])
def test_a_norm_is_one_operator(swapped: bool) -> None:
    m = model(NORM.replace("Mul(x, inverse)", "Mul(inverse, x)").replace("Mul(weight, normal)", "Mul(normal, weight)").replace("Add(mean, epsilon)", "Add(epsilon, mean)") if swapped else NORM)
    expected = run(m)
    assert join_norms(m) == 1 and [n.op_type for n in m.graph] == ["RMSNormalization"]
    onnx.checker.check_model(ir.to_proto(m), full_check=True)
    np.testing.assert_allclose(run(m)[0], expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"body": NORM.replace("Pow(x, two)", "Pow(x, three)")}, id="cubes"),
        pytest.param({"body": NORM.replace("(square, last)", "(square, middle)")}, id="another axis"),
        pytest.param({"body": NORM.replace("keepdims = 1", "keepdims = 1, noop_with_empty_axes = 0").replace("Mul(x, inverse)", "Mul(square, inverse)")}, id="of another value"),
        pytest.param({"body": NORM.replace("Reciprocal(root)", "Neg(root)")}, id="not divided"),
        pytest.param({"body": NORM, "outputs": "float[batch, sequence, 8] y, float[batch, sequence, 1] root"}, id="a value between is a result"),
        pytest.param({"body": NORM + "z = Add(y, normal)", "outputs": "float[batch, sequence, 8] z"}, id="a value between is read again"),
        pytest.param({"body": NORM.replace("epsilon", "e"), "more": ", float e"}, id="an epsilon that is an input"),
        pytest.param({"weight": "float[8, 1] weight", "outputs": "float[batch, n, m] y", "body": NORM.replace("Mul(weight, normal)", "MatMul(normal, weight)")}, id="a product"),
        pytest.param({"weight": "float[1, 8] weight"}, id="a weight of two axes"),
    ],
)
def test_anything_else_stays(other: dict[str, str]) -> None:
    m = model(**other)
    before = [n.op_type for n in m.graph]
    assert join_norms(m) == 0 and [n.op_type for n in m.graph] == before
