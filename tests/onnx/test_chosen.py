"""A matrix gathered for each row and a batched product, as products of groups of rows: in ONNX Runtime beside the nodes that it stands for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import attnopt
from attnopt.config import OptimizeConfig
from attnopt.emit.onnx.chosen import by_groups

GATHER = "w = Gather(weight, choice)"
GATHER_ND = "i = Unsqueeze(choice, one) w = GatherND(weight, i)"
ROW = "r = Unsqueeze(x, one) p = MatMul(r, w) y = Squeeze(p, one)"
COLUMN = "r = Unsqueeze(x, two) p = MatMul(w, r) y = Squeeze(p, two)"


def model(body: str, rows: str = "float[rows, 32] x", choice: str = "int64[rows] choice", outputs: str = "float[rows, n] y", more: str = "", sizes: tuple[int, ...] = (3, 32, 40)) -> ir.Model:
    made = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 24]> chosen ({rows}, {choice}{more}) => ({outputs}) <int64[1] one = {{1}}, int64[1] two = {{2}}> {{ {body} }}"""
    )
    if "weight" not in more:
        weight = np.random.default_rng(1).standard_normal(sizes).astype(np.float32)
        made.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    return ir.from_proto(onnx.shape_inference.infer_shapes(made))


def session(m: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(ir.to_proto(m).SerializeToString(), options, providers=["CPUExecutionProvider"])


def rows_of(choice: list[int], dtype: type = np.int64) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(2).standard_normal((len(choice), 32)).astype(np.float32), "choice": np.array(choice, dtype=dtype)}


CHOICES = {"mixed": [2, 0, 1, 0, 2, 2], "one group": [1, 1, 1, 1], "a group without rows": [2, 0, 2], "one row": [1], "from the end": [-1, 0, -3, 2, 1], "no row": []}


@pytest.mark.parametrize("gather", [pytest.param(GATHER, id="Gather"), pytest.param(GATHER_ND, id="GatherND")])
@pytest.mark.parametrize(("product", "sizes"), [pytest.param(ROW, (3, 32, 40), id="row"), pytest.param(COLUMN, (3, 40, 32), id="column")])
def test_rows_meet_the_matrix_that_they_chose(gather: str, product: str, sizes: tuple[int, ...]) -> None:
    m = model(f"{gather} {product}", sizes=sizes)
    before = session(m)
    assert by_groups(m) == 1
    assert not any(n.op_type in ("Gather", "GatherND") and n.inputs[0].name == "weight" for n in m.graph)
    onnx.checker.check_model(ir.to_proto(m), full_check=True)
    after = session(m)
    for choice in CHOICES.values():
        feed = rows_of(choice)
        np.testing.assert_allclose(after.run(None, feed)[0], before.run(None, feed)[0], rtol=1e-5, atol=1e-5)


def test_a_choice_is_sorted_once_for_all_of_its_products() -> None:
    m = model(f"{GATHER} {ROW.replace('y =', 'z =')} w2 = Gather(weight, choice) s = Add(x, x) r2 = Unsqueeze(s, one) p2 = MatMul(r2, w2) z2 = Squeeze(p2, one) y = Add(z, z2)")
    before = session(m)
    assert by_groups(m) == 2 and [n.op_type for n in m.graph].count("TopK") == 1
    feed = rows_of(CHOICES["mixed"])
    np.testing.assert_allclose(session(m).run(None, feed)[0], before.run(None, feed)[0], rtol=1e-5, atol=1e-5)


def test_int32_and_one_matrix() -> None:
    m = model(f"{GATHER} {ROW}", choice="int32[rows] choice", sizes=(1, 32, 40))
    before, feed = session(m), rows_of([0, 0, -1], np.int32)
    assert by_groups(m) == 1
    np.testing.assert_allclose(session(m).run(None, feed)[0], before.run(None, feed)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outside", [[0, 3, 1], [0, -4, 1]], ids=["above", "below"])
def test_an_index_that_the_original_refuses_is_refused(outside: list[int]) -> None:
    m = model(f"{GATHER} {ROW}")
    by_groups(m)
    with pytest.raises(Exception, match="indices element out of data bounds"):
        session(m).run(None, rows_of(outside))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"body": f"{GATHER} {ROW}", "more": ", float[3, 32, 40] weight"}, id="matrices that are an input"),
        pytest.param({"body": f"{GATHER} {ROW}", "sizes": (300, 32, 40)}, id="many groups"),
        pytest.param({"body": f"{GATHER} {ROW}", "sizes": (3, 32, 31)}, id="small matrices"),
        pytest.param({"body": f"{GATHER} {ROW} q = Identity(w)", "outputs": "float[rows, n] y, float[rows, 32, 40] q"}, id="gathered for something else too"),
        pytest.param({"body": f"{GATHER} {ROW}", "rows": "float[1, 32] x"}, id="one row for all"),
        pytest.param({"body": f"{GATHER} {ROW}", "rows": "float[others, 32] x"}, id="lengths that are not known to be equal"),
        pytest.param({"body": "w = Gather<axis = 1>(weight, choice) r = Unsqueeze(x, one) y = MatMul(r, w)", "sizes": (3, 32, 40), "choice": "int64[32] choice", "rows": "float[3, 32] x", "outputs": "float[a, b, c] y"}, id="another axis"),
        pytest.param({"body": f"{GATHER} y = MatMul(x, w)", "rows": "float[rows, 5, 32] x", "outputs": "float[rows, 5, n] y"}, id="several rows for each choice"),
        pytest.param({"body": "w = Gather(weight, choice) r = Unsqueeze(x, one) v = Transpose<perm = [0, 2, 1]>(w) y = MatMul(r, v)", "sizes": (3, 40, 32), "outputs": "float[a, b, c] y"}, id="turned after the choice"),
    ],
)  # fmt: skip
def test_anything_else_stays(other: dict) -> None:
    m = model(**other)
    before = [n.op_type for n in m.graph]
    assert by_groups(m) == 0 and [n.op_type for n in m.graph] == before


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral"])
def test_experts_that_are_gathered_become_groups_of_rows(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=50, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    module.set_experts_implementation("batched_mm")
    ids = torch.randint(1, 50, (2, 9))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    made = attnopt.optimize(module, kwargs=given, config=OptimizeConfig(backend="reference", verify=False, capture="export"))
    made.export_onnx(tmp_path / "model.onnx")  # compared with the original in ONNX Runtime
    nodes = list(ir.load(tmp_path / "model.onnx").graph)
    assert sum(n.name is not None and n.name.startswith("attnopt/groups/") and n.op_type == "MatMul" for n in nodes) == 2 * 4
