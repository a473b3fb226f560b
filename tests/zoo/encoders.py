"""Text and speech encoders of the transformers library."""

from __future__ import annotations

import re
from typing import Any

from zoo.case import Case, Facts, Refusal, some
from zoo.data import VOCAB, encoder_text, wave
from zoo.hugging import TEXT, auto

SPELLED_OUT = ("eager",)
_LONGER = {**TEXT, "max_position_embeddings": 260}


def _encoder(name: str, config: dict[str, Any], expect: dict[str, Facts] | None = None, *, model_type: str = "", sites: int = 2, **more: Any) -> Case:
    return Case(name, "encoder", auto(model_type or name, "AutoModel", **config), encoder_text, sites, expect or {}, **more)


_SPEECH: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": (32, 32),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}


def _nothing_or_padding_but_itself(rest: str) -> bool:
    return not rest or ("attention_mask[b, k]" in rest and rest.endswith("or q == k"))


def _of_queries(rest: str) -> bool:
    """Nothing, or a condition on the query alone: padded queries see nothing here."""
    return "k" not in re.findall(r"\b[bhqk]\b", rest)


CASES = [
    _encoder("bert", TEXT),
    _encoder("roberta", _LONGER),
    _encoder("distilbert", {"vocab_size": VOCAB, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 256}),
    _encoder("albert", {**TEXT, "embedding_size": 32}),
    _encoder("electra", {**TEXT, "embedding_size": 32}),
    _encoder("mpnet", _LONGER, {"": {"bias": some}}, forms=SPELLED_OUT),
    _encoder(
        "deberta_v2",
        {
            **TEXT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "max_relative_positions": -1,
            "position_buckets": 16,
            "position_biased_input": False,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
        {"": {"bias": some, "rest": _of_queries}},
        model_type="deberta-v2",
        forms=SPELLED_OUT,
    ),
    _encoder(
        "modernbert", {**TEXT, "local_attention": 16, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}, {"layers.1.": {"window": (8, 8)}}
    ),
    _encoder(
        "longformer",
        {**_LONGER, "attention_window": [16, 16]},
        {},
        forms=SPELLED_OUT,
        exported=False,
        refusals={"": Refusal("AO212", "overlapping chunks of queries and keys are multiplied, and the products sheared into a band of scores")},
    ),
    # Five attentions a layer: the first two and the last two blocks of queries, and those between. What is hidden has -10000 added, a number
    # that real scores may come close to, so it stays a bias.
    _encoder(
        "big_bird",
        {**TEXT, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1},
        {"": {"bias": lambda bias: True, "key_padding": False}},
        sites=10,
        forms=SPELLED_OUT,
        open="b",
        other=((3, 64),),  # a batch of one is captured on its own
    ),
    # a padded key is still seen by its own query
    _encoder(
        "xlnet",
        {"vocab_size": VOCAB, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
        {"": {"bias": some, "key_padding": False, "rest": _nothing_or_padding_but_itself}},
        forms=SPELLED_OUT,
    ),
    *(Case(name, "speech", auto(name, "AutoModel", **_SPEECH), wave, 2) for name in ("wav2vec2", "hubert")),
]
