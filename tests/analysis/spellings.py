"""Hand-written attentions: the same function in many spellings. ``SPELLINGS[name]`` builds a module of (x) or (x, mask)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt.ir import expr as E

B, S, H, D = 2, 12, 4, 8
C = H * D
SPELLINGS: dict[str, Callable[[], nn.Module]] = {}
EXPECT: dict[str, dict[str, object]] = {}
"""What the spec must say, per spelling; what is not named is not checked."""


class Attention(nn.Module):
    """Projections around ``core(q, k, v)`` on [B, H, S, D]."""

    def __init__(self, core: Callable[[Tensor, Tensor, Tensor], Tensor], kv_heads: int = H) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core = core
        self.kv_heads = kv_heads
        self.q, self.k, self.v = nn.Linear(C, C), nn.Linear(C, kv_heads * D), nn.Linear(C, kv_heads * D)
        self.o = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, H, D).transpose(1, 2)
        k, v = (p(x).view(b, s, self.kv_heads, D).transpose(1, 2) for p in (self.k, self.v))
        return self.o(self.core(q, k, v).transpose(1, 2).reshape(b, s, C))


def spelling(name: str, kv_heads: int = H, **expect: object) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(core: Callable[..., Tensor]) -> Callable[..., Tensor]:
        SPELLINGS[name] = lambda: Attention(core, kv_heads)
        EXPECT[name] = expect
        return core

    return register


def causal(s: int, device: object = None) -> Tensor:
    return torch.ones(s, s, dtype=torch.bool).tril()


SCALE = 1 / math.sqrt(D)


@spelling("plain", scale=SCALE, causal=None)
def _plain(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D), dim=-1) @ v


@spelling("scale_before", scale=SCALE)
def _scale_before(q, k, v):
    return ((q * SCALE) @ k.transpose(-1, -2)).softmax(-1) @ v


@spelling("scale_on_both", scale=SCALE)
def _scale_on_both(q, k, v):
    r = D**-0.25
    return torch.softmax((q * r) @ (k * r).transpose(-1, -2), dim=-1) @ v


@spelling("scale_on_keys", scale=SCALE)
def _scale_on_keys(q, k, v):
    return torch.softmax(q @ (k.transpose(-1, -2) / math.sqrt(D)), dim=-1) @ v


@spelling("unscaled", scale=1.0)
def _unscaled(q, k, v):
    return torch.softmax(q @ k.mT, dim=-1) @ v


@spelling("einsum", scale=SCALE)
def _einsum(q, k, v):
    p = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", p, v)


@spelling("einsum_bshd", causal="top_left")
def _einsum_bshd(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    s = torch.einsum("blhe,bshe->bhls", q, k) * SCALE
    s = s.masked_fill(~causal(s.shape[-1]), float("-inf"))
    return torch.einsum("bhls,bshd->blhd", s.softmax(-1), v).transpose(1, 2)


@spelling("heads_last_scores", causal="top_left")
def _heads_last(q, k, v):
    s = torch.einsum("bhqd,bhkd->bqkh", q, k) * SCALE
    s = s.masked_fill(~causal(s.shape[1])[None, :, :, None], float("-inf"))
    return torch.einsum("bqkh,bhkd->bhqd", s.softmax(2), v)


@spelling("bmm_flattened_heads", causal="top_left")
def _bmm(q, k, v):
    b, h, s, d = q.shape
    q, k, v = (t.reshape(b * h, s, d) for t in (q, k, v))
    w = torch.bmm(q, k.transpose(1, 2)) * SCALE
    w = w + torch.full((s, s), float("-inf")).triu(1)
    return torch.bmm(w.softmax(-1), v).view(b, h, s, d)


@spelling("baddbmm", scale=SCALE)
def _baddbmm(q, k, v):
    b, h, s, d = q.shape
    q, k, v = (t.reshape(b * h, s, d) for t in (q, k, v))
    w = torch.baddbmm(torch.empty(b * h, s, s, dtype=q.dtype), q, k.transpose(1, 2), beta=0, alpha=SCALE)
    return torch.bmm(w.softmax(-1), v).view(b, h, s, d)


@spelling("baddbmm_bias", alibi=True)
def _baddbmm_bias(q, k, v):
    b, h, s, d = q.shape
    slopes = torch.pow(2.0, -torch.arange(1, h + 1))
    alibi = (slopes[:, None, None] * torch.arange(s)[None, None, :]).repeat(b, 1, 1)
    q, k, v = (t.reshape(b * h, s, d) for t in (q, k, v))
    w = alibi.to(q.dtype).baddbmm(q, k.transpose(1, 2), beta=1.0, alpha=SCALE)
    return torch.bmm(w.softmax(-1), v).view(b, h, s, d)


@spelling("masked_fill", causal="top_left")
def _masked_fill(q, k, v):
    w = q @ k.mT * SCALE
    return w.masked_fill(torch.ones(w.shape[-2:], dtype=torch.bool).triu(1), float("-inf")).softmax(-1) @ v


@spelling("masked_fill_finite", causal="top_left", empty_rows="uniform")
def _masked_fill_finite(q, k, v):
    w = q @ k.mT * SCALE
    return w.masked_fill(causal(w.shape[-1]) == 0, -1e9).softmax(-1) @ v


@spelling("where", causal="top_left")
def _where(q, k, v):
    w = q @ k.mT * SCALE
    return torch.where(causal(w.shape[-1]), w, torch.finfo(w.dtype).min).softmax(-1) @ v


@spelling("add_mask", causal="top_left")
def _add_mask(q, k, v):
    s = q.shape[-2]
    return (q @ k.mT * SCALE + torch.full((s, s), float("-inf")).triu(1)).softmax(-1) @ v


@spelling("commuted_add", causal="top_left")
def _commuted_add(q, k, v):
    s = q.shape[-2]
    return (torch.full((s, s), float("-inf")).triu(1) + SCALE * (q @ k.mT)).softmax(-1) @ v


@spelling("one_minus_mask", causal="top_left")
def _one_minus(q, k, v):
    m = causal(q.shape[-2]).to(q.dtype)
    return (q @ k.mT * SCALE + (1.0 - m) * torch.finfo(q.dtype).min).softmax(-1) @ v


@spelling("mask_times_mask", causal="top_left", window=(3, 0))
def _window(q, k, v):
    i = torch.arange(q.shape[-2])
    ok = (i[:, None] >= i[None, :]) & (i[:, None] - i[None, :] < 4)
    return torch.where(ok, q @ k.mT * SCALE, float("-inf")).softmax(-1) @ v


@spelling("symmetric_window", causal=None, window=(2, 2))
def _symmetric(q, k, v):
    i = torch.arange(q.shape[-2])
    far = (i[:, None] - i[None, :]).abs() > 2
    return (q @ k.mT * SCALE).masked_fill(far, float("-inf")).softmax(-1) @ v


@spelling("in_place", causal="top_left")
def _in_place(q, k, v):
    w = q @ k.mT
    w *= SCALE
    w.masked_fill_(~causal(w.shape[-1]), float("-inf"))
    return w.softmax(-1) @ v


@spelling("exp_over_sum", scale=SCALE)
def _exp_sum(q, k, v):
    e = (q @ k.mT * SCALE).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


@spelling("exp_minus_max", causal="top_left")
def _exp_max(q, k, v):
    w = (q @ k.mT * SCALE).masked_fill(~causal(q.shape[-2]), float("-inf"))
    e = torch.exp(w - w.max(dim=-1, keepdim=True).values)
    return (e / e.sum(dim=-1, keepdim=True)) @ v


@spelling("divide_after", scale=SCALE)
def _divide_after(q, k, v):
    w = q @ k.mT * SCALE
    e = torch.exp(w - w.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


@spelling("log_softmax_exp", scale=SCALE)
def _log_softmax(q, k, v):
    return F.log_softmax(q @ k.mT * SCALE, dim=-1).exp() @ v


@spelling("logsumexp", scale=SCALE)
def _logsumexp(q, k, v):
    w = q @ k.mT * SCALE
    return torch.exp(w - w.logsumexp(-1, keepdim=True)) @ v


@spelling("softcap", softcap=30.0, causal="top_left", scale=SCALE)
def _softcap(q, k, v):
    w = torch.tanh(q @ k.mT * SCALE / 30.0) * 30.0
    return w.masked_fill(~causal(w.shape[-1]), float("-inf")).softmax(-1) @ v


@spelling("alibi", alibi=True, causal="top_left")
def _alibi(q, k, v):
    s = q.shape[-2]
    i = torch.arange(s)
    slopes = 2.0 ** -torch.arange(1, H + 1).float()
    bias = slopes[:, None, None] * (i[None, :] - i[:, None])
    return (q @ k.mT * SCALE + bias).masked_fill(~causal(s), float("-inf")).softmax(-1) @ v


@spelling("values_transposed", scale=SCALE)
def _vt(q, k, v):
    p = (q @ k.mT * SCALE).softmax(-1)
    return (v.mT @ p.mT).mT


@spelling("keys_times_queries", causal="top_left")
def _kq(q, k, v):
    w = (k @ q.mT * SCALE).mT
    return w.masked_fill(~causal(w.shape[-1]), float("-inf")).softmax(-1) @ v


@spelling("softmax_over_rows", scale=SCALE)
def _rows(q, k, v):
    p = (k @ q.mT * SCALE).softmax(-2)
    return p.mT @ v


@spelling("nan_to_num", empty_rows="zero")
def _nan_to_num(q, k, v):
    i = torch.arange(q.shape[-2])
    w = (q @ k.mT * SCALE).masked_fill((i[:, None] <= i[None, :]), float("-inf"))
    return w.softmax(-1).nan_to_num() @ v


@spelling("fp32_island", scale=SCALE)
def _island(q, k, v):
    return (q @ k.mT * SCALE).float().softmax(-1).to(v.dtype) @ v


@spelling("multiply_and_sum", scale=SCALE)
def _mul_sum(q, k, v):
    w = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * SCALE
    return w.softmax(-1) @ v


@spelling("repeat_interleave", kv_heads=2, groups=2)
def _repeat_interleave(q, k, v):
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    return (q @ k.mT * SCALE).softmax(-1) @ v


@spelling("expand_reshape", kv_heads=2, groups=2, causal="top_left")
def _expand(q, k, v):
    b, h, s, d = k.shape
    k, v = (t[:, :, None].expand(b, h, 2, s, d).reshape(b, h * 2, s, d) for t in (k, v))
    return (q @ k.mT * SCALE).masked_fill(~causal(s), float("-inf")).softmax(-1) @ v


@spelling("grouped_5d", kv_heads=2, groups=2)
def _grouped(q, k, v):
    b, _, s, d = q.shape
    g = q.view(b, 2, 2, s, d)
    p = (torch.einsum("bhgqd,bhkd->bhgqk", g, k) * SCALE).softmax(-1)
    return torch.einsum("bhgqk,bhkd->bhgqd", p, v).reshape(b, H, s, d)


@spelling("multi_query", kv_heads=1, groups=H)
def _mqa(q, k, v):
    return (q @ k.mT * SCALE).softmax(-1) @ v


@spelling("sdpa", causal=None)
def _sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@spelling("sdpa_causal", causal="top_left")
def _sdpa_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelling("sdpa_dense_mask", causal="top_left", window=(3, 0))
def _sdpa_mask(q, k, v):
    i = torch.arange(q.shape[-2])
    d = i[:, None] - i[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(d >= 0) & (d < 4))


@spelling("sdpa_gqa", kv_heads=2, groups=2)
def _sdpa_gqa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.3)


@spelling("dense_bias", causal=None)
def _dense(q, k, v):
    bias = torch.fft.fft(q.sum(-1)[..., None] * k.sum(-1)[..., None, :]).real * 0.01  # no rule lifts an FFT
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


@spelling("divided_behind_a_view", scale=SCALE)
def _divided_behind_a_view(q, k, v):
    w = q @ k.mT * SCALE
    e = (w - w.amax(-1, keepdim=True)).exp()
    return (v.mT @ e.mT).mT / e.sum(-1, keepdim=True)


@spelling("exponentials_that_underflow", causal="top_left", empty_rows="nan")
def _exponentials_that_underflow(q, k, v):
    e = (q @ k.mT * SCALE).masked_fill(~causal(q.shape[-2]), -1e9).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


@spelling("nan_to_num_of_scores", causal="top_left", scale=SCALE, empty_rows="uniform")
def _nan_to_num_of_scores(q, k, v):
    w = (q @ k.mT * SCALE).masked_fill(~causal(q.shape[-2]), float("-inf"))
    return torch.nan_to_num(w).softmax(-1) @ v


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


@spelling("sink_column_last", causal="top_left", sinks=True)
def _sink_last(q, k, v):
    s = (q @ k.mT * SCALE).masked_fill(~causal(q.shape[-2]), torch.finfo(q.dtype).min)
    s = torch.cat([s, SINKS.view(1, H, 1, 1).expand(s.shape[0], H, s.shape[2], 1)], -1)
    s = s - s.max(-1, keepdim=True).values
    return s.softmax(-1)[..., :-1] @ v


@spelling("sink_column_first", causal="top_left", sinks=True)
def _sink_first(q, k, v):
    s = (q @ k.mT * SCALE).masked_fill(~causal(q.shape[-2]), float("-inf"))
    s = torch.cat([SINKS.view(1, H, 1, 1).expand(s.shape[0], H, s.shape[2], 1), s], -1)
    return s.softmax(-1)[..., 1:] @ v


@spelling("softmax_plus_one", sinks=True, sink=E.FZERO)
def _softmax_plus_one(q, k, v):
    e = (q @ k.mT * SCALE).exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


@spelling("softmax_plus_one_stable", sinks=True, sink=E.FZERO)
def _softmax_plus_one_stable(q, k, v):
    s = q @ k.mT * SCALE
    m = s.amax(-1, keepdim=True)
    e = (s - m).exp()
    return (e / (e.sum(-1, keepdim=True) + (-m).exp())) @ v


@spelling("sink_in_the_sum", sinks=True)
def _sink_in_the_sum(q, k, v):
    s, z = q @ k.mT * SCALE, SINKS.view(1, H, 1, 1)
    m = torch.maximum(s.amax(-1, keepdim=True), z)
    e = (s - m).exp()
    return (e / (e.sum(-1, keepdim=True) + (z - m).exp())) @ v


@spelling("hidden_column", sinks=False, scale=SCALE)
def _hidden_column(q, k, v):
    s = F.pad(q @ k.mT * SCALE, (0, 1), value=float("-inf"))
    return s.softmax(-1)[..., :-1] @ v


# ------------------------------------------------------------------------------------------------ masks with a name


def _masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def _positions(q: Tensor) -> tuple[Tensor, Tensor]:
    i = torch.arange(q.shape[-2])
    return i[:, None], i[None, :]


@spelling("chunks", causal="top_left", rest="chunk 4")
def _chunks(q, k, v):
    i, j = _positions(q)
    return _masked(q, k, v, (j <= i) & (torch.div(i, 4, rounding_mode="floor") == j // 4))


@spelling("prefix", causal=None, rest="prefix")
def _prefix(q, k, v):
    i, j = _positions(q)
    return _masked(q, k, v, (j <= i) | (j < 3))


@spelling("local_and_global", causal=None, window=(None, None), rest="global")
def _local_and_global(q, k, v):
    i, j = _positions(q)
    return _masked(q, k, v, ((i - j).abs() <= 2) | (j == 0) | (i == 0))


LAYOUT = torch.rand(64, 64, generator=torch.Generator().manual_seed(5)) < 0.5
LAYOUT.fill_diagonal_(True)


@spelling("block_sparse", causal=None, rest="blocks 4x4")
def _block_sparse(q, k, v):
    i, j = _positions(q)
    return _masked(q, k, v, LAYOUT[i // 4, j // 4])


@spelling("block_sparse_repeated", causal="top_left", rest="blocks 4x4")
def _block_sparse_repeated(q, k, v):
    i, j = _positions(q)
    table = LAYOUT.repeat_interleave(4, 0).repeat_interleave(4, 1)[: q.shape[-2], : k.shape[-2]]
    return _masked(q, k, v, table & (j <= i))


@spelling("compared_bias", causal="top_left", window=(None, None), rest="")
def _compared_bias(q, k, v):
    """The mask is read back from a bias that was made of it."""
    bias = torch.zeros(q.shape[-2], k.shape[-2]).masked_fill(~causal(q.shape[-2]), -1e9)
    return _masked(q, k, v, ~(bias < -1))


# ------------------------------------------------------------------------------------------------ buffers with a formula

_D = torch.arange(64)[None, :] - torch.arange(64)[:, None]
_SLOPES = 2.0 ** -torch.arange(1.0, H + 1)[:, None, None] * 1.37
BUFFERS: dict[str, tuple[Tensor, dict[str, object]]] = {
    "triangle": (_D <= 0, {"causal": "top_left", "window": (None, None)}),
    "band": ((_D <= 0) & (_D > -5), {"causal": "top_left", "window": (4, 0)}),
    "band_on_both_sides": (_D.abs() <= 2, {"causal": None, "window": (2, 2)}),
    "additive_band": (torch.zeros(64, 64).masked_fill(_D.abs() > 2, float("-inf")), {"window": (2, 2)}),
    "alibi_positions": (_SLOPES * torch.arange(64.0), {"alibi": True}),
    "alibi_distances": (_SLOPES * _D, {"alibi": True}),
    "alibi_absolute": ((-_SLOPES * _D.abs()).masked_fill(_D > 0, float("-inf")), {"alibi": True, "causal": "top_left"}),
    "absolute_distances_per_head": (-_SLOPES * _D.abs(), {"alibi": False, "causal": None}),
    "alibi_causal": ((_SLOPES * _D).masked_fill(_D > 0, float("-inf")), {"alibi": True, "causal": "top_left"}),
    "distances": (-_D.abs().float(), {"alibi": False, "causal": None}),
    "no_formula": (torch.randn(64, 64, generator=torch.Generator().manual_seed(3)), {"alibi": False, "causal": None}),
}


class Buffered(Attention):
    """A buffer of the module is the mask or the bias."""

    def __init__(self, table: Tensor) -> None:
        super().__init__(self.attend)
        self.register_buffer("table", table)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT * SCALE
        part = self.table[..., : min(s.shape[-2], self.table.shape[-2]), : s.shape[-1]]
        s = s.masked_fill(~part, float("-inf")) if part.dtype is torch.bool else s + part
        return s.softmax(-1) @ v


for _name, (_table, _expect) in BUFFERS.items():
    SPELLINGS[f"buffer_{_name}"] = lambda t=_table: Buffered(t)
    EXPECT[f"buffer_{_name}"] = _expect


# ------------------------------------------------------------------------------------------------ written in place, and in parts


@spelling("in_place_on_a_view", causal="top_left")
def _in_place_on_a_view(q, k, v):
    b, h, s, d = q.shape
    w = torch.bmm((q * SCALE).reshape(b * h, s, d), k.reshape(b * h, s, d).mT).view(b, h, s, s)
    w.masked_fill_(~causal(s), float("-inf"))
    return w.softmax(-1) @ v


@spelling("probabilities_kept_and_never_read", causal=None)
def _never_read(q, k, v):
    p = (q @ k.mT * SCALE).softmax(-1)
    kept = torch.zeros_like(p)
    kept[:, :, 1:] = p[:, :, 1:]
    kept.view(p.shape[0], -1).mul_(2)
    return p @ v


@spelling("keys_in_two_groups", causal=None, bias=None, scale=SCALE)
def _two_groups(q, k, v):
    near, far = k[:, :, :5], k[:, :, 5:]
    p = torch.cat([q @ near.mT * SCALE, torch.einsum("bhqd,bhkd->bhqk", q, far) * SCALE], -1).softmax(-1)
    return p[..., :5] @ v[:, :, :5] + p[..., 5:] @ v[:, :, 5:]


@spelling("keys_in_three_groups_with_masks", causal="top_left", scale=SCALE)
def _three_groups(q, k, v):
    hidden = torch.zeros(q.shape[-2], k.shape[-2]).masked_fill(~causal(q.shape[-2]), float("-inf"))
    parts = [slice(0, 3), slice(3, 4), slice(4, None)]
    p = torch.cat([q @ k[:, :, s].mT * SCALE + hidden[:, s] for s in parts], -1).softmax(-1)
    return p[..., 4:] @ v[:, :, 4:] + p[..., :3] @ v[:, :, :3] + p[..., 3:4] @ v[:, :, 3:4]


@spelling("contents_and_positions_apart", causal="top_left", scale=SCALE, bias=None)
def _contents_and_positions(q, k, v):
    """Two products, of which the second has keys that all heads share."""
    s = q[..., :6] @ k[..., :6].mT + torch.einsum("bhqd,bkd->bhqk", q[..., 6:], k[:, 0, :, 6:])
    return (s * SCALE).masked_fill(~causal(s.shape[-1]), float("-inf")).softmax(-1) @ v


@spelling("product_of_masks", causal="top_left", rest="chunk 4")
def _product_of_masks(q, k, v):
    i, j = _positions(q)
    return _masked(q, k, v, (j <= i).float() * (i // 4 == j // 4).float() > 0)


@spelling("sum_of_masks", causal=None, rest="prefix")
def _sum_of_masks(q, k, v):
    i, j = _positions(q)
    return _masked(q, k, v, (j <= i).float() + (j < 3).float() > 0)


@spelling("symmetric_distance", alibi=False)
def _symmetric_distance(q, k, v):
    i, j = _positions(q)
    return (q @ k.mT * SCALE - (i - j).abs() * 0.1).softmax(-1) @ v
