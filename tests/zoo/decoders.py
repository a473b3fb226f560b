"""Decoders of the transformers library."""

from __future__ import annotations

from typing import Any

from zoo.case import Case, Facts, some
from zoo.data import VOCAB, decoder_text
from zoo.hugging import ENDS, GPT, GROUPED, TEXT, auto

CAUSAL: Facts = {"causal": "top_left"}
GQA: Facts = {**CAUSAL, "groups": 2}
WINDOW: Facts = {"window": (15, 0)}
ALIBI: Facts = {**CAUSAL, "alibi": True, "bias": some}
SPELLED_OUT = ("eager",)


def _decoder(name: str, facts: Facts, config: dict[str, Any], *, model_type: str = "", forms: tuple[str, ...] = ("eager", "sdpa"), **layers: Facts) -> Case:
    """``layers``: further facts of single layers, by ``layer_0`` and so on."""
    expect = {"": facts, **{f".{key.removeprefix('layer_')}.": {**facts, **more} for key, more in layers.items()}}
    return Case(name, "decoder", auto(model_type or name, "AutoModelForCausalLM", **config), decoder_text, 2, expect, forms)


_WINDOWED = {**GROUPED, "sliding_window": 16}
_ALTERNATING = {**GROUPED, "head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_LATENT: dict[str, Any] = {
    **TEXT,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}

CASES = [
    _decoder("gpt2", CAUSAL, GPT),
    _decoder(
        "gpt_neo",
        {**CAUSAL, "scale": 1.0},
        {
            "vocab_size": VOCAB,
            "max_position_embeddings": 256,
            "hidden_size": 64,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 4,
            "window_size": 16,
            **ENDS,
        },
        forms=SPELLED_OUT,
        layer_1=WINDOW,
    ),
    _decoder("gpt_neox", CAUSAL, TEXT),
    _decoder("gptj", CAUSAL, {**GPT, "rotary_dim": 8}, forms=SPELLED_OUT),
    _decoder("codegen", CAUSAL, {**GPT, "n_ctx": 256, "rotary_dim": 8}, forms=SPELLED_OUT),
    _decoder("gpt_bigcode", {**CAUSAL, "groups": 4}, {**GPT, "multi_query": True}),
    _decoder(
        "opt",
        CAUSAL,
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "ffn_dim": 128,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 64,
        },
    ),
    _decoder("bloom", ALIBI, {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4}, forms=SPELLED_OUT),
    _decoder("mpt", ALIBI, {"vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}, forms=SPELLED_OUT),
    _decoder(
        "falcon",
        {**CAUSAL, "groups": 4},
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "multi_query": True,
            "bias": False,
            "new_decoder_architecture": False,
            **ENDS,
        },
    ),
    _decoder(
        "falcon_alibi",
        ALIBI,
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "multi_query": False,
            "alibi": True,
            "new_decoder_architecture": False,
            **ENDS,
        },
        model_type="falcon",
    ),
    _decoder("llama", GQA, GROUPED),
    _decoder("mistral", {**GQA, **WINDOW}, _WINDOWED),
    _decoder("mixtral", {**GQA, **WINDOW}, {**_WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    _decoder("qwen2", GQA, GROUPED),
    _decoder("qwen3", GQA, {**GROUPED, "head_dim": 16}),
    _decoder("qwen3_moe", GQA, {**GROUPED, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
    _decoder("gemma", GQA, {**GROUPED, "head_dim": 16}),
    _decoder(
        "gemma2",
        {**GQA, "softcap": 50.0},
        {**GROUPED, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0},
        forms=SPELLED_OUT,
        layer_0=WINDOW,
    ),
    _decoder("gemma3", GQA, {**_ALTERNATING, "query_pre_attn_scalar": 16}, model_type="gemma3_text", layer_0=WINDOW),
    _decoder("phi", CAUSAL, TEXT),
    _decoder("phi3", GQA, GROUPED),
    _decoder("stablelm", GQA, GROUPED),
    _decoder("starcoder2", {**GQA, **WINDOW}, _WINDOWED),
    _decoder("cohere", GQA, GROUPED),
    _decoder("gpt_oss", {**GQA, "sinks": True}, {**_ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2}, forms=SPELLED_OUT, layer_0=WINDOW),
    _decoder("deepseek_v2", CAUSAL, _LATENT),
    _decoder("deepseek_v3", CAUSAL, _LATENT),
    # One layer sees chunks of 16 tokens, the other all, with a temperature that grows with the position.
    _decoder(
        "llama4",
        GQA,
        {
            **GROUPED,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 128,
            "attention_chunk_size": 16,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
            "attn_temperature_tuning": True,
            "floor_scale": 8,
        },
        model_type="llama4_text",
        layer_0={"words": ("chunk",)},
    ),
]
