"""What is not to be rewritten is refused, with a code and a reason, and computes what it did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from spellings import SCALE, Attention, B, C, S
from test_spellings import assert_same, lifted
from torch import Tensor, nn


def _x(b: int = B, s: int = S) -> Tensor:
    return torch.randn(b, s, C, generator=torch.Generator().manual_seed(1))


class Wrap(nn.Module):
    def __init__(self, f: Callable[[nn.Module, Tensor], object], **modules: nn.Module) -> None:
        super().__init__()
        self.f = f
        for name, m in modules.items():
            self.add_module(name, m)

    def forward(self, x: Tensor) -> object:
        return self.f(self, x)


def _returned(m: nn.Module, x: Tensor) -> object:
    p = (m.q(x) @ m.k(x).mT * SCALE).softmax(-1)
    return p @ x, p


def _scores_returned(m: nn.Module, x: Tensor) -> object:
    s = m.q(x) @ m.k(x).mT * SCALE
    return s.softmax(-1) @ x, s.amax(-1)


def _classifier(m: nn.Module, x: Tensor) -> object:
    return m.q(x).softmax(-1)


def _router(m: nn.Module, x: Tensor) -> object:
    gate = m.gate(x).softmax(-1)
    experts = torch.stack([m.q(x), m.k(x)], -2)
    return (gate.unsqueeze(-1) * experts).sum(-2)


def _channel(m: nn.Module, x: Tensor) -> object:
    """Cross-covariance attention: [D, D] scores."""
    b, s, c = x.shape
    q, k, v = (p(x).view(b, s, 4, 8).permute(0, 2, 3, 1) for p in (m.q, m.k, m.v))
    w = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1)
    return (w @ v).permute(0, 3, 1, 2).reshape(b, s, c)


def _wrong_axis(m: nn.Module, x: Tensor) -> object:
    """Normalised over queries, summed over keys (slot attention)."""
    return (m.q(x) @ m.k(x).mT * SCALE).softmax(-2) @ m.v(x)


def _mean_over_wrong_axis(m: nn.Module, x: Tensor) -> object:
    p = (m.q(x) @ m.k(x).mT * SCALE).softmax(-1)
    return p.mean(-2, keepdim=True) @ m.v(x)


def _renormalised(m: nn.Module, x: Tensor) -> object:
    p = (m.q(x) @ m.k(x).mT * SCALE).softmax(-2) + 1e-8
    return (p / p.sum(-1, keepdim=True)) @ m.v(x)


def _talking_heads(m: nn.Module, x: Tensor) -> object:
    b, s, _ = x.shape
    q, k, v = (p(x).view(b, s, 4, 8).transpose(1, 2) for p in (m.q, m.k, m.v))
    w = torch.einsum("bhqk,hg->bgqk", q @ k.mT * SCALE, m.mix)
    return w.softmax(-1) @ v


def _key_left_out(m: nn.Module, x: Tensor) -> object:
    """The first key takes its share of the weight, and its value is not summed."""
    p = (m.q(x) @ m.k(x).mT * SCALE).softmax(-1)
    return p[..., 1:] @ m.v(x)[:, 1:]


def _last_keys_left_out(m: nn.Module, x: Tensor) -> object:
    p = (m.q(x) @ m.k(x).mT * SCALE).softmax(-1)
    return p[..., :-2] @ m.v(x)[:, :-2]


def _never_normalised(m: nn.Module, x: Tensor) -> object:
    e = (m.q(x) @ m.k(x).mT * SCALE).exp()
    return e @ m.v(x) + e.sum(-1, keepdim=True)


def _performer(m: nn.Module, x: Tensor) -> object:
    """Linear attention: phi(q) (phi(k)^T v), with exponential features."""
    q, k, v = m.q(x), m.k(x), m.v(x)
    fq, fk = torch.exp(q - q.amax(-1, keepdim=True)), torch.exp(k - k.amax())
    return (fq @ (fk.mT @ v)) / (fq @ fk.sum(1, keepdim=True).mT)


def _dual_channel(m: nn.Module, x: Tensor) -> object:
    """Channel attention of dual attention networks: [C, C] scores of a feature map with itself."""
    b, s, c = x.shape
    y = m.conv(x.mT.reshape(b, c, s // 2, 2)).flatten(2)
    return (y @ y.mT).softmax(-1) @ y


CASES: dict[str, tuple[Callable[[nn.Module, Tensor], object], set[str]]] = {
    "probabilities returned": (_returned, {"AO203"}),
    "scores used elsewhere": (_scores_returned, {"AO203"}),
    "classifier": (_classifier, {"AO201"}),
    "mixture of experts router": (_router, {"AO201", "AO202"}),
    "channel attention": (_channel, {"AO211"}),
    "channel attention of a feature map": (_dual_channel, {"AO211"}),
    "softmax over queries": (_wrong_axis, {"AO205"}),
    "mean over the wrong axis": (_mean_over_wrong_axis, {"AO204"}),
    "renormalised slots": (_renormalised, {"AO204"}),
    "talking heads": (_talking_heads, {"AO212"}),
    "first key left out": (_key_left_out, {"AO205"}),
    "last keys left out": (_last_keys_left_out, {"AO205"}),
    "exponentials never normalised": (_never_normalised, {"AO203", "AO204"}),
}


def _model(f: Callable[[nn.Module, Tensor], object]) -> nn.Module:
    torch.manual_seed(0)
    m = Wrap(f, q=nn.Linear(C, C), k=nn.Linear(C, C), v=nn.Linear(C, C), gate=nn.Linear(C, 2), conv=nn.Conv2d(C, C, 1))
    m.mix = nn.Parameter(torch.randn(4, 4))
    return m


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", CASES)
def test_refused_with_a_reason(name: str, dynamic: bool) -> None:
    f, codes = CASES[name]
    model = _model(f)
    result = lifted(model, _x(), dynamic=dynamic)
    assert result.sites, "the softmax is not mentioned at all"
    for site in result.sites:
        assert site.status == "missed"
        assert {r.code for r in site.remarks} <= codes and site.remarks, [str(r) for r in site.remarks]
        assert "test_refusals.py:" in site.source
        assert len(site.why) > 20
    with torch.no_grad():
        want, got = model(_x()), result.graph_module(_x())
    for a, b in zip(want if isinstance(want, tuple) else (want,), got if isinstance(got, tuple) else (got,), strict=True):
        torch.testing.assert_close(a, b)


def test_linear_attention_is_never_rewritten() -> None:
    """It has no softmax over keys; if its exponentials are looked at, they are refused."""
    model = _model(_performer)
    result = lifted(model, _x())
    assert all(s.status == "missed" for s in result.sites)
    assert_same(model, result, _x(3, 17))


def _off_by_one_element(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q.shape[-2]
    m = torch.ones(s, s, dtype=torch.bool).tril()
    m[2, 5] = True
    return torch.where(m, q @ k.mT * SCALE, float("-inf")).softmax(-1) @ v


def _off_by_one_element_functional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    m = (i[:, None] >= i[None, :]) | ((i[:, None] == 2) & (i[None, :] == 5))
    return torch.where(m, q @ k.mT * SCALE, float("-inf")).softmax(-1) @ v


def _strict(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    return torch.where((i[:, None] > i[None, :]) | (i[None, :] == 0), q @ k.mT * SCALE, float("-inf")).softmax(-1) @ v


def _one_too_far(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q.shape[-2]
    return (q @ k.mT * SCALE).masked_fill(torch.ones(s, s, dtype=torch.bool).triu(2), float("-inf")).softmax(-1) @ v


def _reverse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q.shape[-2]
    return (q @ k.mT * SCALE).masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1).mT, float("-inf")).softmax(-1) @ v


def _small_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q.shape[-2]
    return (q @ k.mT * SCALE - 5.0 * torch.ones(s, s).triu(1)).softmax(-1) @ v


@pytest.mark.parametrize("core", [_off_by_one_element, _off_by_one_element_functional, _strict, _one_too_far, _reverse, _small_fill], ids=lambda f: f.__name__.strip("_"))
def test_almost_causal_is_exact_and_not_called_causal(core: Callable[..., Tensor]) -> None:
    model = Attention(core)
    result = lifted(model, _x())
    assert result.sites[0].status == "replaced" or result.sites[0].remarks[0].code == "AO207"
    if result.sites[0].spec is not None:
        assert result.sites[0].spec.causal is None, str(result.sites[0].spec.mask)
    assert_same(model, result, _x())
    assert_same(model, result, _x(3, 25))


@pytest.mark.parametrize("width", [3, 4, 5])
def test_a_window_has_its_exact_width(width: int) -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[-2])
        d = i[:, None] - i[None, :]
        return torch.where((d >= 0) & (d < width), q @ k.mT * SCALE, float("-inf")).softmax(-1) @ v

    model = Attention(core)
    result = lifted(model, _x())
    assert result.sites[0].spec.window == (width - 1, 0)
    assert_same(model, result, _x(3, 25))


def test_a_scale_one_percent_off_is_kept() -> None:
    model = Attention(lambda q, k, v: (q @ k.mT * (SCALE * 1.01)).softmax(-1) @ v)
    result = lifted(model, _x())
    assert result.sites[0].spec.scale == pytest.approx(SCALE * 1.01, rel=1e-6)
    assert_same(model, result, _x(3, 25))
