"""Inputs of the models: reproducible, and ragged where there is padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCAB = 128


def generator(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(1000**i * s for i, s in enumerate(seeds)))


def tokens(b: int, s: int, seed: int = 0) -> Tensor:
    """[b, s] of ordinary tokens: 0, 1 and 2 are pad, begin and end."""
    return torch.randint(3, VOCAB - 1, (b, s), generator=generator(b, s, seed))


def padding(b: int, s: int) -> Tensor:
    """[b, s], 1 where there is a token: the first sequence is a quarter shorter, each further one less so."""
    mask = torch.ones(b, s, dtype=torch.long)
    for i in range(b):
        mask[i, s - s // (4 + 4 * i) :] = 0
    return mask


def encoder_text(padded: bool, b: int, s: int) -> dict[str, Any]:
    return {"input_ids": tokens(b, s), **({"attention_mask": padding(b, s)} if padded else {})}


def decoder_text(padded: bool, b: int, s: int) -> dict[str, Any]:
    return {**encoder_text(padded, b, s), "use_cache": False}


def pair_text(padded: bool, b: int, s: int) -> dict[str, Any]:
    return {**decoder_text(padded, b, s), "decoder_input_ids": tokens(b, s // 2 + 1, 1)}


def packed_text(padded: bool, b: int, s: int) -> dict[str, Any]:
    """Several documents in each row, told apart by positions that start again."""
    starts = torch.zeros(b, s, dtype=torch.long)
    for i in range(b):
        starts[i, [(s * (i + 1)) // (b + 3), (2 * s) // 3]] = 1
    starts[:, 0] = 1
    where = torch.arange(s).expand(b, s)
    return {"input_ids": tokens(b, s), "position_ids": where - torch.where(starts.bool(), where, 0).cummax(1).values, "use_cache": False}


def image(padded: bool, b: int, s: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(b, 3, 32, 32, generator=generator(b))}


def image_and_text(padded: bool, b: int, s: int) -> dict[str, Any]:
    return {**image(padded, b, s), **encoder_text(padded, b, s)}


def wave(padded: bool, b: int, s: int) -> dict[str, Any]:
    """A wave of about 20 samples a frame."""
    n = 20 * s + 50
    mask = torch.ones(b, n, dtype=torch.long)
    mask[0, n // 2 :] = 0
    return {"input_values": torch.randn(b, n, generator=generator(b, s)), **({"attention_mask": mask} if padded else {})}


def spectrum(padded: bool, b: int, s: int) -> dict[str, Any]:
    return {"input_features": torch.randn(b, 16, 128, generator=generator(b)), "decoder_input_ids": tokens(b, s), "use_cache": False}
