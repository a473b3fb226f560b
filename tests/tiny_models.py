"""Small models for tests of capture, emission and the API: hand-written ones, and tiny random transformers models."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 61
LENGTH = 64


class Attention(nn.Module):
    """Causal attention with a mask in a non-persistent buffer, as nanoGPT writes it."""

    def __init__(self, width: int = 32, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH).tril().view(1, 1, LENGTH, LENGTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        q, k, v = (t.view(b, s, self.heads, c // self.heads).transpose(1, 2) for t in self.qkv(x).split(c, dim=2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(c // self.heads)
        scores = scores.masked_fill(self.mask[:, :, :s, :s] == 0, float("-inf"))
        return self.out((self.dropout(F.softmax(scores, dim=-1)) @ v).transpose(1, 2).reshape(b, s, c))


class Block(nn.Module):
    def __init__(self, width: int, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        self.norm, self.attention, self.dropout = nn.LayerNorm(width), Attention(width, dropout=attention_dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.attention(self.norm(x)))


class TinyGPT(nn.Module):
    """Tied embeddings, learned positions, a persistent and a non-persistent buffer."""

    def __init__(self, layers: int = 2, width: int = 32, attention_dropout: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.settings = {"width": width}
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, attention_dropout, dropout) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        if weights is not None:
            x = x * weights[..., None]
        return self.head(x) / self.temperature


def tiny_gpt(**options: Any) -> TinyGPT:
    torch.manual_seed(0)
    return TinyGPT(**options).eval()


def ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))


_TEXT = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
_TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
_PAIR = {"vocab_size": 128, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128}
_PAIR |= {"decoder_ffn_dim": 128, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("AutoModelForCausalLM", {**_TEXT, "num_key_value_heads": 2}),
    "bert": ("AutoModel", _TEXT),
    "gpt2": ("AutoModelForCausalLM", {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2}),
    "vit": ("AutoModel", {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}),
    "bart": ("AutoModelForSeq2SeqLM", _PAIR),
    "whisper": ("AutoModelForSpeechSeq2Seq", {**_PAIR, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64, "suppress_tokens": None, "begin_suppress_tokens": None}),
    "longformer": ("AutoModel", {**_TEXT, "attention_window": [16, 16]}),
}


def hf_model(kind: str) -> nn.Module:
    """A tiny random transformers model with eager attention."""
    import transformers

    torch.manual_seed(0)
    auto, settings = _CONFIGS[kind]
    model: nn.Module = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(kind, **settings), attn_implementation="eager")
    return model.eval()


def hf_inputs(kind: str, batch: int = 2, length: int = 24) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    if kind == "vit":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    if kind == "whisper":
        return {
            "input_features": torch.randn(batch, 16, 64, generator=generator),
            "decoder_input_ids": torch.randint(3, 120, (batch, length), generator=generator),
            "use_cache": False,
        }
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - length // 4 :] = 0
    inputs: dict[str, Any] = {"input_ids": torch.randint(3, 120, (batch, length), generator=generator), "attention_mask": mask}
    if kind == "bart":
        inputs["decoder_input_ids"] = torch.randint(3, 120, (batch, length // 2 + 1), generator=generator)
    if kind not in ("bert", "longformer"):
        inputs["use_cache"] = False
    return inputs
