"""Whole hand-written models: what people write, in the shapes they write it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spellings import B, C, S
from test_spellings import assert_same, lifted
from torch import Tensor, nn


class NanoGPTBlock(nn.Module):
    """Packed projection, a registered triangular buffer, dropout modules."""

    def __init__(self, width: int = C, heads: int = 4, block_size: int = 64) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.1), nn.Dropout(0.1)
        self.ln = nn.LayerNorm(width)
        self.register_buffer("bias", torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(self.ln(x)).split(c, dim=2)
        k = k.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        q = q.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        v = v.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return x + self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c)))


def _x(b: int = B, s: int = S, seed: int = 1) -> Tensor:
    return torch.randn(b, s, C, generator=torch.Generator().manual_seed(seed))


def test_nanogpt_buffer_is_causal() -> None:
    model = nn.Sequential(NanoGPTBlock(), NanoGPTBlock())
    result = lifted(model, _x())
    assert [(s.status, s.spec.causal, s.spec.scale, s.spec.empty_rows) for s in result.sites] == [("replaced", "top_left", 1 / math.sqrt(8), "nan")] * 2
    assert [s.name for s in result.sites] == ["0", "1"]
    assert all("test_models.py:" in s.source for s in result.sites)
    assert_same(model, result, _x())
    assert_same(model, result, _x(5, 33))
    assert result.folded == ("0.bias", "1.bias")


def test_nanogpt_buffer_with_one_entry_more_is_not_causal() -> None:
    model = NanoGPTBlock()
    model.bias[0, 0, 3, 7] = 1
    result = lifted(model, _x())
    assert result.sites[0].spec.causal is None
    assert_same(model, result, _x())
    assert_same(model, result, _x(1, 8))


class SelfAttention(nn.Module):
    def __init__(self, **call: object) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(C, 4, batch_first=True)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, **self.call)[0]


def test_multihead_attention() -> None:
    model = SelfAttention(need_weights=False)
    result = lifted(model, _x())
    assert [s.status for s in result.sites] == ["replaced"]
    assert result.sites[0].spec.dims.Hq.value == 4
    assert_same(model, result, _x(3, 17))


def test_multihead_attention_whose_weights_are_dropped_is_replaced() -> None:
    """need_weights is on by default, and nobody reads them here."""
    model = SelfAttention()
    result = lifted(model, _x())
    assert [s.status for s in result.sites] == ["replaced"]
    assert_same(model, result, _x(3, 17))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(C, 4, batch_first=True)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        s = x.shape[1]
        ahead = torch.ones(s, s, dtype=torch.bool).triu(1)
        return self.attn(x, x, x, key_padding_mask=padded, attn_mask=ahead, need_weights=False)[0]


def test_multihead_attention_with_padding_and_a_mask() -> None:
    model = Padded()
    padded = torch.zeros(B, S, dtype=torch.bool)
    padded[0, -3:] = True
    result = lifted(model, _x(), padded)
    spec = result.sites[0].spec
    assert (spec.causal, spec.key_padding) == ("top_left", True)
    assert_same(model, result, _x(), padded)
    assert_same(model, result, _x(3, 17), torch.rand(3, 17) > 0.8)


def test_transformer_encoder() -> None:
    layer = nn.TransformerEncoderLayer(C, 4, 2 * C, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    result = lifted(model, _x())
    assert [s.status for s in result.sites] == ["replaced"] * 2
    assert_same(model, result, _x(3, 17))


class CausalEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(C, 4, 2 * C, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]), is_causal=True)


def test_transformer_encoder_with_a_causal_mask() -> None:
    model = CausalEncoder()
    result = lifted(model, _x())
    assert [(s.status, s.spec.causal) for s in result.sites] == [("replaced", "top_left")] * 2
    assert_same(model, result, _x(3, 17))


class Cross(nn.Module):
    """Queries from one sequence, keys and values from another, the mask aligned to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(C, C), nn.Linear(C, 2 * C)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        b, s, _ = x.shape
        t = y.shape[1]
        q = self.q(x).view(b, s, 4, 8).permute(0, 2, 1, 3)
        k, v = self.kv(y).view(b, t, 2, 4, 8).permute(2, 0, 3, 1, 4)
        ahead = torch.ones(s, t, dtype=torch.bool).triu(t - s + 1)
        w = (q @ k.mT).masked_fill(ahead, float("-inf"))
        return (w.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_cross_attention_is_causal_from_the_bottom_right() -> None:
    model = Cross()
    result = lifted(model, _x(), _x(B, S + 5, 2))
    assert (result.sites[0].status, result.sites[0].spec.causal) == ("replaced", "bottom_right")
    assert_same(model, result, _x(), _x(B, S + 5, 2))
    assert_same(model, result, _x(3, 4), _x(3, 31, 2))


class Pooling(nn.Module):
    """A learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 3, C))
        self.kv = nn.Linear(C, 2 * C)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, dim=-1)
        return (self.query @ k.mT * 0.1).softmax(-1) @ v


def test_pooling_with_a_learned_query() -> None:
    model = Pooling()
    result = lifted(model, _x())
    assert [s.status for s in result.sites] == ["replaced"]
    assert_same(model, result, _x(3, 17))


class NumberMask(nn.Module):
    """The old way to pad: an integer mask, taken from one and scaled."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x @ x.mT * 0.2 + (1.0 - mask[:, None, :].float()) * -1e9).softmax(-1) @ x


def test_an_integer_mask_that_is_used_as_a_number_stays_a_number() -> None:
    """Nothing says that it holds only 0 and 1, and a 2 in it means something else than a 1."""
    model = NumberMask()
    mask = torch.ones(B, S, dtype=torch.long)
    mask[0, -4:] = 0
    result = lifted(model, _x(), mask)
    assert (result.sites[0].status, result.sites[0].spec.key_padding) == ("replaced", False)
    assert_same(model, result, _x(), mask)
    mask[1, 3] = 2
    with torch.no_grad():
        assert torch.allclose(result.graph_module(_x(), mask), model(_x(), mask), rtol=1e-4, atol=1e-4)


class Reversed(nn.Module):
    """``.T`` of a tensor of three axes turns all of them around, not the last two."""

    def forward(self, x: Tensor) -> Tensor:
        k = x.permute(2, 1, 0).T  # x again
        return (x @ k.mT * 0.2).softmax(-1) @ x


def test_all_axes_turned_around() -> None:
    model = Reversed()
    result = lifted(model, _x())
    assert [s.status for s in result.sites] == ["replaced"]
    assert_same(model, result, _x(3, 17))


class LastRows(nn.Module):
    """A table that is longer than the sequence, of which the last rows and columns are taken, by a negative symbolic start."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(40, 40, generator=torch.Generator().manual_seed(4)))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        return (x @ x.mT * 0.3 + self.table[-n:, -n:]).softmax(-1) @ x


def test_a_slice_that_starts_a_symbolic_number_before_the_end() -> None:
    model = LastRows()
    x = torch.randn(2, 9, 8)
    result = lifted(model, x)
    assert [s.status for s in result.sites] == ["replaced"]
    assert_same(model, result, x)
    assert_same(model, result, torch.randn(3, 21, 8))
