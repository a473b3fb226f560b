"""Attentions whose keys and values are made of a latent keep the latent alone, and compute what they did; where that is not proven they stay, with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnopt
import attnopt.errors
from attnopt.serving import ServingModel

H, OWN, SHARED, DV, C, WIDTH = 4, 8, 4, 6, 10, 32
PAGED = attnopt.OptimizeConfig(kv_cache="paged")
IDS = torch.randint(0, 50, (2, 11), generator=torch.Generator().manual_seed(0))
Parts = tuple[Tensor, Tensor]
"""Own keys [B, H, S, OWN] and values [B, H, S, DV]."""


class Decoder(nn.Module):
    """``make(model, latent [B, S, C])`` gives own keys and values, ``join(own, shared [B, 1, S, SHARED])`` the keys."""

    def __init__(self, make: Callable[[Any, Tensor], Parts], join: Callable[[Tensor, Tensor], Tensor], turn: bool = True, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.join, self.turn = make, join, turn
        self.embed, self.q, self.down = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, H * (OWN + SHARED)), nn.Linear(WIDTH, C + SHARED)
        self.norm = nn.RMSNorm(C)
        self.up = nn.Linear(C, H * (OWN + DV), bias=bias)
        self.up_k, self.up_v = nn.Linear(C, H * OWN, bias=False), nn.Linear(C, H * DV, bias=False)
        self.w_k, self.w_v = nn.Parameter(torch.randn(C, H * OWN)), nn.Parameter(torch.randn(H, C, DV))
        self.out, self.head = nn.Linear(H * DV, WIDTH), nn.Linear(WIDTH, 50)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, s, _ = x.shape
        q = self.q(x).view(b, s, H, -1).transpose(1, 2)
        latent, shared = self.down(x).split([C, SHARED], -1)
        own, v = self.make(self, self.norm(latent))
        shared = shared.view(b, s, 1, SHARED).transpose(1, 2)
        if self.turn:
            angle = torch.outer(torch.arange(s).float(), torch.tensor([1.0, 0.1])).repeat(1, 2)
            turned = torch.cat((-shared[..., SHARED // 2 :], shared[..., : SHARED // 2]), -1)
            shared = shared * angle.cos() + turned * angle.sin()
        k = self.join(own, shared)
        y = self.attend(q[..., : k.shape[-1]], k, v).transpose(1, 2).reshape(b, s, -1)
        return self.head(x + self.out(y))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def together(m: Any, latent: Tensor) -> Parts:
    own, v = heads(m.up(latent)).split([OWN, DV], -1)
    return own, v


def values_first(m: Any, latent: Tensor) -> Parts:
    v, own = heads(m.up(latent)).split([DV, OWN], -1)
    return own, v


def all_keys_first(m: Any, latent: Tensor) -> Parts:
    own, v = m.up(latent).split([H * OWN, H * DV], -1)
    return heads(own), heads(v)


def apart(m: Any, latent: Tensor) -> Parts:
    return heads(m.up_k(latent)), heads(m.up_v(latent))


def parameters(m: Any, latent: Tensor) -> Parts:
    """A weight that is stored transposed, and one with an axis of heads."""
    return heads(latent @ m.w_k), torch.einsum("bsc,hce->bhse", latent, m.w_v)


def behind(own: Tensor, shared: Tensor) -> Tensor:
    return torch.cat((own, shared.expand(-1, H, -1, -1)), -1)


def before(own: Tensor, shared: Tensor) -> Tensor:
    return torch.cat((shared.expand(-1, H, -1, -1), own), -1)


def in_the_middle(own: Tensor, shared: Tensor) -> Tensor:
    return torch.cat((own[..., :3], shared.expand(-1, H, -1, -1), own[..., 3:]), -1)


def added(own: Tensor, shared: Tensor) -> Tensor:
    return F.pad(own, (0, SHARED)) + F.pad(shared, (OWN, 0))


def repeated(own: Tensor, shared: Tensor) -> Tensor:
    """Each of two shared features twice, of two tensors behind one another."""
    both = torch.cat((shared[..., :1], shared[..., 1:2]), -1).repeat_interleave(2, -1)
    return torch.cat((own, both.expand(-1, H, -1, -1)), -1)


def served(model: nn.Module, config: attnopt.OptimizeConfig = PAGED) -> ServingModel:
    made = attnopt.optimize(model.eval(), IDS, config=config)
    assert isinstance(made, ServingModel) and made.attnopt_report.verdict.passed
    return made


def remark(report: attnopt.Report, code: str) -> list[str]:
    return [r.message for s in report.sites for r in s.remarks if r.code == code]


@pytest.mark.parametrize(
    ("make", "join"),
    [
        pytest.param(together, behind, id="behind"),
        pytest.param(values_first, before, id="before", marks=pytest.mark.slow),
        pytest.param(all_keys_first, in_the_middle, id="in-the-middle"),
        pytest.param(apart, behind, id="weights-apart", marks=pytest.mark.slow),
        pytest.param(parameters, repeated, id="parameters"),
        pytest.param(together, added, id="padded-and-added"),
    ],
)
def test_the_latent_is_what_is_cached(make: Callable[[Any, Tensor], Parts], join: Callable[[Tensor, Tensor], Tensor]) -> None:
    """And the result is the original's, token by token and whole, within the budget of its float64 copy."""
    made = served(Decoder(make, join))
    assert [(x.Hkv, x.D, x.Dv) for x in made.layers] == [(1, C + SHARED, 0)]
    assert remark(made.attnopt_report, "AO107") == [
        f"keys [4, 12] and values [4, 6] are made of a latent of 10 features and 4 key features that all heads share; a token takes {4 * 14} bytes of cache in place of {4 * 72}."
    ]
    if join is not added:  # there the shared features are read out of whole keys
        assert made.function.source.count("linear(") == 4, "q, down, out and head: no keys or values are made"
        assert "matmul(" not in made.function.source


class Written(Decoder):
    """A softcap, slopes, a window and a sink."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        distance = i[:, None] - i
        scores = 5.0 * torch.tanh(q @ k.mT * 0.3 / 5.0) - torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None] * distance
        scores = scores.masked_fill((distance < 0) | (distance >= 6), -torch.inf)
        sink = torch.zeros_like(scores[..., :1])
        return torch.cat((scores, sink), -1).softmax(-1)[..., :-1] @ v


def test_score_and_mask_are_what_they_were() -> None:
    made = served(Written(together, behind))
    assert [(x.Hkv, x.D, x.Dv, x.window) for x in made.layers] == [(1, C + SHARED, 0, 6)]
    (site,) = made.attnopt_report.sites
    assert str(site.spec) == "causal, MQA 4/1, window 6, softcap 5, ALiBi, softmax plus one"


def test_keys_without_a_shared_part() -> None:
    made = served(Decoder(together, lambda own, shared: own))
    assert [(x.Hkv, x.D, x.Dv) for x in made.layers] == [(1, C, 0)]


def test_the_pass_can_be_left_out() -> None:
    made = served(Decoder(together, behind), replace(PAGED, disable_passes=("absorb-latent",)))
    assert [(x.Hkv, x.D, x.Dv) for x in made.layers] == [(H, OWN + SHARED, DV)]


def through_a_curve(m: Any, latent: Tensor) -> Parts:
    own, v = together(m, latent)
    return own, v.tanh()


def scaled(m: Any, latent: Tensor) -> Parts:
    own, v = together(m, latent)
    return 2 * own, v


def of_another_latent(m: Any, latent: Tensor) -> Parts:
    return heads(m.up_k(latent)), heads(m.up_v(latent.sigmoid()))


def of_another_part(m: Any, latent: Tensor) -> Parts:
    return heads(latent[..., :5] @ m.w_k[:5]), heads(latent[..., 5:] @ m.w_v.transpose(0, 1).flatten(1)[5:])


def by_the_token(m: Any, latent: Tensor) -> Parts:
    """Each token makes the matrices by itself."""
    w = latent[..., None, :, None] * m.up.weight.view(H, 1, OWN + DV, C).transpose(-1, -2)[None, :, 0]
    own, v = torch.einsum("bsc,bshcn->bhsn", latent, w).split([OWN, DV], -1)
    return own, v


def joined_values(m: Any, latent: Tensor) -> Parts:
    return heads(m.up_k(latent)), torch.cat((heads(m.up_v(latent))[..., :3], torch.einsum("bsc,hce->bhse", latent, m.w_v[..., 3:])), -1)


def features_of_heads(m: Any, latent: Tensor) -> Parts:
    """Row i of head h is i * H + h."""
    x = m.up(latent).unflatten(-1, (-1, H)).permute(0, 3, 1, 2)
    return x[..., :OWN], x[..., OWN:]


def no_projection(m: Any, latent: Tensor) -> Parts:
    return heads(m.up_k(latent)), heads(m.up_v(latent)).softmax(-1)


def every_second(m: Any, latent: Tensor) -> Parts:
    return heads(m.up_k(latent)), heads(latent @ m.w_k)[..., ::2].repeat_interleave(2, -1)[..., :DV]


def heads_backwards(m: Any, latent: Tensor) -> Parts:
    return heads(m.up_k(latent)), heads(m.up_v(latent)).flip(1)


def one_number(m: Any, latent: Tensor) -> Parts:
    return heads(m.up_k(latent)), F.linear(latent, m.w_k[:, 0])[:, None, :, None].expand(-1, H, -1, DV)


REFUSED = {
    "bias": (Decoder(together, behind, bias=True), "of the keys has a bias or a factor"),
    "curve": (Decoder(through_a_curve, behind), "the value features 0 to 5 of .* are not the result of a projection alone"),
    "factor": (Decoder(scaled, behind), "the key features 0 to 7 of .* are not the result of a projection alone"),
    "another-latent": (Decoder(of_another_latent, behind), "keys and values are made of .* and aten::sigmoid"),
    "another-part": (Decoder(of_another_part, behind), "keys and values are made of different parts of"),
    "token": (Decoder(by_the_token, behind), "is not the product of features of a token, which all heads share, with a matrix of each head"),
    "no-projection": (Decoder(no_projection, behind), "aten::softmax .*, which is no projection"),
    "every-second": (Decoder(every_second, behind), "are in an order that no view of its operands has"),
    "heads-backwards": (Decoder(heads_backwards, behind), "are in an order that no view of its operands has"),
    "one-number": (Decoder(one_number, behind), "aten::linear .*, which is no projection"),
    "values-in-parts": (Decoder(joined_values, behind), "are made in 2 parts"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_not_proven_stays_with_a_reason(case: str) -> None:
    model, words = REFUSED[case]
    report = attnopt.inspect(model.eval(), IDS, config=PAGED)
    assert remark(report, "AO104") == ["keys [4, 12] and values [4, 6] of each token are kept in a paged cache."]
    (message,) = remark(report, "AO218")
    assert re.search(words, message), message


def test_rows_of_features_of_heads() -> None:
    """The matrix of a head is every fourth row: a view like any other."""
    made = served(Decoder(features_of_heads, behind))
    assert [(x.Hkv, x.D, x.Dv) for x in made.layers] == [(1, C + SHARED, 0)]


def test_shared_features_that_are_joined_along_the_sequence_are_read_behind_the_join() -> None:
    """Which part a token's element stands in depends on the token; serving refuses the join itself."""

    def joined(own: Tensor, shared: Tensor) -> Tensor:
        return behind(own, torch.cat((shared[:, :, :1], shared[:, :, 1:]), 2))

    with pytest.raises(attnopt.errors.ServingError, match="puts sequences behind one another"):
        served(Decoder(together, joined))
