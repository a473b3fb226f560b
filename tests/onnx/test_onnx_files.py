"""Files of plain torch.onnx.export, rewritten: all attentions fused, the same function; and what was changed in them keeps its meaning."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exported import SITES, inputs, model_of, operators, run
from onnx import TensorProto, helper

import attnopt
from attnopt.capture.export import quiet
from attnopt.cli.main import run as command

pytest.importorskip("transformers", reason="the files are exported from models of transformers")

SLOW = pytest.mark.slow
FILES = [("llama", 20, True), ("bert", 20, False)]
MORE = [(k, o, d) for k in SITES for o, d in ((20, True), (24, True), (20, False)) if (k, o, d) not in FILES and (k, d) != ("whisper", False)]
"""torch.onnx.export(dynamo=False) knows no opset above 20, and no ``aten::diff``, which whisper uses."""


def same(a: list[np.ndarray[Any, Any]], b: list[np.ndarray[Any, Any]]) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and np.linalg.norm(x - y) <= 3e-6 * np.linalg.norm(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("kind", "opset", "dynamo"), [*FILES, *(pytest.param(*x, marks=SLOW) for x in MORE)])
def test_every_attention_of_an_exported_file_is_fused(kind: str, opset: int, dynamo: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, path = tmp_path / "model.onnx", tmp_path / "out.onnx"
    original = model_of(kind, opset, dynamo)
    onnx.save(original, source)
    assert command(["optimize", str(source), "-o", str(path), "--require-all", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [x["lowered_to"] for x in facts["layers"]] == ["Attention"] * SITES[kind]
    assert all(x["error"] is not None and x["error"] < 1e-6 for x in facts["layers"])
    checks = {c["name"] for c in facts["verdict"]["checks"]}
    masked = set() if kind == "whisper" else {"whole model: right padding", "whole model: left padding", "whole model: a padded row"}
    assert {"whole model: longer", "whole model: shorter", "batch of one: example"} | masked <= checks
    model = onnx.load(path)
    assert operators(model).count("Attention") == SITES[kind] and "Softmax" not in operators(model)
    assert ([(o.domain, o.version) for o in model.opset_import], model.ir_version) == ([("", 24)], 10)
    props = {p.key: p.value for p in model.metadata_props}
    site = json.loads(props["attnopt.site.0"])
    assert site["lowered_to"] == "Attention" and site["spec"] and props["attnopt.version"] and props["attnopt.target"] == "onnx"
    assert ("layers.0" in site["name"]) if kind in ("llama", "whisper") else ("0.att" in site["name"])
    for batch, length in ((1, 7), (2, 24), (3, 61)):
        given = inputs(kind, batch, length)
        assert same(run(str(path), given), run(original, given)), (batch, length)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "out.onnx"]


# ------------------------------------------------------------------------------------------------ changed files


def reverse_causal(model: onnx.ModelProto) -> None:
    found = [n for n in model.graph.node if n.op_type == "LessOrEqual"]
    assert found
    for n in found:
        n.op_type = "GreaterOrEqual"


def scale_off(model: onnx.ModelProto) -> None:
    """Scores half as large again: the operand of each product that a softmax is taken of."""
    g = model.graph
    g.initializer.append(helper.make_tensor("more", TensorProto.FLOAT, [], [1.5]))
    made = {o: n for n in g.node for o in n.output}
    products = []
    for n in g.node:
        if n.op_type == "Softmax":
            x = made[n.input[0]]
            while x.op_type != "MatMul":
                x = made[next(i for i in x.input if i in made and made[i].op_type in ("Add", "Mul", "Div", "MatMul"))]
            products.append(x)
    for x in products:
        at = list(g.node).index(x)
        g.node.insert(at, helper.make_node("Mul", [x.input[0], "more"], [f"more_{x.output[0]}"]))
        x.input[0] = f"more_{x.output[0]}"


def window(model: onnx.ModelProto) -> None:
    """Of the keys up to the query only the last four."""
    g = model.graph
    g.initializer.append(helper.make_tensor("four", TensorProto.INT64, [], [4]))
    found = [n for n in g.node if n.op_type == "LessOrEqual"]
    assert found
    for n in found:
        key, query = n.input
        y = n.output[0]
        n.output[0] = f"{y}_causal"
        nodes = [
            helper.make_node("Add", [key, "four"], [f"{y}_end"]),
            helper.make_node("Greater", [f"{y}_end", query], [f"{y}_near"]),
            helper.make_node("And", [f"{y}_causal", f"{y}_near"], [y]),
        ]
        at = list(g.node).index(n)
        for i, x in enumerate(nodes):
            g.node.insert(at + 1 + i, x)


def far_keys_filled(model: onnx.ModelProto) -> None:
    """A window beside the mask: scores of far keys become the lowest number, whatever the mask added to them."""
    g = model.graph
    for name, value in (("zero", 0), ("one", 1), ("four", 4)):
        g.initializer.append(helper.make_tensor(name, TensorProto.INT64, [], [value]))
    g.initializer.append(helper.make_tensor("column", TensorProto.INT64, [1], [1]))
    g.initializer.append(helper.make_tensor("lowest", TensorProto.FLOAT, [], [-3.4028234663852886e38]))

    def nodes(x: str, y: str) -> list[Any]:
        return [
            helper.make_node("Shape", [x], [f"{y}_q"], start=2, end=3),
            helper.make_node("Squeeze", [f"{y}_q"], [f"{y}_n"]),
            helper.make_node("Shape", [x], [f"{y}_k"], start=3, end=4),
            helper.make_node("Squeeze", [f"{y}_k"], [f"{y}_m"]),
            helper.make_node("Range", ["zero", f"{y}_n", "one"], [f"{y}_i"]),
            helper.make_node("Range", ["zero", f"{y}_m", "one"], [f"{y}_j"]),
            helper.make_node("Unsqueeze", [f"{y}_i", "column"], [f"{y}_row"]),
            helper.make_node("Sub", [f"{y}_row", f"{y}_j"], [f"{y}_d"]),
            helper.make_node("Less", [f"{y}_d", "four"], [f"{y}_near"]),
            helper.make_node("Where", [f"{y}_near", x, "lowest"], [y]),
        ]

    out: list[Any] = []
    for n in g.node:
        if n.op_type == "Softmax":
            y = f"changed_{n.output[0]}"
            out += nodes(n.input[0], y)
            n.input[0] = y
        out.append(n)
    del g.node[:]
    g.node.extend(out)


def zero_mask(model: onnx.ModelProto) -> None:
    """What hides a key adds nothing."""
    found = 0
    for t in model.graph.initializer:
        if t.data_type == TensorProto.FLOAT and len(t.dims) <= 1:
            value = onnx.numpy_helper.to_array(t)
            if value.size == 1 and value.item() < -1e30:
                t.CopyFrom(onnx.numpy_helper.from_array(np.zeros_like(value), t.name))
                found += 1
    for n in model.graph.node:
        for a in n.attribute:
            if n.op_type == "Constant" and a.t.data_type == TensorProto.FLOAT and onnx.numpy_helper.to_array(a.t).min(initial=0) < -1e30:
                a.t.CopyFrom(onnx.numpy_helper.from_array(np.zeros_like(onnx.numpy_helper.to_array(a.t))))
                found += 1
    assert found


def mild_mask(model: onnx.ModelProto) -> None:
    """A hidden key keeps a part of its weight: no mask at all, but a bias."""
    zero_mask(model)
    for t in model.graph.initializer:
        value = onnx.numpy_helper.to_array(t)
        if t.data_type == TensorProto.FLOAT and value.size == 1 and len(t.dims) <= 1 and value.item() == 0.0 and t.name in _fills(model):
            t.CopyFrom(onnx.numpy_helper.from_array(np.full_like(value, -2.0), t.name))


def other_axis(model: onnx.ModelProto) -> None:
    """Softmax over the queries: no attention of this form."""
    for n in model.graph.node:
        if n.op_type == "Softmax":
            next(a for a in n.attribute if a.name == "axis").i = 2


def _fills(model: onnx.ModelProto) -> set[str]:
    return {n.input[2] for n in model.graph.node if n.op_type == "Where"}


CHANGES = {f.__name__: f for f in (reverse_causal, scale_off, window, far_keys_filled, zero_mask, mild_mask, other_axis)}
WORDS = {"reverse_causal": "window 0+1+*", "scale_off": "causal, GQA", "window": "causal, GQA 4/2, window 4", "zero_mask": "full", "mild_mask": "bias"}


def _changed() -> list[Any]:
    cases = []
    for kind in SITES:
        for name in CHANGES:
            if (kind, name) in (("bert", "reverse_causal"), ("bert", "window"), ("whisper", "mild_mask"), ("whisper", "zero_mask")):
                continue  # bert has no causal mask, and whisper's says True and False only
            cases.append(pytest.param(kind, name, marks=[] if kind == "llama" else SLOW, id=f"{kind}-{name}"))
    return cases


@pytest.mark.parametrize(("kind", "name"), _changed())
def test_a_changed_file_keeps_its_meaning(kind: str, name: str, tmp_path: Path) -> None:
    original, changed = model_of(kind), model_of(kind)
    CHANGES[name](changed)
    given = [inputs(kind, b, s) for b, s in ((1, 9), (3, 33))]
    expected = [run(changed, x) for x in given]
    assert not any(same(e, run(original, x)) for e, x in zip(expected, given, strict=True)), "the change must be one"
    report = attnopt.optimize_onnx(changed, tmp_path / "out.onnx")
    if name == "other_axis":
        assert not report.fused and not (tmp_path / "out.onnx").exists()
        assert {r.code for s in report.analysis.sites for r in s.remarks} == {"AO205"}
        return
    assert len(report.fused) == SITES[kind]
    if kind == "llama" and name in WORDS:
        assert all(WORDS[name] in x.words for x in report.layers), [x.words for x in report.layers]
    assert all(same(run(str(tmp_path / "out.onnx"), x), e) for x, e in zip(given, expected, strict=True))


@pytest.mark.parametrize(("kind", "operator"), [("llama", "Loop"), pytest.param("bert", "MultiHeadAttention", marks=SLOW)])
def test_attentions_become_operators_of_the_runtime_when_asked(kind: str, operator: str, tmp_path: Path) -> None:
    """With a function for each, for other runtimes; or in parts, which are operators of the standard."""
    source, path = tmp_path / "model.onnx", tmp_path / "out.onnx"
    original = model_of(kind)
    onnx.save(original, source)
    assert command(["optimize", str(source), "-o", str(path), "--target", "ort", "--require-all"]) == 0
    model = onnx.load(path)
    assert operators(model).count(operator) == SITES[kind] and {f.name for f in model.functions} == {operator} - {"Loop"}
    for batch, length in ((1, 7), (3, 61), (2, 96)):
        given = inputs(kind, batch, length)
        assert same(run(str(path), given), run(original, given)), (batch, length)


@SLOW
@pytest.mark.parametrize("name", ["gpt_neo", "mpt"])
@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_rows_that_are_filled_twice_are_fused_too(name: str, target: Any) -> None:
    """A query without a key then averages keys before it: the library chooses a fill behind the query, and adds or chooses another for padding."""
    from zoo.models import CASES

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = CASES[name].build("eager")

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # type: ignore[no-any-return]

    given = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    sizes = {0: "batch", 1: "sequence"}
    with warnings.catch_warnings(), torch.no_grad(), quiet():
        warnings.simplefilter("ignore")
        names = {"input_names": ["input_ids", "attention_mask"], "verbose": False}
        program = torch.onnx.export(Called().eval(), (given, torch.ones_like(given)), dynamo=True, opset_version=20, dynamic_shapes=(sizes, sizes), **names)  # type: ignore[arg-type]
    assert program is not None
    report = attnopt.optimize_onnx(program.model_proto, target=target)
    assert [x.lowered_to for x in report.layers] == ["Attention" if target == "onnx" else "MultiHeadAttention"] * 2 and report.verdict.passed
