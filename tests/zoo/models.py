"""All models of the zoo."""

from __future__ import annotations

from zoo import decoders, encoders, seq2seq, vision
from zoo.case import Case

CASES: dict[str, Case] = {c.name: c for part in (decoders, encoders, vision, seq2seq) for c in part.CASES}
