"""What counts as an attention, and what does not; what is told of a site."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.errors import AttnoptError, VerificationError
from attnopt.report import Report
from attnopt.report.explain import explain
from attnopt.report.source import quote


class Routed(nn.Module):
    """An attention, and a router's softmax that is none."""

    def __init__(self, returned: bool = False) -> None:
        super().__init__()
        self.gate, self.a, self.b = nn.Linear(16, 2), nn.Linear(16, 16), nn.Linear(16, 16)
        self.returned = returned

    def forward(self, x: Tensor) -> object:
        p = (x @ x.mT * 0.25).softmax(-1)
        y = p @ x
        g = self.gate(y).softmax(-1)
        out = g[..., :1] * self.a(y) + g[..., 1:] * self.b(y)
        return (out, p) if self.returned else out


def test_a_router_is_listed_and_not_counted() -> None:
    optimized = attnopt.optimize(Routed(), torch.randn(2, 9, 16), config=attnopt.OptimizeConfig(require_all=True))
    report = optimized.attnopt_report
    assert [(s.status, s.is_attention) for s in report.sites] == [("replaced", True), ("missed", False)]
    assert (len(report.attentions), report.missed) == (1, [])
    assert str(report).startswith("1 of 1 attentions replaced")
    assert [s["attention"] for s in report.to_dict()["sites"]] == [True, False]


def test_an_attention_that_is_missed_fails_require_all() -> None:
    with pytest.raises(VerificationError, match="1 of 1 attentions were not replaced: model"):
        attnopt.optimize(Routed(returned=True), torch.randn(2, 9, 16), config=attnopt.OptimizeConfig(require_all=True))


class Weak(nn.Module):
    """A bias that is an input, a key mask that is another, and an attention that is returned."""

    def forward(self, x: Tensor, bias: Tensor, keep: Tensor) -> object:
        scores = (x @ x.mT * 0.25 + bias).masked_fill(~keep[:, None], float("-inf"))
        y = scores.softmax(-1) @ x
        p = (y @ y.mT).softmax(-1)
        return p @ y, p


@pytest.fixture(scope="module")
def weak() -> Report:
    inputs = (torch.randn(2, 9, 16), torch.randn(9, 9), torch.ones(2, 9, dtype=torch.bool))
    return attnopt.inspect(Weak(), inputs)


def test_a_dense_tensor_makes_a_site_weak(weak: Report) -> None:
    assert [(s.status, s.is_weak) for s in weak.sites] == [("replaced", True), ("missed", False)]
    by_reference = attnopt.inspect(Routed(), torch.randn(2, 9, 16), config=attnopt.OptimizeConfig(backend="reference"))
    assert by_reference.sites[0].is_weak


def test_what_a_site_reads_is_told_with_shape_and_origin(weak: Report) -> None:
    loads = {n.name: (n.operator, n.dtype, n.example) for n in weak.sites[0].loads}
    assert loads == {"bias": ("input", "float32", (9, 9)), "keep": ("input", "bool", (2, 9))}
    text = weak.explain("model")
    assert "score      bias[q, k] + 0.25 * s" in text and "where keep[b, k]" in text and "a row that sees no key gives NaN" in text
    (dense,) = [r for r in weak.sites[0].remarks if r.code == "AO303"]
    assert dense.node is not None and dense.node.name == "bias"


def test_without_a_name_all_that_needs_telling_is_told(weak: Report) -> None:
    assert [e.site.name for e in explain(weak) if e.site is not None] == ["model", "model#2"]
    text = weak.explain()
    assert "AO303" in text and "AO203" in text and text.count("p = (y @ y.mT).softmax(-1)") >= 1
    routed = attnopt.inspect(Routed(), torch.randn(2, 9, 16))
    assert routed.explain().startswith("model#2: no attention\n") and "AO202" not in routed.explain("model")


def test_a_name_that_no_site_has(weak: Report) -> None:
    with pytest.raises(AttnoptError, match="There is no site 'layer'; the sites of this model are model, model#2"):
        weak.explain("layer")


def test_a_report_travels_with_what_it_tells(weak: Report) -> None:
    again = pickle.loads(pickle.dumps(weak))
    assert [(s.name, s.source, s.why, s.loads, s.remarks) for s in again.sites] == [(s.name, s.source, s.why, s.loads, s.remarks) for s in weak.sites]
    assert again.explain("model#2") == weak.explain("model#2")
    facts = json.loads(weak.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert facts["verdict"] == {"passed": None, "error": None, "budget": None, "checks": []}
    assert [n["name"] for n in facts["sites"][0]["loads"]] == ["bias", "keep"] and facts["sites"][0]["weak"] is True
    assert facts["sites"][1]["remarks"][0]["node"]["operator"] == "aten::softmax"


def test_lines_are_quoted_with_their_neighbours(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text("def f():\n\n    x = 1\n    return x\n")
    found = quote(f"{file}:3")
    assert found is not None and found.text == "x = 1" and found.shown() == ["> 3 | x = 1", "  4 | return x"]
    first = quote(f"{file}:1")
    assert first is not None and first.shown() == ["> 1 | def f():"]
    file.write_text("changed\n")
    again = quote(f"{file}:1")
    assert again is not None and again.text == "changed"


@pytest.mark.parametrize("source", ["", "nowhere.py:3", "m.py", "<string>:1"])
def test_lines_that_cannot_be_read_are_not_quoted(source: str) -> None:
    assert quote(source) is None


def test_a_line_past_the_end_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("x = 1\n")
    assert quote(f"{tmp_path / 'm.py'}:2") is None and quote(f"{tmp_path / 'm.py'}:0") is None
