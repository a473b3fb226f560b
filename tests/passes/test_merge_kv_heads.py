"""Merged KV heads: the model with the mean of the projections' weights, its change reported, and only where it was asked for."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnopt
from attnopt.config import OptimizeConfig
from attnopt.errors import AttnoptError
from attnopt.runtime import SamplingParams
from attnopt.serving import ServingModel

H, D, WIDTH, VOCABULARY = 6, 8, 48, 40
IDS = torch.randint(0, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """Two layers of rotary attention, bidirectional or causal, with ``heads`` KV heads."""

    def __init__(self, heads: int = H, causal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.causal = heads, causal
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.q, self.k, self.v = (nn.ModuleList(nn.Linear(WIDTH, n * D) for _ in range(2)) for n in (H, heads, heads))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        angle = torch.outer(torch.arange(ids.shape[1]).float(), torch.tensor([1.0, 0.3, 0.1, 0.03])).repeat(1, 2).to(x.dtype)
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            heads = [p(x).unflatten(-1, (-1, D)).transpose(1, 2) for p in (q, k, v)]
            turned = [y * angle.cos() + torch.cat((-y[..., D // 2 :], y[..., : D // 2]), -1) * angle.sin() for y in heads[:2]]
            keys, values = (y.repeat_interleave(H // self.heads, 1) for y in (turned[1], heads[2]))
            y = F.scaled_dot_product_attention(turned[0], keys, values, is_causal=self.causal)
            x = x + y.transpose(1, 2).flatten(2)
        return self.head(x)


def pooled(model: Model, heads: int) -> Model:
    """The same model with the mean of the weights of each group of heads, written by hand."""
    other = Model(heads)
    state = model.state_dict()
    for name, x in state.items():
        if name.split(".")[0] in ("k", "v"):
            state[name] = x.unflatten(0, (heads, H // heads, D)).mean(1).flatten(0, 1)
    other.load_state_dict(state)
    return other.eval()


def messages(model: Any, code: str) -> list[str]:
    report = model.attnopt_report
    return [r.message for r in (*report.remarks, *(r for s in report.sites for r in s.remarks)) if r.code == code]


@pytest.mark.parametrize("groups", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_it_is_the_model_with_the_mean_of_the_weights(groups: int) -> None:
    model = Model().eval()
    merged = attnopt.optimize(model, IDS, config=OptimizeConfig(merge_kv_heads=groups))
    truth = pooled(model, groups).double()(IDS).detach()
    torch.testing.assert_close(merged(IDS).double(), truth, rtol=1e-5, atol=1e-5)
    report = merged.attnopt_report
    assert report.verdict.passed and any(c.name.startswith("whole model with merged heads") for c in report.verdict.checks)
    assert [s.spec.groups for s in report.sites] == [H // groups] * 2
    said = [f"6 KV heads are merged into {groups}, each the mean of {6 // groups}; this changes what the model computes."]
    said += [f"the projection of the {what} has the mean of its rows, {8 * groups} of 48." for what in ("keys", "values")]
    assert messages(merged, "AO110") == said * 2
    (said,) = messages(merged, "AO109")
    before = model(IDS).detach().double()
    change = float(((truth - before).square().mean() / before.square().mean()).sqrt())
    assert change > 0.05 and float(re.findall(r"change by (\S+) of", said)[0]) == pytest.approx(change, rel=1e-2)


def test_it_can_be_trained_further() -> None:
    """Gradients reach the original weights through the mean: each head of a group gets an equal part."""
    model = Model()
    merged = attnopt.optimize(model, IDS, config=OptimizeConfig(merge_kv_heads=2, verify=False))
    other = pooled(model, 2).train()
    for m in (merged, other):
        m(IDS).square().mean().backward()
    for mine, theirs in ((model.k[0].weight, other.k[0].weight), (model.v[1].weight, other.v[1].weight)):
        expected = theirs.grad.unflatten(0, (2, D))[:, None].expand(-1, 3, -1, -1).flatten(0, 2) / 3
        torch.testing.assert_close(mine.grad, expected, rtol=1e-4, atol=1e-7)


def test_served_it_caches_the_merged_heads_and_generates_the_same() -> None:
    model = Model().eval()
    serving = attnopt.optimize(model, IDS, config=OptimizeConfig(merge_kv_heads=2, kv_cache="paged"))
    assert isinstance(serving, ServingModel) and serving.attnopt_report.verdict.passed
    assert [(x.Hkv, x.D, x.Dv) for x in serving.layers] == [(2, D, D)] * 2
    assert "on the example the results change by" in messages(serving, "AO109")[0]
    other, text = pooled(model, 2), [3, 1, 4]
    with torch.no_grad():
        while len(text) < 15:
            text.append(int(other(torch.tensor([text]))[0, -1].argmax()))
    assert list(serving.generate([text[:3]], SamplingParams(12))[0].tokens) == text[3:] and len(set(text[3:])) > 2


def test_nothing_is_merged_by_default_and_fewer_heads_stay() -> None:
    plain = attnopt.optimize(Model(2).eval(), IDS, config=OptimizeConfig(verify=False))
    assert not messages(plain, "AO110") and not messages(plain, "AO109")
    assert OptimizeConfig().merge_kv_heads is None


def test_attentions_of_a_whole_sequence_keep_their_heads() -> None:
    with pytest.raises(
        AttnoptError, match="no attention can be merged into so many KV heads: theirs are 6; supported are proper divisors of the number of KV heads of causal"
    ):
        attnopt.optimize(Model(causal=False).eval(), IDS, config=OptimizeConfig(merge_kv_heads=2))


@pytest.mark.parametrize("groups", [4, 6])
def test_a_number_that_does_not_divide_the_heads_is_refused(groups: int) -> None:
    with pytest.raises(AttnoptError, match=f"merge_kv_heads is {groups}, and no attention can be merged"):
        attnopt.optimize(Model().eval(), IDS, config=OptimizeConfig(merge_kv_heads=groups, verify=False))


def test_other_uses_are_refused(tmp_path: Any) -> None:
    with pytest.raises(AttnoptError, match="merge_kv_heads is 0; supported are None and numbers from 1 on"):
        OptimizeConfig(merge_kv_heads=0)
    with pytest.raises(AttnoptError, match="merge_kv_heads needs a capture of the whole model, and capture is 'dynamo'"):
        OptimizeConfig(merge_kv_heads=2, capture="dynamo")
    with pytest.raises(Exception, match="merge_kv_heads needs the whole model"):
        torch.compile(nn.Linear(4, 4), backend="attnopt", options={"merge_kv_heads": 2})(torch.ones(1, 4))
    merged = attnopt.optimize(Model().eval(), IDS, config=OptimizeConfig(merge_kv_heads=2, verify=False))
    with pytest.raises(AttnoptError, match="merge_kv_heads is 2, and an exported file is compared with the original; supported is None"):
        merged.export_onnx(tmp_path / "model.onnx")
