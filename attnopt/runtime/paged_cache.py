"""The tensors of a paged KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attnopt.errors import ServingError

SCALED = (torch.int8, torch.float8_e4m3fn)
"""Dtypes of caches whose numbers are multiplied by a scale, float32 for each token and head."""


class LayerLike(Protocol):
    """What one attention keeps of a token: keys [Hkv, D] and values [Hkv, Dv] of a dtype."""

    @property
    def Hkv(self) -> int: ...
    @property
    def D(self) -> int: ...
    @property
    def Dv(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class LayerShape:
    """A plain ``LayerLike``."""

    Hkv: int
    D: int
    Dv: int
    dtype: torch.dtype = torch.float32


def token_bytes(layers: Iterable[LayerLike]) -> int:
    """What a token takes in the caches of all layers."""
    return sum(x.Hkv * ((x.D + x.Dv) * x.dtype.itemsize + (8 if x.dtype in SCALED else 0)) for x in layers)


def layer_tensors(layer: LayerLike, pages: int, page_size: int, device: torch.device | str | None) -> tuple[Tensor, ...]:
    """k_cache [pages, page_size, Hkv, D] and v_cache [pages, page_size, Hkv, Dv], and behind them k_scale and v_scale [pages, page_size, Hkv] of a dtype in ``SCALED``. Not initialised."""
    found = [torch.empty(pages, page_size, layer.Hkv, d, dtype=layer.dtype, device=device) for d in (layer.D, layer.Dv)]
    if layer.dtype in SCALED:
        found += [empty_scales(pages, page_size, layer.Hkv, device) for _ in range(2)]
    return tuple(found)


def empty_scales(pages: int, page_size: int, Hkv: int, device: torch.device | str | None) -> Tensor:
    """[pages, page_size, Hkv], not initialised. In memory the scales of a head stand together in each page: a program reads those of one head, and finds them in few transactions."""
    return torch.empty(pages, Hkv, page_size, device=device).transpose(1, 2)


class PagedCache:
    """For each layer the tensors of ``layer_tensors``; all layers share one numbering of pages.

    Give ``pages``, or ``size_bytes``: as many pages as that budget holds, over all layers. Raises ServingError where that is less than one page.
    Contents are not initialised: a slot is read only after it was written.
    """

    def __init__(
        self,
        layers: Sequence[LayerLike],
        page_size: int = 16,
        pages: int | None = None,
        size_bytes: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if page_size < 1:
            raise ServingError(f"page_size is {page_size}; it must be at least 1.")
        if not layers:
            raise ServingError("The model has no attention that keeps keys and values; a cache needs at least one.")
        if (pages is None) == (size_bytes is None):
            raise ServingError(f"pages is {pages} and size_bytes is {size_bytes}; exactly one of them says how large the cache is.")
        self.page_size = page_size
        self.page_bytes = page_size * token_bytes(layers)
        if size_bytes is not None:
            pages = size_bytes // self.page_bytes
            if pages < 1:
                raise ServingError(
                    f"The cache may take {size_bytes} bytes, and one page of {page_size} tokens takes {self.page_bytes} over {len(layers)} layers; it must hold at least one."
                )
        assert pages is not None
        if pages < 1:
            raise ServingError(f"The cache has {pages} pages; it must have at least one page of {page_size} tokens.")
        self.pages = pages
        try:
            self.tensors = [layer_tensors(x, pages, page_size, device) for x in layers]
        except RuntimeError as error:  # out of memory is one of these, on every device
            why = " ".join(str(error).split(". ")[0].split())
            raise ServingError(f"A cache of {pages} pages of {page_size} tokens takes {pages * self.page_bytes} bytes, which could not be allocated: {why}.") from error
        self.device = self.tensors[0][0].device

    @property
    def size_bytes(self) -> int:
        return self.pages * self.page_bytes

    def copy(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy pages (from, to), all read before any is written. No page may be copied to twice."""
        pairs = list(pairs)
        if not pairs:
            return
        source, target = (torch.tensor(x, dtype=torch.int64, device=self.device) for x in zip(*pairs, strict=True))
        for layer in self.tensors:
            for x in layer:
                # not every device copies numbers of 8 bits by index, and all copy bytes
                x = x.view(torch.uint8) if x.dtype in SCALED else x
                x[target] = x[source]
