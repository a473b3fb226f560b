"""A Llama-style decoder in plain PyTorch: rotary positions, grouped key/value heads, a causal mask and a padding mask.

The attention is written out the way most model code has it: keys and values repeated for each query head, a dense mask
added to the scores, a softmax, a product with the values. Run it through the optimizer with

    attnopt optimize examples/llama.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    vocabulary: int = 2048
    layers: int = 4
    width: int = 256
    hidden: int = 512
    heads: int = 8
    kv_heads: int = 2
    rope_base: float = 10_000.0

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        kv_width = config.kv_heads * config.head_size
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, kv_width, bias=False)
        self.v_proj = nn.Linear(config.width, kv_width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        B, S, _ = x.shape
        c = self.config
        q = self.q_proj(x).view(B, S, c.heads, c.head_size).transpose(1, 2)
        k = self.k_proj(x).view(B, S, c.kv_heads, c.head_size).transpose(1, 2)
        v = self.v_proj(x).view(B, S, c.kv_heads, c.head_size).transpose(1, 2)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        groups = c.heads // c.kv_heads
        k, v = (t[:, :, None].expand(B, c.kv_heads, groups, S, c.head_size).reshape(B, c.heads, S, c.head_size) for t in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(c.head_size)
        weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(B, S, c.width))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_norm, self.post_norm = RMSNorm(config.width), RMSNorm(config.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_norm(x), cos, sin, mask)
        return x + self.mlp(self.post_norm(x))


class Llama(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, S, vocabulary] of tokens [B, S]; ``attention_mask`` [B, S] is 1 for tokens and 0 for padding."""
        x = self.embed(input_ids)
        S = input_ids.shape[1]
        position = torch.arange(S, device=x.device)
        frequency = self.config.rope_base ** (-torch.arange(0, self.config.head_size, 2, device=x.device).float() / self.config.head_size)
        angle = (position[:, None].float() * frequency).repeat(1, 2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        visible = (position[None, :] <= position[:, None]) & attention_mask[:, None, None, :].bool()
        mask = torch.zeros(visible.shape, dtype=x.dtype, device=x.device).masked_fill(~visible, torch.finfo(x.dtype).min)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.lm_head(self.norm(x))


def model(layers: int = Config.layers) -> Llama:
    torch.manual_seed(0)
    return Llama(Config(layers=layers)).eval()


def example_inputs(batch: int = 2, length: int = 1024) -> dict[str, Tensor]:
    """Random tokens; the last row ends in padding."""
    generator = torch.Generator().manual_seed(0)
    attention_mask = torch.ones(batch, length, dtype=torch.int64)
    attention_mask[-1, length * 3 // 4 :] = 0
    return {"input_ids": torch.randint(0, Config.vocabulary, (batch, length), generator=generator), "attention_mask": attention_mask}
