"""A decoder as a function of new tokens, and of keys and values of those before: what runtimes that keep a cache outside of the model call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.errors import AttnoptError

_TAKES = ("input_ids", "attention_mask", "past_key_values", "use_cache")
_FIRST, _NEXT = 5, 3
"""Tokens of the example: 0 and 1 are sizes that torch.export fixes."""


class WithPast(nn.Module):
    """``input_ids`` [B, S], ``attention_mask`` [B, P + S], ``past_key_values`` (key and value [B, Hkv, P, D] of each layer in turn) and, where the decoder takes
    them, ``position_ids`` [B, S]: a dict of ``logits`` [B, S, V] and ``present.N.key``, ``present.N.value`` [B, Hkv, P + S, D]. Shares the decoder's parameters.

    ``decoder`` takes and gives its cache as ``past_key_values``, as an object of a class that is made from pairs (key, value) and has them as ``layers``, or
    as a tuple of pairs. Raises AttnoptError where it does not.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        parameters = inspect.signature(decoder.forward).parameters
        missing = [n for n in _TAKES if n not in parameters]
        if missing:
            raise AttnoptError(f"{type(decoder).__name__} takes no {missing[0]}; a decoder with a past takes {', '.join(_TAKES)}, as those of transformers do.")
        if getattr(getattr(decoder, "config", None), "is_encoder_decoder", False):
            raise AttnoptError(f"{type(decoder).__name__} has an encoder; supported with a past are decoders alone.")
        self.decoder = decoder
        self.takes_positions = "position_ids" in parameters
        self.cache_class: type | None = None
        """Class of the cache; None: a tuple of pairs."""
        self.eval()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None, past_key_values: Sequence[Tensor] = ()
    ) -> dict[str, Tensor]:
        pairs = tuple(zip(past_key_values[::2], past_key_values[1::2], strict=True))
        cache = pairs if self.cache_class is None else self.cache_class(pairs)
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        result = self.decoder(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions)
        out = {"logits": _field(result, "logits")}
        for i, (key, value) in enumerate(_pairs(_field(result, "past_key_values"))):
            out |= {f"present.{i}.key": key, f"present.{i}.value": value}
        return out

    def example(self, ids: Any) -> dict[str, Any]:
        """A call with a past, from tokens ``ids`` [B, n]; the first sequence is padded on the left.

        Raises AttnoptError where ``ids`` are none, and where the decoder gives no cache, or one that holds anything but keys and values.
        """
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise AttnoptError("An export with a past needs input_ids, integers [B, S], among the example inputs.")
        if ids.shape[0] == 1:
            ids = ids.repeat(2, 1)
        ids = ids.repeat(1, -(-(_FIRST + _NEXT) // ids.shape[1]))[:, : _FIRST + _NEXT]
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        positions = {"position_ids": positions_of(mask)[:, :_FIRST]} if self.takes_positions else {}
        with torch.no_grad():
            first = self.decoder(input_ids=ids[:, :_FIRST], attention_mask=mask[:, :_FIRST], use_cache=True, **positions)
        cache = _field(first, "past_key_values")
        if cache is None:
            raise AttnoptError(f"{type(self.decoder).__name__} gives no past_key_values with use_cache=True.")
        self.cache_class = None if isinstance(cache, tuple | list) else type(cache)
        past = [x for pair in _pairs(cache) for x in pair]
        if not past or any(x.dim() != 4 or x.shape[2] != _FIRST for x in past):
            raise AttnoptError(f"The cache of {type(self.decoder).__name__} holds more than keys and values [B, Hkv, S, D] of all tokens.")
        call: dict[str, Any] = {"input_ids": ids[:, _FIRST:], "attention_mask": mask, "past_key_values": past}
        return call | ({"position_ids": positions_of(mask)[:, _FIRST:]} if self.takes_positions else {})

    def empty_past(self, like: Sequence[Tensor], batch: int) -> list[Tensor]:
        return [x.new_empty((batch, x.shape[1], 0, x.shape[3])) for x in like]


def positions_of(mask: Tensor) -> Tensor:
    """The place of each token among those that are there, int64 [B, n]; 0 for padding before the first."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _field(result: Any, name: str) -> Any:
    return result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)


def _pairs(cache: Any) -> list[tuple[Tensor, Tensor]]:
    if isinstance(cache, tuple | list):
        return [(x[0], x[1]) for x in cache]
    return [(x.keys, x.values) for x in cache.layers]
