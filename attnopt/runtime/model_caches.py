"""The caches of one model: one for its own tokens, and one for the other sequences that it reads, if it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attnopt.errors import ServingError
from attnopt.runtime.contexts import ContextCache, Encode, Length
from attnopt.runtime.paged_cache import LayerLike, PagedCache, token_bytes


class ModelLayer(LayerLike, Protocol):
    @property
    def cross(self) -> bool:
        """Whether it is keys and values of another sequence that the layer keeps."""


@dataclass(frozen=True)
class ModelCaches:
    """``tensors`` are those of both caches, in the order of the layers."""

    own: PagedCache
    contexts: ContextCache | None
    tensors: list[tuple[Tensor, ...]]

    @staticmethod
    def of(
        layers: Sequence[ModelLayer],
        page_size: int,
        pages: int | None,
        size_bytes: int | None,
        device: torch.device | str | None,
        encode: Encode,
        length: Length,
        context_pages: int | None = None,
        context_page_size: int | None = None,
    ) -> ModelCaches:
        """``pages`` or ``size_bytes``, one of which is given, as in ``PagedCache``; bytes are for both caches. ``context_pages`` is None for as many pages as the own cache has, ``context_page_size`` for pages of the same size."""
        own, crossing = ([x for x in layers if x.cross == cross] for cross in (False, True))
        mine = None if size_bytes is None else size_bytes * token_bytes(own) // token_bytes(layers)
        cache = PagedCache(own, page_size, pages, mine, device)
        if not crossing:
            if context_pages is not None:
                raise ServingError(f"context_pages is {context_pages}, and this model reads no other sequence; supported is None.")
            return ModelCaches(cache, None, cache.tensors)
        size = page_size if context_page_size is None else context_page_size
        contexts = ContextCache(encode, length, crossing, size, cache.pages * page_size // size if context_pages is None else context_pages, None, device)
        tensors = {False: iter(cache.tensors), True: iter(contexts.cache.tensors)}
        return ModelCaches(cache, contexts, [next(tensors[x.cross]) for x in layers])


def pages_for(layers: Sequence[ModelLayer], page_size: int, lengths: Sequence[int], others: Sequence[int], most_bytes: int, context_page_size: int) -> tuple[int, int | None]:
    """Pages and context pages that hold requests of these lengths and their other sequences, or as many as ``most_bytes`` do. The latter are None without other sequences."""
    own, crossing = (sum(-(-n // size) for n in x) for x, size in ((lengths, page_size), (others, context_page_size)))
    total = sum(n * size * token_bytes([x for x in layers if x.cross == cross]) for n, size, cross in ((own, page_size, False), (crossing, context_page_size, True)))
    if total > most_bytes:
        own, crossing = (n * most_bytes // total for n in (own, crossing))
    return max(1, own), max(1, crossing) if others else None
