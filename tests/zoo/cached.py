"""Decoders that are called with the keys and values of earlier tokens as plain tensors, and packed documents.

The new tokens see all earlier ones, so causality is aligned to the bottom right, and it has to be proven from the mask that
the library builds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.case import Case, Facts, some
from zoo.data import VOCAB, generator, packed_text, padding, tokens
from zoo.decoders import ALIBI, CAUSAL, GQA
from zoo.hugging import GPT, GROUPED, TEXT, auto

PAST = 24
"""Tokens in the cache, at the captured size."""


class WithPast(nn.Module):
    """A decoder as a function of tokens and of one tensor each for the keys and values of every layer, [b, kv heads, past, d]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, keys: list[Tensor], values: list[Tensor], attention_mask: Tensor | None = None) -> Tensor:
        from transformers import DynamicCache

        cache = DynamicCache()
        for i, (k, v) in enumerate(zip(keys, values, strict=True)):
            cache.update(k, v, i)
        logits: Tensor = self.model(input_ids=input_ids, past_key_values=cache, attention_mask=attention_mask, use_cache=True).logits
        return logits


def _past(kv_heads: int, new: int | None = None) -> Any:
    def inputs(padded: bool, b: int, s: int) -> dict[str, Any]:
        past = PAST if s == 64 else s // 2 + 3
        g = generator(b, s, 7)
        keys, values = ([torch.randn(b, kv_heads, past, 16, generator=g) for _ in range(2)] for _ in range(2))
        n = new or s
        made = {"input_ids": tokens(b, n), "keys": keys, "values": values}
        return {**made, **({"attention_mask": padding(b, past + n).flip(1)} if padded else {})}

    return inputs


def _cached(name: str, facts: Facts, config: dict[str, Any], kv_heads: int, forms: tuple[str, ...] = ("eager", "sdpa"), new: int | None = None) -> Case:
    make = auto(name, "AutoModelForCausalLM", **config)
    called = f"{name}_past" if new is None else f"{name}_decode"
    return Case(called, "cached", lambda form: WithPast(make(form)).eval(), _past(kv_heads, new), 2, {"": facts}, forms)


_BOTTOM: Facts = {"causal": "bottom_right"}
_DOCUMENTS: Facts = {"document": True, "words": ("documents", "by position ids")}
_GROUPED: Facts = {"groups": 2}
CASES = [
    _cached("gpt2", {**CAUSAL, **_BOTTOM}, GPT, 4),
    _cached("llama", {**GQA, **_BOTTOM}, GROUPED, 2),
    _cached("qwen2", {**GQA, **_BOTTOM}, GROUPED, 2),
    _cached("bloom", {**ALIBI, **_BOTTOM, "bias": some}, {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4}, 4, ("eager",)),
    # a single new token sees everything
    _cached("llama", {"groups": 2}, GROUPED, 2, new=1),
    # A token sees those of its own document whose positions come before its own: order is by position, not by index.
    *(
        Case(f"{name}_packed", "packed", auto(name, "AutoModelForCausalLM", **config), packed_text, 2, {"": {**facts, **_DOCUMENTS}}, padded=False)
        for name, facts, config in (("llama", _GROUPED, GROUPED), ("mistral", _GROUPED, {**GROUPED, "sliding_window": 16}), ("gpt_neox", {}, TEXT))
    ),
]
