"""What one call of the model computes: some tokens of some requests, packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.runtime.block_manager import BlockManager
from attnopt.runtime.contexts import ContextCache
from attnopt.runtime.request import Request
from attnopt.runtime.transfer import on_device


@dataclass(frozen=True, eq=False)
class Step:
    """T tokens of R requests. ``copies`` (from, to) are pages to copy before the model runs; ``rows`` are the tokens whose logits are wanted."""

    requests: tuple[Request, ...]
    counts: tuple[int, ...]
    """How many tokens of each request."""
    tokens: Tensor
    """int64 [T]"""
    positions: Tensor
    """int64 [T]"""
    slots: Tensor
    """int64 [T]: page * page_size + offset, where keys and values go."""
    block_table: Tensor
    """int32 [R, max_pages]; 0 where a window has passed a page and after a request's last page."""
    cu_seqlens_q: Tensor
    """int32 [R + 1]"""
    seqlens_k: Tensor
    """int32 [R], these tokens included."""
    rows: Tensor
    """int64 [N]: the last token of each request whose tokens are all computed after this step."""
    sampled: tuple[Request, ...]
    """The N requests of ``rows``."""
    generated: tuple[int, ...]
    """How many tokens each of them has generated before the one that is sampled in this step."""
    copies: tuple[tuple[int, int], ...] = ()
    cross: tuple[Tensor, ...] = ()
    """int32 [R, max_pages] and [R]: block table and lengths of the other sequences; empty for a model that reads none."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments of the step function, in order."""
        return (self.tokens, self.positions, self.slots, self.block_table, self.cu_seqlens_q, self.seqlens_k, self.rows, *self.cross)

    def only(self, r: int) -> Step:
        """The part of one request, without copies of pages."""
        first, last = int(self.cu_seqlens_q[r]), int(self.cu_seqlens_q[r + 1])
        mine = (self.rows >= first) & (self.rows < last)
        return Step(
            self.requests[r : r + 1],
            self.counts[r : r + 1],
            self.tokens[first:last],
            self.positions[first:last],
            self.slots[first:last],
            self.block_table[r : r + 1],
            self.cu_seqlens_q[r : r + 2] - first,
            self.seqlens_k[r : r + 1],
            self.rows[mine] - first,
            tuple(x for x in self.sampled if x is self.requests[r]),
            tuple(n for x, n in zip(self.sampled, self.generated, strict=True) if x is self.requests[r]),
            cross=tuple(x[r : r + 1] for x in self.cross),
        )


def make_step(
    requests: Sequence[Request],
    counts: Sequence[int],
    manager: BlockManager,
    copies: Sequence[tuple[int, int]],
    device: torch.device | str,
    contexts: ContextCache | None = None,
) -> Step:
    """The step that computes the next ``counts[r]`` tokens of each request, whose slots are given already."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    starts, lengths, sampled = [0], [], []
    for r, n in zip(requests, counts, strict=True):
        first, last = r.computed, r.computed + n
        tokens += r.slice(first, last)
        positions += range(first, last)
        slots += manager.slots(r.id, first, last)
        starts.append(len(tokens))
        lengths.append(last)
        if last == r.length:
            rows.append(len(tokens) - 1)
            sampled.append(r)
    packed, at, into, wanted = on_device((tokens, positions, slots, rows), torch.int64, device)
    pages, bounds, keys = _tables(requests, manager, starts, lengths, device)
    generated = tuple(len(r.output) for r in sampled)
    cross = () if contexts is None else contexts.tables(requests)
    return Step(tuple(requests), tuple(counts), packed, at, into, pages, bounds, keys, wanted, tuple(sampled), generated, tuple(copies), cross)


def make_next_step(
    before: Step, kept: Sequence[int], tokens: Tensor, manager: BlockManager, device: torch.device | str, contexts: ContextCache | None = None
) -> Step:
    """The step of one more token of each request ``before.sampled[i]``, i in ``kept``, which has its slot: that token is ``tokens[i]``, and may still be unknown to the host."""
    requests = tuple(before.sampled[i] for i in kept)
    n = len(requests)
    positions = [r.length for r in requests]
    slots = [manager.slots(r.id, p, p + 1)[0] for r, p in zip(requests, positions, strict=True)]
    at, into, wanted, which = on_device((positions, slots, range(n), kept), torch.int64, device)
    pages, bounds, keys = _tables(requests, manager, range(n + 1), [p + 1 for p in positions], device)
    if n < len(before.sampled):
        tokens = tokens[which]
    generated = tuple(before.generated[i] + 1 for i in kept)
    cross = () if contexts is None else contexts.tables(requests)
    return Step(requests, (1,) * n, tokens, at, into, pages, bounds, keys, wanted, requests, generated, (), cross)


def _tables(requests: Sequence[Request], manager: BlockManager, starts: Sequence[int], lengths: Sequence[int], device: torch.device | str) -> list[Tensor]:
    """Block table, ``cu_seqlens_q`` and ``seqlens_k``."""
    width = max(manager.columns(r.id) for r in requests)
    # an index that is never read must still be one that may be loaded: 0, not -1
    table: list[int] = []
    for r in requests:
        table += manager.row(r.id, width)
    pages, *others = on_device((table, starts, lengths), torch.int32, device)
    return [pages.view(len(requests), width), *others]
