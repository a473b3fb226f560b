"""The rotary embeddings of transformers' models are recognised on queries and keys of every site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import attnopt
from attnopt.ir.rotary import Pairing

_SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_CLASSIC = {"vocab_size": 128, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1}
_LATENT = {
    **_SMALL,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (_GROUPED, "rotary"),
    "qwen3": ({**_GROUPED, "head_dim": 16}, "rotary"),
    "gemma2": ({**_GROUPED, "head_dim": 16, "sliding_window": 16}, "rotary"),
    "gpt_oss": ({**_GROUPED, **_EXPERTS, "head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}, "rotary"),
    "falcon": ({"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True, "new_decoder_architecture": False, "bias": False}, "rotary"),
    "modernbert": ({**_SMALL, "local_attention": 16, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}, "rotary"),
    "gpt_neox": (_SMALL, "rotary 4/16"),
    "phi": (_SMALL, "rotary 8/16"),
    "stablelm": (_GROUPED, "rotary 4/16"),
    "cohere": (_GROUPED, "rotary interleaved"),
    "gptj": (_CLASSIC, "rotary interleaved 8/16"),
    "codegen": ({**_CLASSIC, "n_ctx": 256}, "rotary interleaved 8/16"),
    "llama4_text": ({**_GROUPED, **_EXPERTS, "head_dim": 16, "intermediate_size_mlp": 128, "attention_chunk_size": 16}, "rotary interleaved"),
    "deepseek_v2": (_LATENT, "rotary interleaved 8 of features 16..24"),
    "deepseek_v3": (_LATENT, "rotary interleaved 8 of features 16..24"),
}


def build(name: str, config: dict[str, Any]) -> nn.Module:
    import transformers

    auto = transformers.AutoModel if "bert" in name else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model: nn.Module = auto.from_config(transformers.AutoConfig.for_model(name, **config), attn_implementation="eager")
    return model.eval()


def report(name: str, **inputs: torch.Tensor) -> attnopt.Report:
    ids = torch.randint(3, 127, (2, 24), generator=torch.Generator().manual_seed(1))
    config, _ = MODELS[name]
    cache = {} if "bert" in name else {"use_cache": False}
    return attnopt.inspect(build(name, config), None, kwargs={"input_ids": ids, **inputs, **cache})


@pytest.mark.parametrize("name", MODELS)
def test_rotary_of_every_site(name: str) -> None:
    sites = report(name).attentions
    assert len(sites) == 2
    for s in sites:
        form = s.spec.traits.rotary
        assert str(form) == MODELS[name][1]
        assert (form.positions, form.offset) == ("sequence", "0")
        assert form.target == (Pairing(0, 4, 1) if name == "deepseek_v3" else form.source)


def test_positions_of_the_call() -> None:
    for s in report("llama", position_ids=torch.arange(24).repeat(2, 1) + 5).attentions:
        assert s.spec.traits.rotary.positions == "given"


def test_a_layer_without_one() -> None:
    config = {**MODELS["llama4_text"][0], "no_rope_layers": [1, 0]}
    first, second = attnopt.inspect(build("llama4_text", config), None, kwargs={"input_ids": torch.arange(48).view(2, 24) + 3, "use_cache": False}).attentions
    assert first.spec.traits.rotary is not None
    assert second.spec.traits.rotary is None
