"""Tiny random decoders that are served, and how each generates by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 128
_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
_TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GQA = {"num_key_value_heads": 2}
_GPT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
_MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
_MLA |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {**_GPT, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "opt": {**_GPT, "hidden_size": 64, "num_hidden_layers": 2, "ffn_dim": 128, "num_attention_heads": 4, "max_position_embeddings": 256, "word_embed_proj_dim": 64, "pad_token_id": 0},
    "gpt_neo": {**_GPT, "max_position_embeddings": 256, "hidden_size": 64, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4, "window_size": 16},
    "gpt_neox": _TEXT,
    "bloom": {**_GPT, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {**_GPT, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "falcon": {**_GPT, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True, "bias": False, "new_decoder_architecture": False},
    "llama": {**_TEXT, **_GQA},
    "mistral": {**_TEXT, **_GQA, "sliding_window": 16},
    "mixtral": {**_TEXT, **_GQA, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {**_TEXT, **_GQA, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0},
    "gpt_oss": {
        **_TEXT, **_GQA, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v3": {**_TEXT, **_MLA},
    "deepseek_v2": {**_TEXT, **_MLA},
    "llama4_text": {**_TEXT, **_GQA, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128, "attention_chunk_size": 16},
}  # fmt: skip


_PAIR = {"vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128}
_PAIR |= {"decoder_ffn_dim": 128, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "AutoModelForSeq2SeqLM",
        {
            "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 32, "decoder_start_token_id": 0,
        },
    ),
    "bart": ("AutoModelForSeq2SeqLM", _PAIR),
    "whisper": (
        "AutoModelForSpeechSeq2Seq",
        {**_PAIR, "num_mel_bins": 16, "max_source_positions": 64, "max_target_positions": 64, "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
}  # fmt: skip
"""Encoder-decoders: the class, and the configuration."""


def transformers_model(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    auto, settings = PAIRS[kind] if kind in PAIRS else ("AutoModelForCausalLM", CONFIGS[kind])
    config = transformers.AutoConfig.for_model(kind, **settings)
    model: nn.Module = getattr(transformers, auto).from_config(config, attn_implementation="eager").eval()
    return sharpened(model, norms=kind == "bart")


def sharpened(model: nn.Module, norms: bool = False) -> nn.Module:
    """Larger weights in all but the embeddings: a freshly made tiny model repeats its last token whatever stands before it.

    With ``norms`` those of norms are scattered too, for models that normalise after each layer.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2 and id(p) not in embeddings:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        for m in model.modules():
            if norms and isinstance(m, nn.LayerNorm):
                m.weight.copy_(1.0 + torch.randn(m.weight.shape, generator=generator))
    return model


def transformers_generate(model: Any, prompt: Sequence[int], new_tokens: int) -> list[int]:
    from transformers import GenerationConfig

    model.generation_config.eos_token_id = None  # else it stops there, whatever the config of the call says
    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, use_cache=True)
    ids = torch.tensor([list(prompt)])
    out: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :].tolist()
    return out


def transformers_translate(model: Any, source: Tensor, new_tokens: int) -> list[int]:
    """What an encoder-decoder makes of one source [1, ...], its start token included."""
    from transformers import GenerationConfig

    for name in ("eos_token_id", "forced_eos_token_id"):
        setattr(model.generation_config, name, None)
    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, use_cache=True, decoder_start_token_id=model.config.decoder_start_token_id)
    more = {} if source.is_floating_point() else {"attention_mask": torch.ones_like(source)}
    out: list[int] = model.generate(source, generation_config=config, **more)[0].tolist()
    start = [model.config.decoder_start_token_id] if len(out) == new_tokens else []  # some leave it out
    return start + out


def transformers_continue(model: Any, source: Tensor, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """What an encoder-decoder makes of one source [1, n] when its text begins with ``prompt``, the start token included."""
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, use_cache=True, decoder_start_token_id=model.config.decoder_start_token_id)
    ids = torch.tensor([list(prompt)])
    out: list[int] = model.generate(source, attention_mask=torch.ones_like(source), decoder_input_ids=ids, generation_config=config)[0].tolist()
    assert out[: len(prompt)] == list(prompt)
    return out[len(prompt) :]


def source(kind: str, length: int) -> Tensor:
    """One input of an encoder."""
    generator = torch.Generator().manual_seed(length)
    return torch.randn(1, 16, 128, generator=generator) if kind == "whisper" else torch.randint(3, VOCABULARY, (1, length), generator=generator)


def example(length: int = 24) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(5)), "use_cache": False}


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


# ---- by hand


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, longest: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.register_buffer("bias", torch.tril(torch.ones(longest, longest)).view(1, 1, longest, longest))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in self.qkv(self.norm_1(x)).split(c, dim=2))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        y = torch.softmax(att, dim=-1) @ v
        x = x + self.out(y.transpose(1, 2).contiguous().view(b, t, c))
        return x + self.mlp(self.norm_2(x))


class HandWritten(nn.Module):
    """As people write a small GPT: learned positions, a registered triangle, and logits of all tokens or of the last alone."""

    def __init__(self, width: int = 32, longest: int = 64, last: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList([_Block(width, 4, longest) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.last = last

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(0, ids.size(1), dtype=torch.long, device=ids.device))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits: Tensor = self.head(x if self.last is None else self.last(x))
        return logits


def hand_written(last: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    torch.manual_seed(0)
    return sharpened(HandWritten(last=last).eval())


def plain_generate(model: nn.Module, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The whole text through the model for each token."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model(torch.tensor([text]))
            text.append(int((logits[0, -1] if logits.dim() == 3 else logits[0]).argmax()))
    return text[len(prompt) :]
