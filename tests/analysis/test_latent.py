"""Keys that are in part the same for all heads are recognised, and others are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rotations import half
from test_rotary_models import report
from torch import Tensor, nn
from torch.export import Dim

from attnopt.config import OptimizeConfig
from attnopt.ir.spec import AttentionSpec
from attnopt.passes.pipeline import run_pipeline

B, S, H, OWN, SHARED, DV = 2, 6, 4, 8, 4, 6
C = 16
Join = Callable[[Tensor, Tensor], Tensor]


class Latent(nn.Module):
    """``join(own [B, H, S, OWN], shared [B, 1, S, SHARED])`` makes the keys."""

    def __init__(self, join: Join, turn: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.join, self.turn = join, turn
        self.q, self.kv, self.up = nn.Linear(C, H * (OWN + SHARED)), nn.Linear(C, 5 + SHARED), nn.Linear(5, H * (OWN + DV))

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, H, -1).transpose(1, 2)
        latent, shared = self.kv(x).split([5, SHARED], -1)
        own, v = self.up(F.rms_norm(latent, (5,))).view(b, s, H, -1).transpose(1, 2).split([OWN, DV], -1)
        shared = shared.view(b, s, 1, SHARED).transpose(1, 2)
        if self.turn:
            a = torch.outer(torch.arange(s).float(), torch.tensor([1.0, 0.1])).repeat(1, 2)
            shared = shared * a.cos() + half(shared) * a.sin()
        k = self.join(own, shared)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, -1)


def spec_of(model: nn.Module) -> AttentionSpec:
    x = torch.randn(B, S, C, generator=torch.Generator().manual_seed(1))
    gm = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},), strict=False).module(check_guards=False)
    result = run_pipeline(gm, OptimizeConfig(backend="reference"))
    torch.testing.assert_close(result.graph_module(x), model(x), rtol=1e-5, atol=1e-5)
    (site,) = result.sites
    assert site.spec is not None
    return site.spec


def _behind(own: Tensor, shared: Tensor) -> Tensor:
    return torch.cat((own, shared.expand(-1, H, -1, -1)), -1)


def _before(own: Tensor, shared: Tensor) -> Tensor:
    return torch.cat((shared.repeat(1, H, 1, 1), own), -1)


def _filled(own: Tensor, shared: Tensor) -> Tensor:
    k = own.new_empty(*own.shape[:3], OWN + SHARED)
    k[..., :OWN] = own
    k[..., OWN:] = shared
    return k


def _added(own: Tensor, shared: Tensor) -> Tensor:
    """Padded with zeros and added up."""
    return F.pad(own, (0, SHARED)) + F.pad(shared, (OWN, 0))


@pytest.mark.parametrize("turn", [True, False], ids=["rotary", "plain"])
@pytest.mark.parametrize(("join", "start"), [(_behind, OWN), (_before, 0), (_filled, OWN), (_added, OWN)])
def test_shared_features(join: Join, start: int, turn: bool) -> None:
    spec = spec_of(Latent(join, turn))
    assert spec.traits.shared_key_features == (start, SHARED)
    assert "MLA: 4 of 12 key features shared by all heads" in str(spec)
    assert (spec.dims.D.value, spec.dims.Dv.value, spec.groups) == (OWN + SHARED, DV, 1)
    assert AttentionSpec.from_json(spec.to_json()) == spec


def _scaled_by_head(own: Tensor, shared: Tensor) -> Tensor:
    return torch.cat((own, shared * torch.arange(1, H + 1)[:, None, None]), -1)


def _one_head_apart(own: Tensor, shared: Tensor) -> Tensor:
    return torch.cat((own, torch.cat((shared.expand(-1, H - 1, -1, -1), 2 * shared), 1)), -1)


def _rolled_by_head(own: Tensor, shared: Tensor) -> Tensor:
    return torch.cat((own, torch.stack([shared[:, 0].roll(h, -1) for h in range(H)], 1)), -1)


def _pairs_of_heads(own: Tensor, shared: Tensor) -> Tensor:
    return torch.cat((own, torch.cat((shared, -shared), 1).repeat_interleave(2, 1)), -1)


def _two_runs(own: Tensor, shared: Tensor) -> Tensor:
    s = shared.expand(-1, H, -1, -1)
    return torch.cat((s[..., :2], own, s[..., 2:]), -1)


def _all_shared(own: Tensor, shared: Tensor) -> Tensor:
    return shared.repeat(1, H, 1, 3)


def _none_shared(own: Tensor, shared: Tensor) -> Tensor:
    return torch.cat((own, own[..., :SHARED]), -1)


@pytest.mark.parametrize("join", [_scaled_by_head, _one_head_apart, _rolled_by_head, _pairs_of_heads, _two_runs, _all_shared, _none_shared])
def test_near_miss_is_not_claimed(join: Join) -> None:
    spec = spec_of(Latent(join))
    assert spec.traits.shared_key_features is None
    assert "MLA" not in str(spec)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_models(name: str) -> None:
    for s in report(name).attentions:
        assert s.spec.traits.shared_key_features == (16, 8)
        assert (s.spec.dims.D.value, s.spec.dims.Dv.value) == (24, 16)
        assert str(s.spec).endswith("MLA: 8 of 24 key features shared by all heads")


def test_grouped_heads_are_no_latent_keys() -> None:
    assert all(s.spec.traits.shared_key_features is None for s in report("llama").attentions)
