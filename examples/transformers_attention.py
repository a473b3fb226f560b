"""A model of transformers generates through attnopt's kernels, without any capture: ``python examples/transformers_attention.py``."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import attnopt.integrations.transformers

attnopt.integrations.transformers.register()

settings = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, pad_token_id=0
)
ids = torch.tensor([[0, 0, 0, 5, 6, 7], [8, 9, 10, 11, 12, 13]])
greedy = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)


def continued(implementation: str) -> list[list[int]]:
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(settings, attn_implementation=implementation).eval()  # or from_pretrained(..., attn_implementation=...)
    texts: list[list[int]] = model.generate(ids, attention_mask=(ids != 0).long(), generation_config=greedy)[:, ids.shape[1] :].tolist()
    return texts


ours = continued("attnopt")
assert ours == continued("eager"), "greedy tokens differ from those of the eager attention"
for tokens in ours:
    print(tokens)
