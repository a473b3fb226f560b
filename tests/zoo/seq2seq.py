"""Encoder-decoder models of the transformers library."""

from __future__ import annotations

from typing import Any

from zoo.case import Case, Facts, says
from zoo.data import VOCAB, pair_text, spectrum
from zoo.hugging import auto

CAUSAL: Facts = {"causal": "top_left"}
_PAIR: dict[str, Any] = {
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
_SPEECH = {**_PAIR, "num_mel_bins": 16, "max_source_positions": 64, "max_target_positions": 128, "suppress_tokens": None, "begin_suppress_tokens": None}
# a table of buckets in k - q, logarithmic far away
_BUCKETS: Facts = {"bias": says("[", "log(", "h]"), "scale": 1.0}
_T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 32,
    "decoder_start_token_id": 0,
}


def _pair(name: str, config: dict[str, Any]) -> Case:
    return Case(
        name,
        "encoder-decoder",
        auto(name, "AutoModelForSeq2SeqLM", **config),
        pair_text,
        6,
        {"decoder": CAUSAL, "encoder_attn": {"causal": None}},
        padded_sites="encoder",
    )


CASES = [
    Case(
        "t5",
        "encoder-decoder",
        auto("t5", "AutoModelForSeq2SeqLM", **_T5),
        pair_text,
        6,
        {"": _BUCKETS, "decoder": CAUSAL, "EncDecAttention": {"bias": None, "causal": None}},
        padded_sites="enc",
    ),
    _pair("bart", _PAIR),
    _pair("pegasus", _PAIR),
    _pair("marian", {**_PAIR, "decoder_vocab_size": VOCAB}),
    _pair("m2m_100", _PAIR),
    Case(
        "whisper",
        "encoder-decoder",
        auto("whisper", "AutoModelForSpeechSeq2Seq", **_SPEECH),
        spectrum,
        6,
        {"decoder": CAUSAL, "encoder_attn": {"causal": None}},
        padded=False,
    ),
]
