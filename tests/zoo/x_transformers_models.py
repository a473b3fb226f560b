"""Models of the x-transformers library, by option."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.case import Case, Facts, Refusal, some
from zoo.data import VOCAB, padding, tokens

SPELLED_OUT = ("eager",)
BOTH = ("eager", "sdpa")
_SMALL: dict[str, Any] = {"dim": 64, "depth": 2, "heads": 4, "attn_dim_head": 16}


def _wrapped(form: str, kind: str, **options: Any) -> nn.Module:
    import x_transformers
    from loguru import logger

    logger.disable("x_transformers")
    torch.manual_seed(0)
    layers = getattr(x_transformers, kind)(**{**_SMALL, "attn_flash": form == "sdpa", **options})
    model = x_transformers.TransformerWrapper(num_tokens=VOCAB, max_seq_len=256, attn_layers=layers).eval()
    with torch.no_grad():
        # position biases that the library keeps from the first call on are there
        model(**(_with_context if options.get("cross_attend") else _text)(False, 1, 128))
    return model


def _text(padded: bool, b: int, s: int) -> dict[str, Any]:
    return {"x": tokens(b, s), **({"mask": padding(b, s).bool()} if padded else {})}


def _with_context(padded: bool, b: int, s: int) -> dict[str, Any]:
    n = s // 2 + 5
    context: Tensor = torch.randn(b, n, 64, generator=torch.Generator().manual_seed(s))
    return {"x": tokens(b, s), "context": context, **({"context_mask": padding(b, n).bool()} if padded else {})}


def _case(
    name: str,
    facts: Facts,
    forms: tuple[str, ...] = BOTH,
    kind: str = "Decoder",
    sites: int = 2,
    refusals: dict[str, Refusal] | None = None,
    open_sizes: str = "bs",
    **options: Any,
) -> Case:
    return Case(
        f"xt_{name}",
        "x-transformers",
        lambda form: _wrapped(form, kind, **options),
        _text,
        sites,
        {"": facts},
        forms,
        refusals=refusals or {},
        open=open_sizes,
        open_padded="",
    )


CAUSAL: Facts = {"causal": "top_left"}
# keys that are there before the first token
MEMORY: Facts = {"causal": "bottom_right"}
CASES = [
    _case("decoder", CAUSAL, rotary_pos_emb=True),
    _case("encoder", {}, kind="Encoder"),
    _case("alibi", {**CAUSAL, "alibi": True, "bias": some}, alibi_pos_bias=True),
    _case("relative_bias", {**CAUSAL, "bias": some}, SPELLED_OUT, open_sizes="b", rel_pos_bias=True),
    _case("dynamic_bias", {**CAUSAL, "bias": some}, SPELLED_OUT, open_sizes="b", dynamic_pos_bias=True),
    # head h reads KV head h % 2, which is no group of neighbours: keys and values stay repeated, as the model writes it
    _case("grouped", CAUSAL, attn_kv_heads=2),
    _case("one_kv_head", {**CAUSAL, "groups": 4}, attn_one_kv_head=True),
    _case("softclamp", {**CAUSAL, "softcap": 50.0}, SPELLED_OUT, attn_softclamp_logits=True),
    _case("memory", MEMORY, attn_num_mem_kv=4),
    _case("zero_kv", MEMORY, attn_add_zero_kv=True),
    _case("sink", {**CAUSAL, "sinks": True}, SPELLED_OUT, attn_head_learned_sink=True),
    _case("qk_norm", CAUSAL, attn_qk_norm=True),
    _case("window", {**CAUSAL, "window": (16, 0)}, open_sizes="b", attn_max_attend_past=16),
    _case("forgetting", {**CAUSAL, "bias": some}, SPELLED_OUT, open_sizes="", attn_data_dependent_alibi=True),
    Case(
        "xt_cross",
        "x-transformers",
        lambda form: _wrapped(form, "Decoder", cross_attend=True),
        _with_context,
        4,
        {".0.1": CAUSAL, ".3.1": CAUSAL},
        padded_sites=r"layers\.[14]\.",
        open_padded="",
    ),
    _case(
        "talking_heads",
        {},
        SPELLED_OUT,
        sites=1,
        depth=1,
        refusals={"": Refusal("AO212", "the scores of one head are mixed with those of others before the softmax")},
        attn_pre_talking_heads=True,
    ),
]
