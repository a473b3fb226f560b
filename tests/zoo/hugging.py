"""Models of the transformers library, from a configuration alone: random weights, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.data import VOCAB

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
GPT: dict[str, Any] = {"vocab_size": VOCAB, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}


def auto(model_type: str, cls: str, **config: Any) -> Callable[[str], nn.Module]:
    """A builder for ``transformers.<cls>`` (an Auto class or a model) over the configuration class of ``model_type``."""

    def build(form: str) -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        made = transformers.AutoConfig.for_model(model_type, **config)
        chosen = getattr(transformers, cls)
        make = chosen.from_config if cls.startswith("Auto") else chosen._from_config
        model: nn.Module = make(made, attn_implementation=form)
        return model.eval()

    return build
