"""Keys and values of the other sequences that requests read (an encoder's states): computed once, held in pages of their own, freed with the last request that reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnopt.errors import ServingError
from attnopt.runtime.paged_cache import LayerLike, PagedCache
from attnopt.runtime.request import Request

Encode = Callable[..., Sequence[tuple[Tensor, Tensor]]]
"""(inputs of one request) -> keys [S, Hkv, D] and values [S, Hkv, Dv] for each layer."""
Length = Callable[..., int]
"""(inputs of one request) -> S, the number of tokens that ``Encode`` gives of them. Raises ServingError for inputs that do not fit."""


@dataclass
class _Context:
    pages: list[int]
    length: int
    holders: set[int] = field(default_factory=set)
    """Ids of requests."""
    computed: bool = False


class ContextCache:
    """``pages`` pages of ``page_size`` tokens for the layers that read another sequence.

    A request holds its pages from its admission to its end, preemptions included, so that its sequence is encoded once; requests with equal inputs share them.
    """

    def __init__(
        self,
        encode: Encode,
        length: Length,
        layers: Sequence[LayerLike],
        page_size: int,
        pages: int | None = None,
        size_bytes: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.encode, self.length_of = encode, length
        self.cache = PagedCache(layers, page_size, pages, size_bytes, device)
        self.encoded = 0
        """How many sequences were computed so far."""
        self._free = list(range(self.cache.pages - 1, -1, -1))
        self._contexts: dict[bytes, _Context] = {}
        self._of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def name(self, inputs: Sequence[Tensor]) -> bytes:
        """A hash of the inputs; raises ServingError where they do not fit the model, or give more tokens than all pages hold."""
        n = self.length_of(*inputs)
        most = self.cache.pages * self.cache.page_size
        if not 1 <= n <= most:
            raise ServingError(
                f"The other sequence of this request has {n} tokens; supported are from 1 to {most}, as many as its cache of {self.cache.pages} pages holds."
            )
        found = hashlib.blake2b(digest_size=16)
        for x in inputs:
            found.update(f"{x.dtype}{tuple(x.shape)}".encode())
            found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.digest()

    def holds(self, request: Request) -> bool:
        """Whether a request has its pages."""
        return request.id in self._of

    def hold(self, request: Request) -> bool:
        """Give a request the pages of its other sequence. False, with nothing changed, where too few are free."""
        context = self._contexts.get(request.context_name)
        if context is None:
            n = self.length_of(*request.context)
            count = -(-n // self.cache.page_size)
            if count > len(self._free):
                return False
            context = self._contexts[request.context_name] = _Context([self._free.pop() for _ in range(count)], n)
        context.holders.add(request.id)
        self._of[request.id] = request.context_name
        return True

    def share(self, request: Request, child: Request) -> None:
        """``child`` reads the same sequence as ``request``, which holds it."""
        self._of[child.id] = self._of[request.id]
        self._contexts[self._of[child.id]].holders.add(child.id)

    def compute(self, request: Request) -> None:
        """Fill the pages that a request holds, unless that was done. Raises what the model raises."""
        context = self._contexts[self._of[request.id]]
        if context.computed:
            return
        size = self.cache.page_size
        pairs = self.encode(*request.context)
        place = torch.arange(context.length, device=self.cache.device)
        at = torch.tensor(context.pages, device=self.cache.device)[place // size], place % size
        for caches, found in zip(self.cache.tensors, pairs, strict=True):
            for cache, x in zip(caches, found, strict=True):
                if len(x) != context.length:
                    raise ServingError(f"The other sequence of request {request.id} was encoded to {len(x)} tokens, where {context.length} were told.")
                cache[at] = x
        context.computed = True
        self.encoded += 1

    def free(self, request: Request) -> None:
        """A request ends; the last one that holds a sequence gives its pages back. One that holds none may say so too."""
        name = self._of.pop(request.id, None)
        if name is None:
            return
        context = self._contexts[name]
        context.holders.remove(request.id)
        if not context.holders:
            self._free += reversed(context.pages)
            del self._contexts[name]

    def tables(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        """Block table int32 [R, max_pages] and lengths int32 [R] of the sequences that these requests hold."""
        found = [self._contexts[self._of[r.id]] for r in requests]
        width = max(len(c.pages) for c in found)
        table = [c.pages + [0] * (width - len(c.pages)) for c in found]
        lengths = [c.length for c in found]
        return tuple(torch.tensor(x, dtype=torch.int32, device=self.cache.device) for x in (table, lengths))  # type: ignore[return-value]

    # -------------------------------------------------------------------------------------------- for tests

    def check(self) -> None:
        """Raises AssertionError unless each page is free or of one sequence, and each sequence is held by the requests that say so."""
        held = [p for c in self._contexts.values() for p in c.pages]
        assert sorted(held + self._free) == list(range(self.cache.pages)), "a page is lost, or of two sequences"
        for name, c in self._contexts.items():
            assert c.holders and c.holders == {r for r, n in self._of.items() if n == name}, "the holders of a sequence are not those that hold it"
            assert len(c.pages) == -(-c.length // self.cache.page_size), "a sequence has a page too many or too few"
        assert set(self._of.values()) == set(self._contexts), "a request holds a sequence that is not there"
