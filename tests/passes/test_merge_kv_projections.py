"""Merged KV heads are made by the mean of the weights where each head is the same linear function of its own rows, and stay as they were elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnopt
from attnopt.config import OptimizeConfig
from attnopt.passes.merge_kv_heads import MergeKVHeads
from attnopt.passes.merge_kv_projections import MergeKVProjections
from attnopt.passes.pipeline import run_pipeline
from attnopt.runtime import SamplingParams
from tests.passes.test_merge_kv_heads import IDS, D, H, Model, messages, pooled

WIDTH = H * D
X = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """One attention whose keys are ``keys(module, x)`` [B, S, H, D]."""

    def __init__(self, keys: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH)
        self.each, self.scale, self.norm = nn.Parameter(torch.rand(H, 1) + 0.5), nn.Parameter(torch.rand(D) + 0.5), nn.LayerNorm(WIDTH)
        self.keys = keys

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (self.q(x).unflatten(-1, (H, D)), self.keys(self, x), self.v(x).unflatten(-1, (H, D))))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, D))


def turned(x: Tensor) -> Tensor:
    angle = torch.outer(torch.arange(x.shape[1]).float(), torch.tensor([1.0, 0.3, 0.1, 0.03])).repeat(1, 2)[:, None]
    return x * angle.cos() + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * angle.sin()


def interleaved(x: Tensor) -> Tensor:
    angle = torch.outer(torch.arange(x.shape[1]).float(), torch.tensor([1.0, 0.3, 0.1, 0.03]))[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1).flatten(-2)


MERGED: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "plain": lambda m, x: heads(m.k(x)),
    "rotary": lambda m, x: turned(heads(m.k(x))),
    "rotary, pairs side by side": lambda m, x: interleaved(heads(m.k(x))),
    "a part rotary": lambda m, x: torch.cat((turned(heads(m.k(x)))[..., :4], heads(m.k(x))[..., 4:]), -1),
    "a factor of each feature": lambda m, x: heads(m.k(x)) * m.scale,
    "a factor of each token": lambda m, x: heads(m.k(x)) * x.mean(-1)[..., None, None],
    "features backwards": lambda m, x: heads(m.k(x)).flip(-1),
}
KEPT: dict[str, tuple[Callable[[Block, Tensor], Tensor], str]] = {
    "a factor of each head": (lambda m, x: heads(m.k(x)) * m.each, "is not proven to be"),
    "a norm of each head": (lambda m, x: F.rms_norm(heads(m.k(x)), (D,)), "is not proven to be"),
    "a norm of all heads": (lambda m, x: heads(m.k(x) * torch.rsqrt(m.k(x).square().mean(-1, keepdim=True))), "is made of 2 linear layers"),
    "its own square": (lambda m, x: (lambda y: heads(y * y))(m.k(x)), "is not proven to be"),
    "a norm of all heads, made once": (lambda m, x: (lambda y: heads(y * torch.rsqrt(y.square().mean(-1, keepdim=True))))(m.k(x)), "is not proven to be"),
    "a curve": (lambda m, x: heads(m.k(x)).tanh(), "is not proven to be"),
    "an addend": (lambda m, x: heads(m.k(x)) + m.scale, "is not proven to be"),
    "heads side by side": (lambda m, x: m.k(x).unflatten(-1, (D, H)).transpose(-1, -2), "is not proven to be"),
    "a feature of the next head": (lambda m, x: heads(m.k(x).roll(1, -1)), "is not proven to be"),
    "a token of its own for each head": (lambda m, x: heads(m.k(x))[:, (torch.arange(x.shape[1])[:, None] - torch.arange(H)).clamp(min=0), torch.arange(H)], "is not proven to be"),
    "a layer of one head": (lambda m, x: m.k(x)[..., None, :D].expand(-1, -1, H, -1), "is not proven to be"),
    "a part of a layer": (lambda m, x: heads(m.two(x)[..., :WIDTH]), "is not proven to be"),
    "no parameter": (lambda m, x: heads(F.linear(x, m.k.weight * 2)), "is no parameter of two axes"),
}


def optimized(block: Block, groups: int = 2, verify: bool = True) -> tuple[nn.Module, list[str]]:
    found = attnopt.optimize(block.eval(), X, config=OptimizeConfig(merge_kv_heads=groups, verify=verify))
    return found, [m for m in messages(found, "AO110") if "keys" in m and "merged" not in m]


@pytest.mark.parametrize("name", MERGED)
def test_the_weights_are_merged(name: str) -> None:
    block = Block(MERGED[name])
    found, said = optimized(block)
    count = 2 if name == "a part rotary" else 1
    if count == 2:  # the layer is called twice there
        assert "is made of 2 linear layers" in said[0]
    else:
        assert said == [f"the projection of the keys has the mean of its rows, {2 * D} of {WIDTH}."]
    with torch.no_grad():
        q, k, v = (y.transpose(1, 2) for y in (heads(block.q(X)), block.keys(block, X), heads(block.v(X))))
        mean = [y.unflatten(1, (2, H // 2)).mean(2).repeat_interleave(H // 2, 1) for y in (k, v)]
        want = F.scaled_dot_product_attention(q, *mean, is_causal=True).transpose(1, 2).flatten(2)
        torch.testing.assert_close(found(X), want, rtol=1e-4, atol=1e-5)
    assert found.attnopt_report.verdict.passed


@pytest.mark.parametrize("name", KEPT)
def test_what_is_not_proven_is_averaged_token_by_token(name: str) -> None:
    keys, why = KEPT[name]
    block = Block(keys)
    found, said = optimized(block, verify=False)
    assert len(said) == 1 and said[0].startswith("the mean is taken of the keys of each token, not of the weights: ") and why in said[0], said
    with torch.no_grad():
        q, k, v = (y.transpose(1, 2) for y in (heads(block.q(X)), keys(block, X), heads(block.v(X))))
        mean = [y.unflatten(1, (2, H // 2)).mean(2).repeat_interleave(H // 2, 1) for y in (k, v)]
        want = F.scaled_dot_product_attention(q, *mean, is_causal=True).transpose(1, 2).flatten(2)
        torch.testing.assert_close(found(X), want, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_read_elsewhere_too_keeps_its_rows() -> None:
    class Shared(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.k(x)
            k, v = (z.unflatten(-1, (H, D)).transpose(1, 2) for z in (y, self.v(x)))
            return F.scaled_dot_product_attention(k, k, v, is_causal=True).transpose(1, 2).flatten(2) + y

    _, said = optimized(Shared(MERGED["plain"]))
    assert len(said) == 1 and re.search(r"aten::linear float32\[s\d+, s\d+, 48\] is also read by aten::", said[0]), said


def test_the_truth_is_the_mean_of_the_heads() -> None:
    """What the kernels and the merged weights are verified against is the graph before the weights were merged."""
    from attnopt.capture.export import capture

    captured = capture(Block(MERGED["rotary"]).eval(), (X,), {}, "auto", check=False)
    result = run_pipeline(captured.graph_module, OptimizeConfig(merge_kv_heads=2, verify=False))
    assert result.merged is not None
    rows = {tuple(n.meta["val"].shape)[-1] for n in result.merged.graph.nodes if "linear" in str(n.target)}
    left = {tuple(n.meta["val"].shape)[-1] for n in result.graph_module.graph.nodes if "linear" in str(n.target)}
    assert rows == {WIDTH} and left == {WIDTH, 2 * D}
    assert MergeKVHeads(2).tier == "approximate" and MergeKVProjections().tier == "exact"


def test_a_serving_model_takes_the_means_once_and_again_when_weights_change() -> None:
    model = Model().eval()
    serving = attnopt.optimize(model, IDS, config=OptimizeConfig(merge_kv_heads=2, kv_cache="paged"))
    assert serving.attnopt_report.verdict.passed and "mean(" not in serving.function.source
    assert sorted(tuple(x.shape) for x in serving.function.constants if x.numel() > 8) == [(16,)] * 4 + [(16, WIDTH)] * 4
    assert serving.state_dict().keys() == model.state_dict().keys()

    def expected(text: list[int]) -> list[int]:
        other, text = pooled(model, 2), list(text)
        with torch.no_grad():
            while len(text) < 15:
                text.append(int(other(torch.tensor([text]))[0, -1].argmax()))
        return text[3:]

    engine = serving.engine(pages=4)
    first = engine.generate([[3, 1, 4]], SamplingParams(12))[0].tokens
    assert list(first) == expected([3, 1, 4])
    with torch.no_grad():
        for p in (*model.k.parameters(), *model.v.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) * 0.3)
    engine = serving.engine(pages=4)
    second = engine.generate([[3, 1, 4]], SamplingParams(12))[0].tokens
    assert list(second) == expected([3, 1, 4]) and second != first
