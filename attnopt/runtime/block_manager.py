"""Which request holds which pages of a paged KV cache. Numbers only: the tensors are ``PagedCache``'s.

A page is free, held by one or more requests (counted), or *reusable*: nobody holds it, and it still has keys and values that a hash names. Reusable pages
are taken again by a request whose tokens begin the same way, or evicted, the one let go first being the first to be evicted, when no free page is left.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from attnopt.errors import ServingError

DEAD = -1
"""Stands in a request's list of pages where a window has passed the page, which is given back."""


class OutOfPages(Exception):
    """No page is left for what was asked; nothing was changed. The scheduler answers it by preempting a request."""


@dataclass(frozen=True)
class Usage:
    """The cache at one moment. ``waste`` is the part of the slots in held pages that no token has; a page shared by many counts once."""

    pages: int
    held: int
    reusable: int
    slots_allocated: int
    slots_filled: int
    padded_waste: float
    """The same figure for a contiguous cache [requests, longest] that is padded only to the longest of the requests alive now; without windows or sharing."""

    @property
    def waste(self) -> float:
        return 1 - self.slots_filled / self.slots_allocated if self.slots_allocated else 0.0


@dataclass
class _Holding:
    """What one request holds: page i of ``pages`` has its tokens i * page_size and on; ``length`` tokens have a slot."""

    salt: bytes
    pages: list[int] = field(default_factory=list)
    length: int = 0
    hashes: list[bytes] = field(default_factory=list)
    """Of its first full pages, as far as they are known to be written."""
    tail: list[int] = field(default_factory=list)
    """The written tokens after those pages."""
    alive_from: int = 0
    """The first page that is not dead."""


class BlockManager:
    """Pages of ``page_size`` tokens, given to requests and taken back.

    ``prefix_sharing``: full pages are found again by a hash of all token ids up to their end. ``window``: how many tokens, the query's own included, any layer
    reads; pages before that are given back as a request grows (None: every layer reads all).
    """

    def __init__(self, pages: int, page_size: int, prefix_sharing: bool = True, window: int | None = None) -> None:
        if page_size < 1:
            raise ServingError(f"page_size is {page_size}; it must be at least 1.")
        if pages < 1:
            raise ServingError(f"The cache has {pages} pages; it must have at least one page of {page_size} tokens.")
        if window is not None and window < 1:
            raise ServingError(f"window is {window}; it must be at least 1, or None where all tokens are read.")
        self.pages, self.page_size, self.prefix_sharing, self.window = pages, page_size, prefix_sharing, window
        self.evictions = 0
        self._free = list(range(pages - 1, -1, -1))
        self._reusable: OrderedDict[int, None] = OrderedDict()
        self._count = [0] * pages
        self._fill = [0] * pages
        self._filled = 0
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._held: dict[Hashable, _Holding] = {}

    # -------------------------------------------------------------------------------------------- what there is

    @property
    def available(self) -> int:
        """Pages that could be given out now."""
        return len(self._free) + len(self._reusable)

    def pages_for(self, tokens: int, chunk: int) -> int:
        """How many pages a request of ``tokens`` tokens holds at most at once, when it grows by at most ``chunk`` tokens a step."""
        whole = -(-tokens // self.page_size)
        if self.window is None:
            return whole
        # a window of keys and a chunk of queries start anywhere within a page
        return min(whole, (self.window + chunk - 3) // self.page_size + 2)

    def length(self, request: Hashable) -> int:
        """How many tokens of the request have a slot."""
        return self._held[request].length

    def held(self, request: Hashable) -> int:
        """How many pages the request holds, shared ones included."""
        holding = self._held[request]
        return len(holding.pages) - holding.alive_from

    def table(self, request: Hashable) -> list[int]:
        """The request's pages in the order of its tokens; ``DEAD`` where a window has passed one."""
        return list(self._held[request].pages)

    def row(self, request: Hashable, width: int) -> list[int]:
        """``table`` as a row of a block table of ``width`` columns: 0 where a window has passed a page, and behind the last one."""
        holding = self._held[request]
        return [*[0] * holding.alive_from, *holding.pages[holding.alive_from :], *[0] * (width - len(holding.pages))]

    def slots(self, request: Hashable, first: int, last: int) -> list[int]:
        """page * page_size + offset of each token [first, last), all of which have slots."""
        pages, size = self._held[request].pages, self.page_size
        if last - first == 1:
            return [pages[first // size] * size + first % size]
        return [pages[p // size] * size + p % size for p in range(first, last)]

    def columns(self, request: Hashable) -> int:
        """How many pages ``table`` has."""
        return len(self._held[request].pages)

    def usage(self) -> Usage:
        held = self.pages - self.available
        lengths = [h.length for h in self._held.values() if h.length]
        padded = 1 - sum(lengths) / (len(lengths) * max(lengths)) if lengths else 0.0
        return Usage(self.pages, held, len(self._reusable), held * self.page_size, self._filled, padded)

    # -------------------------------------------------------------------------------------------- prefixes

    def page_hashes(self, tokens: Sequence[int], salt: bytes = b"") -> list[bytes]:
        """The hash of each full page: of its token ids and the hash before it, so that it names all tokens up to the page's end.

        ``salt`` is for whatever else keys and values depend on (another sequence that is attended to, an adapter).
        """
        found, last = [], b"attnopt" + salt
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            last = self._next_hash(last, tokens[start : start + self.page_size])
            found.append(last)
        return found

    def _next_hash(self, last: bytes, tokens: Sequence[int]) -> bytes:
        return hashlib.blake2b(last + array("q", tokens).tobytes(), digest_size=16).digest()

    def match(self, hashes: Sequence[bytes]) -> tuple[int, int]:
        """How many of the first pages with these hashes are stored, and how many of those are reusable, that is, counted in ``available``."""
        pages: list[int] = []
        for h in hashes if self.prefix_sharing else ():
            if h not in self._by_hash:
                break
            pages.append(self._by_hash[h])
        return len(pages), sum(self._count[p] == 0 for p in pages)

    # -------------------------------------------------------------------------------------------- requests

    def allocate(self, request: Hashable, tokens: Sequence[int], salt: bytes = b"") -> int:
        """Begin a request: returns how many of its first tokens have keys and values in the cache already.

        At least the last token is left to compute, since its logits are wanted.
        """
        if request in self._held:
            raise ServingError(f"Request {request} holds pages already.")
        holding = self._held[request] = _Holding(salt)
        hashes = self.page_hashes(tokens[:-1], salt) if self.prefix_sharing else []
        for h in hashes[: self.match(hashes)[0]]:
            page = self._by_hash[h]
            self._hold(page)
            holding.pages.append(page)
            holding.hashes.append(h)
        holding.length = len(holding.pages) * self.page_size
        self._drop_dead(holding, holding.length)
        return holding.length

    def room(self, request: Hashable) -> int:
        """How many tokens could be appended now."""
        holding = self._held[request]
        left = -holding.length % self.page_size
        copied = 1 if left and self._count[holding.pages[-1]] > 1 else 0
        if copied > self.available:
            return 0
        return left + (self.available - copied) * self.page_size

    def append(self, request: Hashable, n: int) -> tuple[int, int] | None:
        """Give slots to the next n tokens. Returns (from, to) where a page that others hold too had to be replaced: it must be copied before it is written.

        Raises OutOfPages, with nothing changed, where there are too few.
        """
        if n > self.room(request):
            raise OutOfPages
        holding, copy = self._held[request], None
        if n and holding.length % self.page_size and self._count[holding.pages[-1]] > 1:
            shared = holding.pages[-1]
            copy = (shared, self._take())
            self._set_fill(copy[1], holding.length % self.page_size)
            self._let_go(shared)
            holding.pages[-1] = copy[1]
        end = holding.length + n
        while len(holding.pages) * self.page_size < end:
            holding.pages.append(self._take())
        for i in range(holding.length // self.page_size, len(holding.pages)):
            self._set_fill(holding.pages[i], min(self.page_size, end - i * self.page_size))
        holding.length = end
        return copy

    def append_one_each(self, requests: Sequence[Hashable]) -> bool:
        """Give a slot to the next token of each of these; False, with nothing changed, where there are too few pages, or one would have to be copied first."""
        holdings = [self._held[r] for r in requests]
        full = [h for h in holdings if h.length % self.page_size == 0]
        if len(full) > self.available or any(h.length % self.page_size and self._count[h.pages[-1]] > 1 for h in holdings):
            return False
        for holding in full:
            holding.pages.append(self._take())
        for holding in holdings:
            self._set_fill(holding.pages[-1], holding.length % self.page_size + 1)
            holding.length += 1
        return True

    def retract(self, request: Hashable) -> None:
        """Take back the slot of the request's last token, which is not committed."""
        holding = self._held[request]
        holding.length -= 1
        left = holding.length % self.page_size
        if left:
            self._set_fill(holding.pages[-1], left)
        else:
            self._let_go(holding.pages.pop())

    def commit(self, request: Hashable, tokens: Sequence[int]) -> None:
        """The request's next tokens are these and are written: full pages may be shared from now on, and those out of the window go.

        They have a slot each, and so may have the one behind them (``append_one_each``).
        """
        holding = self._held[request]
        holding.tail += tokens
        written = len(holding.hashes) * self.page_size + len(holding.tail)
        assert holding.length - 1 <= written <= holding.length, f"{written} tokens are written, and {holding.length} have a slot"
        while len(holding.tail) >= self.page_size:
            i = len(holding.hashes)
            last = holding.hashes[-1] if i else b"attnopt" + holding.salt
            h = self._next_hash(last, holding.tail[: self.page_size])
            holding.hashes.append(h)
            del holding.tail[: self.page_size]
            # of two equal pages that were computed side by side, the first is the one that others find; a forked page may have a name already
            page = holding.pages[i]
            if self.prefix_sharing and page != DEAD and h not in self._by_hash and page not in self._hash_of:
                self._by_hash[h], self._hash_of[page] = page, h
        self._drop_dead(holding, written)

    def fork(self, request: Hashable, child: Hashable) -> None:
        """``child`` holds what ``request`` holds, the last page too; whoever appends to that one first gets a copy."""
        if child in self._held:
            raise ServingError(f"Request {child} holds pages already.")
        old = self._held[request]
        assert len(old.hashes) * self.page_size + len(old.tail) == old.length, "a request can be forked when all its slots are written"
        self._held[child] = _Holding(old.salt, list(old.pages), old.length, list(old.hashes), list(old.tail), old.alive_from)
        for page in old.pages[old.alive_from :]:
            self._hold(page)

    def free(self, request: Hashable, trusted: bool = True) -> None:
        """Give back all pages of a request. The last ones are evicted first: the beginning of a text is what others share.

        Not ``trusted``: what stands in them may be wrong. They lose their names, so that no later request begins with them; others that hold them keep them.
        """
        holding = self._held.pop(request)
        for page in reversed(holding.pages[holding.alive_from :]):
            if not trusted and page in self._hash_of:
                del self._by_hash[self._hash_of.pop(page)]
            self._let_go(page)

    # -------------------------------------------------------------------------------------------- pages

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._reusable.popitem(last=False)
            del self._by_hash[self._hash_of.pop(page)]
            self.evictions += 1
        self._count[page] = 1
        return page

    def _hold(self, page: int) -> None:
        if self._count[page] == 0:
            del self._reusable[page]
            self._set_fill(page, self.page_size)
        self._count[page] += 1

    def _let_go(self, page: int) -> None:
        self._count[page] -= 1
        if self._count[page]:
            return
        self._set_fill(page, 0)
        if page in self._hash_of:
            self._reusable[page] = None
        else:
            self._free.append(page)

    def _set_fill(self, page: int, n: int) -> None:
        self._filled += n - self._fill[page]
        self._fill[page] = n

    def _drop_dead(self, holding: _Holding, length: int) -> None:
        """The next query stands at ``length`` and reads the ``window`` tokens that end there."""
        if self.window is None:
            return
        dead = min(max(0, length - self.window + 1) // self.page_size, len(holding.pages))
        for i in range(holding.alive_from, dead):
            self._let_go(holding.pages[i])
            holding.pages[i] = DEAD
        holding.alive_from = max(holding.alive_from, dead)

    # -------------------------------------------------------------------------------------------- for tests

    def check(self) -> None:
        """Raises AssertionError unless each page is in one state, and counts, fills and hashes agree with what requests hold."""
        counts, fills = [0] * self.pages, [0] * self.pages
        for holding in self._held.values():
            assert len(holding.pages) == -(-holding.length // self.page_size), "a request has a page too many or too few"
            for i, page in enumerate(holding.pages):
                assert (page == DEAD) == (i < holding.alive_from), "dead pages stand first"
                if page != DEAD:
                    counts[page] += 1
                    fills[page] = max(fills[page], min(self.page_size, holding.length - i * self.page_size))
        assert counts == self._count, "the counts of pages are not those of their holders"
        assert fills == self._fill and sum(fills) == self._filled, "the filled slots are not those of the holders"
        states = [*self._free, *self._reusable, *(p for p in range(self.pages) if counts[p])]
        assert sorted(states) == list(range(self.pages)), "a page is lost, or is in two states"
        assert {p: h for h, p in self._by_hash.items()} == self._hash_of, "hashes and pages disagree"
        assert not set(self._free) & set(self._hash_of), "a free page has a hash"
        assert set(self._reusable) <= set(self._hash_of), "a reusable page has no hash"
