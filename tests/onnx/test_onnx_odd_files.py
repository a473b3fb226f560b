"""Small files of every shape that a file may have: opsets, functions, branches, operators of others, caches, what is fused already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exported import ATTENTION, operators, run, small, text, weighted

import attnopt
from attnopt.cli.main import run as command
from attnopt.errors import VerificationError

D = 8
BOTH = f"float[batch, sequence, {D}] y, float[batch, sequence, sequence] "


def check(m: onnx.ModelProto, fused: int, path: Path | None = None) -> Any:
    report = attnopt.optimize_onnx(m, path)
    assert [x.spec is not None for x in report.layers].count(True) == fused, [(x.words, x.why) for x in report.layers]
    if fused:
        x = {i.name: np.random.default_rng(1).standard_normal((3, 11, D)).astype(np.float32) for i in m.graph.input}
        for a, b in zip(run(ir.to_proto(report.model), x), run(m, x), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    return report


@pytest.mark.parametrize("opset", [13, 17, 18, 21, 23, 24, 25])
def test_every_opset_from_13_on_is_read(opset: int, tmp_path: Path) -> None:
    report = check(small(opset=opset), 1, tmp_path / "out.onnx")
    assert report.opset == max(opset, 24) == onnx.load(tmp_path / "out.onnx").opset_import[0].version


def test_a_function_of_the_file_is_looked_into() -> None:
    body = ATTENTION.replace("(x", "(v").replace(", x)", ", v)")
    check(onnx.parser.parse_model(text("y = own.Attend(x)", head=', "own": 1') + f' <domain: "own", opset_import: ["": 20]> Attend (v) => (y) {{ {body} }}'), 1)


def test_an_attention_between_operators_without_a_translation() -> None:
    report = check(small("h = HardSwish(x) " + ATTENTION.replace("(x", "(h").replace(", x)", ", h)").replace("y =", "o =") + " y = HardSwish(o)"), 1)
    assert [r.message for r in report.analysis.remarks] == ["Of the results of HardSwish (2) only the shape is known."]


def test_a_function_of_an_operator_of_the_runtime_is_left_alone() -> None:
    body = "h = com.microsoft.QuickGelu<alpha = 1.702>(x) " + ATTENTION.replace("(x", "(h").replace(", x)", ", h)")
    quick = ' <domain: "com.microsoft", opset_import: ["": 24]> QuickGelu <alpha> (v) => (r) { a = Constant<value_float: float = @alpha>() w = Mul(v, a) s = Sigmoid(w) r = Mul(v, s) }'
    report = check(onnx.parser.parse_model(text(body, head=', "com.microsoft": 1', opset=24) + quick), 1)
    assert "QuickGelu" in {n.op_type for n in report.model.graph} and len(report.model.functions) == 1


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_the_first_keys_or_as_many_as_there_are(masked: bool) -> None:
    """A slice up to the ninth key is as long as the sequence where that is shorter; this is compared, too."""
    first = "b0 = Constant<value = int64[1] {0}>() e0 = Constant<value = int64[1] {9}>() a0 = Constant<value = int64[1] {1}>() h = Slice(x, b0, e0, a0) "
    body = first + ATTENTION.replace("Transpose<perm = [0, 2, 1]>(x)", "Transpose<perm = [0, 2, 1]>(h)").replace("MatMul(p, x)", "MatMul(p, h)")
    if masked:
        numbers = "one = Constant<value = int64 {1}>() zero = Constant<value = int64 {0}>() five = Constant<value = int64 {5}>() low = Constant<value = float {-3.4e38}>() "
        mask = "l = Shape<start = 1, end = 2>(h) m = Squeeze(l) j = Range(zero, m, one) seen = Less(j, five) w = Where(seen, z, low) p = Softmax(w)"
        body = body.replace("p = Softmax(z)", numbers + mask)
    report = check(small(body), 1)
    assert report.conditions == [] and "whole model: sequence = 8" in {c.name for c in report.verdict.checks}


def test_a_table_of_rows_bounds_the_length() -> None:
    """Positions up to the length are read from a table of 20: what lies beyond is said, and the original refuses it."""
    table = (
        "n = Shape<start = 1, end = 2>(x) b0 = Constant<value = int64[1] {0}>() a0 = Constant<value = int64[1] {0}>() r = Slice(rows, b0, n, a0) h = Add(x, r) "
    )
    m = small(table + ATTENTION.replace("(x", "(h").replace(", x)", ", h)"))
    m.graph.initializer.append(onnx.numpy_helper.from_array(np.random.default_rng(0).standard_normal((20, D)).astype(np.float32), "rows"))
    report = check(m, 1)
    assert report.conditions == ["sequence <= 20"] and "whole model: sequence = 21" not in {c.name for c in report.verdict.checks}


def test_an_operator_of_another_domain_whose_shape_only_a_run_tells() -> None:
    body = "h = com.microsoft.QuickGelu(x) " + ATTENTION.replace("(x", "(h").replace(", x)", ", h)")
    report = check(small(body, head=', "com.microsoft": 1'), 1)
    assert "QuickGelu" in report.analysis.remarks[0].message


@pytest.mark.parametrize(("more", "name"), [("", "p"), (" e = HardSwish(p)", "e")], ids=["returned", "read by another operator"])
def test_probabilities_that_something_else_reads_stay(more: str, name: str) -> None:
    report = check(small(ATTENTION + more, outputs=BOTH + name), 0)
    assert [r.code for s in report.analysis.sites for r in s.remarks] == ["AO203"] and report.missed and report.path == ""


def test_a_branch_reads_what_an_attention_gives() -> None:
    branch = (
        f"then_branch = one () => (float[batch, sequence, {D}] a) {{ a = Neg(o) }}, else_branch = two () => (float[batch, sequence, {D}] r) {{ r = Abs(o) }}"
    )
    choose = f" zero = Constant<value = float {{0.0}}>() top = ReduceMax<keepdims = 0>(x) g = Greater(top, zero) y = If<{branch}>(g)"
    report = check(small(ATTENTION.replace("y =", "o =") + choose), 1)
    assert "If" in report.analysis.remarks[0].message


def test_probabilities_that_a_branch_reads_stay() -> None:
    branch = "then_branch = one () => (float[batch, sequence, sequence] a) { a = Neg(p) }, else_branch = two () => (float[batch, sequence, sequence] r) { r = Abs(p) }"
    choose = f" zero = Constant<value = float {{0.0}}>() top = ReduceMax<keepdims = 0>(x) g = Greater(top, zero) e = If<{branch}>(g)"
    check(small(ATTENTION + choose, outputs=BOTH + "e"), 0)


def test_an_attention_inside_of_a_branch_stays() -> None:
    inner = ATTENTION.replace("y =", "a =")
    branch = f"then_branch = one () => (float[batch, sequence, {D}] a) {{ {inner} }}, else_branch = two () => (float[batch, sequence, {D}] r) {{ r = Abs(x) }}"
    check(small(f"zero = Constant<value = float {{0.0}}>() top = ReduceMax<keepdims = 0>(x) g = Greater(top, zero) y = If<{branch}>(g)"), 0)


def test_a_result_that_two_outputs_share() -> None:
    check(small(ATTENTION + " u = Identity(y)", outputs=f"float[batch, sequence, {D}] y, float[batch, sequence, {D}] u"), 1)


def test_a_fused_attention_stays_and_a_second_time_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, again = (tmp_path / f"{n}.onnx" for n in ("source", "out", "again"))
    weighted(source)
    assert command(["optimize", str(source), "-o", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["exit_code"] == 0 and facts["path"] == str(out) and facts["fused"] == 1 and operators(onnx.load(out)).count("Attention") == 1
    assert command(["optimize", str(out), "-o", str(again), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["path"] is None and not again.exists() and facts["remarks"] == []
    assert [(x["what"], x["lowered_to"]) for x in facts["layers"]] == [("fused already", "Attention")]
    assert command(["optimize", str(out), "-o", str(again)]) == 1
    assert "1 of 1 attentions are fused nodes already, so nothing was written" in capsys.readouterr().out


def test_a_file_without_an_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(small("y = Softmax(x)"), tmp_path / "a.onnx")
    assert command(["optimize", str(tmp_path / "a.onnx"), "-o", str(tmp_path / "b.onnx")]) == 1
    assert "no attention was found, so nothing was written" in capsys.readouterr().out and not (tmp_path / "b.onnx").exists()


def test_zeros_in_rows_without_a_key(tmp_path: Path) -> None:
    """As an exporter writes PyTorch's own attention: NaN that softmax gives of a row of -inf becomes zero."""
    numbers = "lowest = Constant<value = float {-inf}>() nought = Constant<value = float {0.0}>() axes = Constant<value = int64[1] {1}>() "
    masked = numbers + "keys = Unsqueeze(shown, axes) w = Where(keys, z, lowest) a = Softmax(w) n = IsNaN(a) p = Where(n, nought, a)"
    m = small(ATTENTION.replace("p = Softmax(z)", masked), inputs=f"float[batch, sequence, {D}] x, bool[batch, sequence] shown")
    report = attnopt.optimize_onnx(m, tmp_path / "out.onnx")
    assert [x.words for x in report.replaced] == ["full, key padding"]
    given = {"x": np.random.default_rng(0).standard_normal((2, 5, D)).astype(np.float32), "shown": np.array([[1, 1, 0, 1, 0], [0] * 5], bool)}
    (got,), (expected,) = run(str(tmp_path / "out.onnx"), given), run(m, given)
    assert not expected[1].any() and np.isfinite(expected).all()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_a_file_of_past_and_new_keys(tmp_path: Path) -> None:
    """The mask runs over both: that its length is their sum follows from the file, and the past may be empty."""
    body = """
        k = Concat<axis = 2>(past_k, new_k) v = Concat<axis = 2>(past_v, new_v)
        nq = Shape<start = 2, end = 3>(q) np = Shape<start = 2, end = 3>(past_k) nk = Shape<start = 2, end = 3>(k)
        one = Constant<value = int64 {1}>() zero = Constant<value = int64 {0}>() axis = Constant<value = int64[1] {1}>() heads = Constant<value = int64[2] {1, 2}>()
        n = Squeeze(nq) m = Squeeze(nk) pq = Squeeze(np)
        i0 = Range(zero, n, one) i1 = Add(i0, pq) i = Unsqueeze(i1, axis) j = Range(zero, m, one) seen = LessOrEqual(j, i)
        shown = Cast<to = 9>(attention_mask) wide = Unsqueeze(shown, heads) both = And(seen, wide)
        low = Constant<value = float {-3.4e38}>() t = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, t) z = Where(both, s, low) p = Softmax(z) y = MatMul(p, v)
    """
    kv = ", ".join(
        f"float[batch, 2, {n}, {D}] {name}"
        for n, name in (("past", "past_k"), ("past", "past_v"), ("sequence", "new_k"), ("sequence", "new_v"), ("sequence", "q"))
    )
    m = small(body, inputs=f"int64[batch, total] attention_mask, {kv}", outputs=f"float[batch, 2, sequence, {D}] y, float[batch, 2, total, {D}] k")
    report = attnopt.optimize_onnx(m, tmp_path / "out.onnx")
    assert (report.layers[0].words, len(report.fused)) == ("causal (bottom-right), key padding", 1)
    assert report.conditions == ["total = past + sequence"]
    names = {c.name for c in report.verdict.checks}
    assert {"whole model by past: longer", "whole model by sequence: longer", "whole model by past: left padding", "batch of one: example"} <= names
    rng = np.random.default_rng(0)
    step = {"attention_mask": np.ones((1, 8), np.int64), "q": rng.standard_normal((1, 2, 1, D)).astype(np.float32)}
    step |= {n: rng.standard_normal((1, 2, 7 if "past" in n else 1, D)).astype(np.float32) for n in ("past_k", "past_v", "new_k", "new_v")}
    assert attnopt.optimize_onnx(m, example_inputs=step).conditions == report.conditions  # one token of one sequence is an example, too
    for past, sequence in ((0, 5), (6, 1), (3, 4)):
        given = {n: rng.standard_normal((2, 2, past if "past" in n else sequence, D)).astype(np.float32) for n in ("past_k", "past_v", "new_k", "new_v", "q")}
        given["attention_mask"] = np.ones((2, past + sequence), np.int64)
        given["attention_mask"][0, :1] = 0
        for a, b in zip(run(str(tmp_path / "out.onnx"), given), run(m, given), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_factor_that_makes_an_infinity_of_the_mask_is_seen_and_refused(tmp_path: Path) -> None:
    """A row without a visible key is NaN in the original, where the mask overflowed, and an average by its meaning."""
    numbers = "lowest = Constant<value = float {-3.4e38}>() more = Constant<value = float {1.5}>() axes = Constant<value = int64[1] {1}>() "
    masked = numbers + "keys = Unsqueeze(mask, axes) w = Where(keys, z, lowest) f = Mul(w, more) p = Softmax(f)"
    m = small(ATTENTION.replace("p = Softmax(z)", masked), inputs=f"float[batch, sequence, {D}] x, bool[batch, sequence] mask")
    with pytest.raises(VerificationError, match="padded row"):
        attnopt.optimize_onnx(m, tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []
