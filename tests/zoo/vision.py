"""Vision models of the transformers library, alone and beside text."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.case import Case, Facts, some
from zoo.data import VOCAB, image, image_and_text
from zoo.hugging import auto

_IMAGE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 4}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CAUSAL: Facts = {"causal": "top_left"}


def _vision(name: str, config: dict[str, Any], sites: int = 2, expect: dict[str, Facts] | None = None) -> Case:
    return Case(name, "vision", auto(name, "AutoModel", **config), image, sites, expect or {}, padded=False, open="b")


def _two_towers(name: str, sites: int, expect: dict[str, Facts], **text: Any) -> Case:
    build = auto(name, "AutoModel", text_config={**_TEXT, **text}, vision_config=dict(_IMAGE), projection_dim=32)
    return Case(name, "vision and text", build, image_and_text, sites, expect, padded_sites="text_model")


def _blip(form: str) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    text = {**_TEXT, **_ENDS, "encoder_hidden_size": 64, "projection_dim": 32, "sep_token_id": 2}
    config = transformers.BlipConfig(text_config=text, vision_config=dict(_IMAGE), projection_dim=32)
    return transformers.BlipForConditionalGeneration._from_config(config, attn_implementation=form).eval()


CASES = [
    _vision("vit", _IMAGE),
    _vision("beit", {**_IMAGE, "use_relative_position_bias": True}, 2, {"": {"bias": some}}),
    # Windows of 4x4 patches, shifted by 2 in every second layer: patches that the shift brought together do not see each other.
    _vision("swin", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}, 4, {"": {"bias": some}}),
    _vision("dinov2", _IMAGE),
    _vision(
        "segformer",
        {
            "num_encoder_blocks": 2,
            "depths": [2, 2],
            "sr_ratios": [4, 2],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        4,
    ),
    _two_towers("clip", 4, {"text_model": CAUSAL}, **_ENDS),
    # One attention more than layers: the head that pools the patches.
    _two_towers("siglip", 5, {}, projection_size=64),
    Case(
        "blip",
        "vision and text",
        _blip,
        image_and_text,
        6,
        {"text_decoder": CAUSAL, "crossattention": {"causal": None, "key_padding": False}},
        ("eager",),
        padded_sites="text_decoder",
    ),
]
