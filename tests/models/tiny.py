"""Tiny randomly initialised models of the transformers library, eager attention, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

VOCAB = 128
B, S = 2, 24
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
Inputs = Callable[[bool, int, int], dict[str, Any]]


def text(mask: bool, b: int, s: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(b * 1000 + s)
    out: dict[str, Any] = {"input_ids": torch.randint(3, VOCAB - 1, (b, s), generator=g)}
    if mask:
        out["attention_mask"] = torch.ones(b, s, dtype=torch.long)
        out["attention_mask"][0, s - s // 4 :] = 0
    return out


def cached(mask: bool, b: int, s: int) -> dict[str, Any]:
    return {**text(mask, b, s), "use_cache": False}


def seq2seq(mask: bool, b: int, s: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(b + s)
    return {**cached(mask, b, s), "decoder_input_ids": torch.randint(3, VOCAB - 1, (b, s // 2 + 1), generator=g)}


def image(mask: bool, b: int, s: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(b, 3, 32, 32, generator=torch.Generator().manual_seed(b))}


def speech(mask: bool, b: int, s: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(b + s)
    return {"input_features": torch.randn(b, 16, 128, generator=g), "decoder_input_ids": torch.randint(3, VOCAB - 1, (b, s), generator=g), "use_cache": False}


@dataclass(frozen=True)
class Tiny:
    """One architecture, and what every spec (or the spec of each kind of site, by a part of its name) must say."""

    auto: str
    sites: int
    inputs: Inputs
    expect: dict[str, dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    model_type: str = ""
    padded: bool = True
    """Whether it takes a padding mask."""
    padded_sites: str = ""
    """Which sites see the padding: those whose names hold this."""


CAUSAL = {"causal": "top_left", "window": (None, None), "groups": 1, "softcap": None, "bias": None}
FULL = {"causal": None, "window": (None, None), "groups": 1, "softcap": None, "bias": None}
TINY: dict[str, Tiny] = {
    "gpt2": Tiny("AutoModelForCausalLM", 2, cached, {"": CAUSAL}, {"vocab_size": VOCAB, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}),
    "llama": Tiny("AutoModelForCausalLM", 2, cached, {"": {**CAUSAL, "groups": 2}}, _GROUPED),
    "mistral": Tiny("AutoModelForCausalLM", 2, cached, {"": {**CAUSAL, "groups": 2, "window": (7, 0)}}, {**_GROUPED, "sliding_window": 8}),
    "qwen2": Tiny("AutoModelForCausalLM", 2, cached, {"": {**CAUSAL, "groups": 2}}, _GROUPED),
    "gemma2": Tiny(
        "AutoModelForCausalLM",
        2,
        cached,
        {"layers.0": {**CAUSAL, "groups": 2, "softcap": 50.0, "window": (7, 0)}, "layers.1": {**CAUSAL, "groups": 2, "softcap": 50.0}},
        {**_GROUPED, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0},
    ),
    "bloom": Tiny("AutoModelForCausalLM", 2, cached, {"": {"causal": "top_left", "alibi": True, "softcap": None, "groups": 1}}, {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon": Tiny(
        "AutoModelForCausalLM",
        2,
        cached,
        {"": {**CAUSAL, "groups": 4}},
        {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True, "bias": False, "new_decoder_architecture": False, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "bert": Tiny("AutoModel", 2, text, {"": FULL}, _COMMON),
    "roberta": Tiny("AutoModel", 2, text, {"": FULL}, {**_COMMON, "max_position_embeddings": 260}),
    "vit": Tiny("AutoModel", 2, image, {"": FULL}, {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 4}, padded=False),
    "t5": Tiny(
        "AutoModelForSeq2SeqLM",
        6,
        seq2seq,
        {
            "encoder.": {"causal": None, "softcap": None, "groups": 1, "alibi": False},
            "layer.0.SelfAttention": {"alibi": False},
            "decoder.block.0.layer.0": {"causal": "top_left"},
            "EncDecAttention": FULL,
        },
        {"vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 32, "decoder_start_token_id": 0},
        padded_sites="enc",
    ),
    "bart": Tiny("AutoModelForSeq2SeqLM", 6, seq2seq, {"encoder.": FULL, "decoder.layers.0.self_attn": CAUSAL, "encoder_attn": FULL}, _SEQ2SEQ, padded_sites="encoder"),
    "whisper": Tiny(
        "AutoModelForSpeechSeq2Seq",
        6,
        speech,
        {"encoder.": FULL, "decoder.layers.0.self_attn": CAUSAL, "encoder_attn": FULL},
        {**_SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 64, "max_target_positions": 64, "suppress_tokens": None, "begin_suppress_tokens": None},
        padded=False,
    ),
}


def build(name: str) -> nn.Module:
    import transformers

    tiny = TINY[name]
    config = transformers.AutoConfig.for_model(tiny.model_type or name, **tiny.config)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, tiny.auto).from_config(config, attn_implementation="eager")
    return model.eval()
