"""All models of the zoo."""

from __future__ import annotations

from zoo import cached, decoders, diffusers_models, encoders, handwritten, seq2seq, vision, vit_pytorch_models, x_transformers_models
from zoo.case import Case

PARTS = (decoders, encoders, vision, seq2seq, cached, handwritten, x_transformers_models, vit_pytorch_models, diffusers_models)
CASES: dict[str, Case] = {c.name: c for part in PARTS for c in part.CASES}
