"""Models of benchmarks/onnx_export.py: two layers of each architecture, eight heads of 64, random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, KV_HEADS = 1000, 512, 8, 2
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 4100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_TEXT, "num_key_value_heads": KV_HEADS, "head_dim": 64}
_GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": 4100, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "bos_token_id": 1, "eos_token_id": 2}
_PAIR: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024,
    "max_position_embeddings": 4100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_IMAGE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "image_size": 512,
    "patch_size": 16,
}
_SMALL = {k: v for k, v in _TEXT.items() if k != "intermediate_size"}


@dataclass(frozen=True)
class Model:
    """``sites``: how many attentions it computes. ``causal_gqa``: all of them causal, with fewer KV heads than query heads."""

    kind: str
    cls: str
    config: dict[str, Any]
    sites: int = 2
    inputs: Callable[[int, int], dict[str, Tensor]] | None = None
    causal_gqa: bool = False
    large: bool = False
    """A run takes gigabytes."""
    experts: str | None = None
    """What torch.onnx.export needs of a mixture of experts: it has no translation of the library's default, which users have and attnopt exports."""
    optimizer: str = "bert"
    """The model type of onnxruntime.transformers.optimizer that is nearest."""

    def build(self, attention: str, experts: str | None = None) -> nn.Module:
        """``experts``: the implementation of experts, where that is not to be the library's default."""
        import transformers

        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(self.kind, **self.config)
        chosen = getattr(transformers, self.cls)
        make = chosen.from_config if self.cls.startswith("Auto") else chosen._from_config
        model: nn.Module = make(config, attn_implementation=attention)
        model.config.use_cache = False
        if experts is not None:
            model.set_experts_implementation(experts)  # type: ignore[operator]
        return model.eval()

    def example(self, batch: int, length: int) -> dict[str, Tensor]:
        return (self.inputs or text)(batch, length)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def text(batch: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(batch, length), "attention_mask": torch.ones(batch, length, dtype=torch.long)}


def pair(batch: int, length: int) -> dict[str, Tensor]:
    return {**text(batch, length), "decoder_input_ids": tokens(batch, length)}


def image(batch: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 512, 512, generator=torch.Generator().manual_seed(1))}


def both(batch: int, length: int) -> dict[str, Tensor]:
    return {**text(batch, length), **image(batch, length)}


def speech(batch: int, length: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(batch, 16, 3000, generator=torch.Generator().manual_seed(1)), "decoder_input_ids": tokens(batch, length)}


def _decoder(kind: str, config: dict[str, Any], causal_gqa: bool = False, optimizer: str = "gpt2") -> Model:
    return Model(kind, "AutoModelForCausalLM", config, causal_gqa=causal_gqa, optimizer=optimizer)


_SPEECH = {**_PAIR, "num_mel_bins": 16, "max_source_positions": 1500, "max_target_positions": 4100, "suppress_tokens": None, "begin_suppress_tokens": None}
_T5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 64, "d_ff": 1024, "num_layers": 2, "num_heads": HEADS, "decoder_start_token_id": 0}
_WINDOWED = {**_GROUPED, "sliding_window": 512}
_CAPPED = {**_WINDOWED, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 50.0}
_SINKS = {**_WINDOWED, "layer_types": ["sliding_attention", "full_attention"], "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 256}

MODELS: dict[str, Model] = {
    "gpt2": _decoder("gpt2", _GPT),
    "llama": _decoder("llama", _GROUPED, causal_gqa=True),
    "mistral": _decoder("mistral", _WINDOWED, causal_gqa=True),
    "qwen3": _decoder("qwen3", _GROUPED, causal_gqa=True),
    "gemma2": _decoder("gemma2", _CAPPED, causal_gqa=True),
    "bloom": _decoder("bloom", {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 2, "n_head": HEADS}),
    "falcon": _decoder("falcon", {**_SMALL, "multi_query": True, "bias": False, "new_decoder_architecture": False}, causal_gqa=True),
    "gpt_oss": replace(_decoder("gpt_oss", _SINKS, causal_gqa=True), large=True, experts="batched_mm"),
    "bert": Model("bert", "AutoModel", _TEXT),
    "roberta": Model("roberta", "AutoModel", _TEXT),
    "vit": Model("vit", "AutoModel", _IMAGE, inputs=image, optimizer="vit"),
    "clip": Model("clip", "AutoModel", {"text_config": _TEXT, "vision_config": _IMAGE, "projection_dim": WIDTH}, 4, both, optimizer="clip"),
    "t5": Model("t5", "AutoModelForSeq2SeqLM", _T5, 6, pair, optimizer="t5"),
    "bart": Model("bart", "AutoModelForSeq2SeqLM", _PAIR, 6, pair, optimizer="bart"),
    "whisper": Model("whisper", "AutoModelForSpeechSeq2Seq", _SPEECH, 6, speech, optimizer="bart"),
}
