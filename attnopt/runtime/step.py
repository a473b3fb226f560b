"""What one call of the model computes: some tokens of some requests, packed."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.runtime.block_manager import BlockManager
from attnopt.runtime.contexts import ContextCache
from attnopt.runtime.request import Request


@dataclass(frozen=True)
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
    width = max(manager.columns(r.id) for r in requests)
    # an index that is never read must still be one that may be loaded: 0, not -1
    table: list[int] = []
    for r in requests:
        table += manager.row(r.id, width)
    packed, at, into, wanted = on_device((tokens, positions, slots, rows), torch.int64, device)
    pages, bounds, keys = on_device((table, starts, lengths), torch.int32, device)
    return Step(tuple(requests), tuple(counts), packed, at, into, pages.view(len(requests), width), bounds, keys, wanted, tuple(sampled), tuple(copies), () if contexts is None else contexts.tables(requests))


_CODES = {torch.int64: "q", torch.int32: "i"}


def on_device(parts: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    """A tensor of each list, all by one transfer: a small one takes longer to start than to run. Each begins at a multiple of 16 bytes, as a tensor of its own does."""
    unit = 16 // dtype.itemsize
    flat: list[int] = []
    places = []
    for part in parts:
        places.append((len(flat), len(flat) + len(part)))
        flat += part
        flat += [0] * (-len(part) % unit)
    # an array is read from a list of numbers several times faster than a tensor is
    whole = torch.frombuffer(array(_CODES[dtype], flat), dtype=dtype).to(device) if flat else torch.empty(0, dtype=dtype, device=device)
    return [whole[a:b] for a, b in places]
