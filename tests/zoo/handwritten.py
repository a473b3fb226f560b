"""Attention as people write it by hand: one model, many spellings of its scores, masks and products.

Every spelling has an ``eager`` form; those that PyTorch's fused attention can say have an ``sdpa`` form beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.case import Case, Facts, says, some
from zoo.data import VOCAB, padding, tokens

DIM, HEADS, SIZE, LONGEST = 64, 4, 16, 256


class Heads(nn.Module):
    """Projections to heads [b, h, s, d] and back; the attention itself is a subclass's."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.q, self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, kv_heads * SIZE), nn.Linear(DIM, kv_heads * SIZE)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (p(y).unflatten(-1, (-1, SIZE)).transpose(1, 2) for p, y in ((self.q, x), (self.k, source), (self.v, source)))
        return self.out(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError


class Model(nn.Module):
    """Tokens to logits through two blocks."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCAB, DIM), nn.Embedding(LONGEST, DIM)
        self.attention = nn.ModuleList([attention() for _ in range(2)])
        self.norm = nn.ModuleList([nn.LayerNorm(DIM) for _ in range(4)])
        self.mlp = nn.ModuleList([nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)) for _ in range(2)])
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for i, attention in enumerate(self.attention):
            x = x + attention(self.norm[2 * i](x), mask, context)
            x = x + self.mlp[i](self.norm[2 * i + 1](x))
        logits: Tensor = self.head(x)
        return logits


# ---- spellings


class Gpt(Heads):
    """nanoGPT: one projection, a registered triangle, -inf."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.register_buffer("bias", torch.tril(torch.ones(LONGEST, LONGEST)).view(1, 1, LONGEST, LONGEST))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.qkv(x).split(DIM, dim=2)
        q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in (q, k, v))
        if self.form == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.1 if self.training else 0, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
            y = self.dropout(F.softmax(att, dim=-1)) @ v
        return self.out(y.transpose(1, 2).contiguous().view(b, t, c))


class Llama(Heads):
    """LLaMA: rotary embedding in complex numbers, keys and values repeated, softmax in float32, an additive triangle."""

    def __init__(self, form: str) -> None:
        super().__init__(kv_heads=2)
        self.form = form

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n = q.shape[2]
        frequency = 1.0 / 10000.0 ** (torch.arange(0, SIZE, 2).float() / SIZE)
        angle = torch.outer(torch.arange(n), frequency)
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (torch.view_as_real(torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * turn).flatten(3).type_as(x) for x in (q, k))
        k, v = (torch.repeat_interleave(x, HEADS // self.kv_heads, dim=1) for x in (k, v))
        triangle = torch.triu(torch.full((n, n), float("-inf")), diagonal=1).type_as(q)
        if self.form == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=triangle)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(SIZE)
        return torch.matmul(F.softmax((scores + triangle).float(), dim=-1).type_as(q), v)


class Alibi(Heads):
    """ALiBi: a slope for each head times the distance, added to the scores."""

    def __init__(self, form: str, relative: bool) -> None:
        super().__init__()
        self.form, self.relative = form, relative
        self.register_buffer("slopes", torch.tensor([2.0 ** (-8 * (i + 1) / HEADS) for i in range(HEADS)]).view(HEADS, 1, 1), persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n = q.shape[2]
        position = torch.arange(n)
        distance = position[None, :] - position[:, None] if self.relative else position[None, :]
        bias = self.slopes * distance
        hidden = torch.full((n, n), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
        if mask is not None:
            hidden = hidden + (1.0 - (mask[:, None, None, :] > 0).to(q.dtype)) * torch.finfo(q.dtype).min
        if self.form == "sdpa":
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=(bias + hidden.clamp_min(torch.finfo(q.dtype).min)).to(q.dtype).expand(q.shape[0], HEADS, n, n)
            )
        scores = torch.baddbmm(
            bias.to(q.dtype).expand(q.shape[0], HEADS, n, n).flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=1.0, alpha=SIZE**-0.5
        )
        weights = F.softmax(scores.unflatten(0, (-1, HEADS)) + hidden, dim=-1)
        return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (-1, HEADS))


class T5(Heads):
    """T5: no scale, and a learnt bias for each bucket of distances, logarithmic far away."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.table = nn.Embedding(8, HEADS)

    def buckets(self, distance: Tensor) -> Tensor:
        behind, far = (distance > 0).long() * 4, distance.abs()
        large = 2 + (torch.log(far.float() / 2) / math.log(32 / 2) * 2).long()
        return behind + torch.where(far < 2, far, torch.minimum(large, torch.full_like(large, 3)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n = q.shape[2]
        bias = self.table(self.buckets(torch.arange(n)[None, :] - torch.arange(n)[:, None])).permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            bias = bias + (1.0 - (mask[:, None, None, :] > 0).to(q.dtype)) * torch.finfo(q.dtype).min
        if self.form == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(q.shape[0], -1, -1, -1), scale=1.0)
        return torch.einsum("bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) + bias).softmax(-1), v)


class Prefix(Heads):
    """A prefix of 8 tokens that all see, causal after it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        seen = (j <= i) | (j < 8)
        if self.form == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return (q @ k.mT / 4).where(seen, -torch.inf).softmax(-1) @ v


class Documents(Heads):
    """Packed documents: tokens see earlier ones of their own document. ``mask`` holds each token's document."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        n = q.shape[2]
        seen = (mask[:, :, None] == mask[:, None, :]) & torch.ones(n, n, dtype=torch.bool).tril()
        if self.form == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
        return (q @ k.transpose(-1, -2) * SIZE**-0.5).masked_fill(~seen[:, None], torch.finfo(q.dtype).min).softmax(-1) @ v


class Capped(Heads):
    """Normalised queries and keys, a soft cap, a window, and both masks at once."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n = q.shape[2]
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = 20 * torch.tanh(q @ k.mT * 10 / 20)
        i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
        scores = scores.masked_fill(j > i, -torch.inf).masked_fill(i - j >= 16, -torch.inf)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, -torch.inf)
        return scores.softmax(-1).nan_to_num(0.0) @ v


class Sinks(Heads):
    """One learnt logit for each head beside the keys."""

    def __init__(self, term: bool) -> None:
        super().__init__()
        self.term = term
        self.sink = nn.Parameter(torch.randn(HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n = q.shape[2]
        scores = (q @ k.mT / 4).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        sink = self.sink.view(1, HEADS, 1, 1).expand(q.shape[0], -1, n, 1)
        if self.term:
            top = torch.maximum(scores.amax(-1, keepdim=True), sink)
            weight = torch.exp(scores - top)
            return (weight / (weight.sum(-1, keepdim=True) + torch.exp(sink - top))) @ v
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


class Exponential(Heads):
    """Softmax spelled as exp and sum, divided after the product with the values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = torch.matmul(q / 2, k.transpose(2, 3) / 2)
        if mask is not None:
            scores = scores + torch.where(mask[:, None, None, :].bool(), 0.0, -1e9)
        weight = (scores - scores.amax(-1, keepdim=True)).exp()
        return weight @ v / weight.sum(-1, keepdim=True)


class Cross(Heads):
    """Queries from the tokens, keys and values from a context of another length."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        seen = None if mask is None else mask[:, None, None, :].bool()
        if self.form == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * SIZE**-0.5
        return torch.einsum("bhqk,bhkd->bhqd", (scores if seen is None else scores.masked_fill(~seen, -1e9)).softmax(-1), v)


# ---- cases


def _inputs(padded: bool, b: int, s: int) -> dict[str, Any]:
    return {"tokens": tokens(b, s), **({"mask": padding(b, s)} if padded else {})}


def _documents(padded: bool, b: int, s: int) -> dict[str, Any]:
    starts = (tokens(b, s, 2) % 16 == 0).long()
    return {"tokens": tokens(b, s), "mask": starts.cumsum(1)}


def _context(padded: bool, b: int, s: int) -> dict[str, Any]:
    n = s // 2 + 5
    return {
        "tokens": tokens(b, s),
        "context": torch.randn(b, n, DIM, generator=torch.Generator().manual_seed(s)),
        **({"mask": padding(b, n)} if padded else {}),
    }


def _case(
    name: str,
    attention: Callable[[str], Heads],
    facts: Facts,
    forms: tuple[str, ...] = ("eager", "sdpa"),
    inputs: Callable[[bool, int, int], dict[str, Any]] = _inputs,
    **more: Any,
) -> Case:
    def build(form: str) -> nn.Module:
        torch.manual_seed(0)
        return Model(lambda: attention(form)).eval()

    return Case(name, "hand-written", build, inputs, 2, {"": facts}, forms, **more)


_CAUSAL: Facts = {"causal": "top_left"}
SPELLED_OUT = ("eager",)
CASES = [
    _case("hand_gpt", Gpt, _CAUSAL, padded=False),
    _case("hand_llama", Llama, {**_CAUSAL, "groups": 2}, padded=False),
    _case("hand_alibi", lambda form: Alibi(form, False), {**_CAUSAL, "alibi": True, "bias": some}),
    _case("hand_alibi_relative", lambda form: Alibi(form, True), {**_CAUSAL, "alibi": True, "bias": some}),
    _case("hand_t5", T5, {"bias": says("[", "log(", "h]"), "scale": 1.0}),
    _case("hand_prefix", Prefix, {"words": ("prefix",)}, padded=False),
    _case("hand_documents", Documents, {**_CAUSAL, "document": True}, padded=False, inputs=_documents),
    _case("hand_capped", lambda form: Capped(), {**_CAUSAL, "window": (15, 0), "softcap": 20.0}, SPELLED_OUT),
    _case("hand_sink_logit", lambda form: Sinks(False), {**_CAUSAL, "sinks": True}, SPELLED_OUT, padded=False),
    _case("hand_sink_term", lambda form: Sinks(True), {**_CAUSAL, "sinks": True}, SPELLED_OUT, padded=False),
    _case("hand_exp", lambda form: Exponential(), {}, SPELLED_OUT),
    _case("hand_cross", Cross, {}, inputs=_context),
]
