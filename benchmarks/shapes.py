"""The models of ``models.py``: published shapes with random weights, cut to some layers where the whole does not fit one GPU.

Bare models without a head on top, so that a time is that of the layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """One model at one input. ``config`` holds arguments of the class ``kind``'s configuration."""

    name: str
    kind: str
    """transformers' model type."""
    model_class: str
    B: int
    S: int
    config: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)
    """What to replace for a CPU."""
    ragged: bool = False
    """With an attention_mask of uneven lengths."""
    remark: str = ""

    def model(self, implementation: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The same weights for every implementation, made on the device."""
        import transformers

        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(self.kind, **self.config)
        with torch.device(device):
            made: nn.Module = getattr(transformers, self.model_class)._from_config(config, attn_implementation=implementation, dtype=dtype)
        # transformers keeps some weights in float32, T5's wo among them: most of the time of a bf16 T5 then goes to one float32 product
        return made.to(dtype).eval().requires_grad_(False)

    def inputs(self, device: torch.device) -> dict[str, Any]:
        g = torch.Generator().manual_seed(0)
        found: dict[str, Any] = {"input_ids": torch.randint(3, self.config["vocab_size"], (self.B, self.S), generator=g).to(device)}
        if self.ragged:
            lengths = torch.randint(self.S // 8, self.S + 1, (self.B,), generator=g)
            lengths[0] = self.S
            found["attention_mask"] = (torch.arange(self.S) < lengths[:, None]).long().to(device)
        if self.kind not in ("bert", "t5"):
            found["use_cache"] = False
        return found


_LLAMA_8B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8}
_LLAMA_8B |= {"max_position_embeddings": 8192, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GEMMA_2B = {"vocab_size": 32000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
_GEMMA_2B |= {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "max_position_embeddings": 8192}
_GEMMA_2B |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT_LARGE = {
    "vocab_size": 30522,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 512,
}
_T5_LARGE = {"vocab_size": 32128, "d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "pad_token_id": 0, "eos_token_id": 1}
_GPT2_MEDIUM = {"vocab_size": 32000, "n_positions": 1024, "n_embd": 1024, "n_layer": 24, "n_head": 16, "bos_token_id": 1, "eos_token_id": 2}
_BLOOM_7B = {"vocab_size": 32000, "hidden_size": 4096, "n_layer": 8, "n_head": 32, "bos_token_id": 1, "eos_token_id": 2}

_SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL_GROUPED = {**_SMALL, "num_key_value_heads": 2}

SHAPES = [
    Shape("llama-s8192", "llama", "LlamaModel", 1, 8192, _LLAMA_8B, _SMALL_GROUPED, remark="Llama-8B shape, 8 layers"),
    Shape("llama-s2048", "llama", "LlamaModel", 4, 2048, _LLAMA_8B, _SMALL_GROUPED, remark="Llama-8B shape, 8 layers"),
    Shape(
        "mistral",
        "mistral",
        "MistralModel",
        1,
        8192,
        {**_LLAMA_8B, "sliding_window": 1024},
        {**_SMALL_GROUPED, "sliding_window": 16},
        remark="Mistral-7B shape, 8 layers, window 1024",
    ),
    Shape(
        "gemma2",
        "gemma2",
        "Gemma2Model",
        2,
        4096,
        _GEMMA_2B,
        {**_SMALL_GROUPED, "head_dim": 16, "sliding_window": 16},
        remark="Gemma-2-2B shape, 8 layers, softcap 50, window 4096 in every other layer",
    ),
    Shape(
        "bloom",
        "bloom",
        "BloomModel",
        4,
        2048,
        _BLOOM_7B,
        {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        remark="Bloom-7B1 shape, 8 layers, ALiBi",
    ),
    Shape("gpt2-medium", "gpt2", "GPT2Model", 16, 1024, _GPT2_MEDIUM, {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}, remark="GPT-2 medium"),
    Shape("bert-large", "bert", "BertModel", 64, 512, _BERT_LARGE, _SMALL, ragged=True, remark="BERT-large, lengths from 64 to 512"),
    Shape(
        "t5-large-encoder",
        "t5",
        "T5EncoderModel",
        4,
        2048,
        _T5_LARGE,
        {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
        remark="T5-large, encoder",
    ),
]
BY_NAME = {s.name: s for s in SHAPES}
