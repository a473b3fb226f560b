"""A decoder with a past as onnxruntime-genai expects it: names of inputs and outputs, and ``genai_config.json``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import onnx_ir as ir

from attnopt.capture.with_past import WithPast
from attnopt.emit.onnx.model import Draft
from attnopt.emit.onnx.names import rename_dimensions
from attnopt.errors import AttnoptError
from attnopt.ir.spec import AttentionSpec

CONFIG = "genai_config.json"
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


def finish(draft: Draft, decoder: WithPast, path: str | os.PathLike[str]) -> None:
    """Name the past in the model, to be written to ``path``, and its lengths ``past`` and ``total``, and set the files that belong beside it.

    Raises AttnoptError where the configuration of the decoder lacks what onnxruntime-genai needs.
    """
    model = draft.model
    past = name_past(model)
    totals = [v for v in model.graph.inputs if v.name == "attention_mask"]
    lengths = [(v.shape[axis], name) for values, axis, name in ((past, 2, "past"), (totals, 1, "total")) for v in values if v.shape is not None]
    rename_dimensions(model, {d.value: name for d, name in lengths if isinstance(d, ir.SymbolicDim) and d.value is not None and d.value.isidentifier()})
    specs = [x.spec for x in draft.layers if x.spec is not None]
    draft.beside[CONFIG] = _genai_config(model, decoder, specs, Path(path).name, len(past) // 2)
    for layer in draft.layers:
        layer.name = layer.name.removeprefix("decoder.")


def name_past(model: ir.Model) -> list[ir.Value]:
    """Give the inputs that are elements of ``past_key_values``, key and value of each layer in turn, the names that runtimes know."""
    past = [v for v in model.graph.inputs if v.name and v.name.startswith("past_key_values_")]
    for i, value in enumerate(past):
        value.name = f"past_key_values.{i // 2}.{'value' if i % 2 else 'key'}"
    return past


def _genai_config(model: ir.Model, decoder: WithPast, specs: list[AttentionSpec], file: str, layers: int) -> str:
    config = getattr(decoder.decoder, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    generation = getattr(decoder.decoder, "generation_config", None)
    context = next((getattr(text, n) for n in _LENGTHS if isinstance(getattr(text, n, None), int)), None)
    tokens = {
        n: next((x for x in (getattr(c, n, None) for c in (generation, text)) if x is not None), None) for n in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    if context is None or tokens["eos_token_id"] is None:
        lacking = "eos_token_id" if context is not None else f"the longest context ({', '.join(_LENGTHS)})"
        raise AttnoptError(
            f"{CONFIG} needs {lacking}, and the configuration of {type(decoder.decoder).__name__} does not say it.",
            f"Set it, such as: model.config.{'eos_token_id' if context is not None else _LENGTHS[0]} = ...",
        )
    end = tokens["eos_token_id"]
    first = end[0] if isinstance(end, list) else end
    tokens = {n: first if x is None else x for n, x in tokens.items()}
    d = specs[0].dims
    vocabulary = model.graph.outputs[0].shape[-1] if model.graph.outputs[0].shape is not None else None
    names = [n for n in ("input_ids", "attention_mask", "position_ids") if n != "position_ids" or decoder.takes_positions]
    facts: dict[str, Any] = {
        "model": {
            "type": "decoder",
            "context_length": context,
            "vocab_size": vocabulary,
            **tokens,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": file,
                "head_size": d.D.value,
                "hidden_size": d.Hq.value * d.D.value,
                "num_attention_heads": d.Hq.value,
                "num_key_value_heads": d.Hkv.value,
                "num_hidden_layers": layers,
                "inputs": {**{n: n for n in names}, "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
            },
        },
        "search": {"do_sample": False, "max_length": context, "min_length": 0, "num_beams": 1, "num_return_sequences": 1, "past_present_share_buffer": False},
    }
    return json.dumps(facts, indent=2) + "\n"
