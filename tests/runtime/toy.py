"""A small decoder in plain torch over a paged cache, and the same function of a whole text at once, in float64.

Each query reads every key of its request, with its distance, so a wrong page, a page in the wrong place, or a key too few shows in the logits.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from attnopt.runtime import BlockManager, Engine, LayerShape, PagedCache, Request, SamplingParams, sample

VOCABULARY = 29
LAYERS, HEADS, D, DV, WIDTH = 2, 2, 4, 3, 12
RUN_AHEAD = False
"""Of the engines that tests make."""


class Weights:
    """Random, and large enough that the most likely token changes with any key."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.embed = random(VOCABULARY, WIDTH)
        self.q, self.k = random(LAYERS, WIDTH, HEADS, D), random(LAYERS, WIDTH, HEADS, D)
        self.v, self.o = random(LAYERS, WIDTH, HEADS, DV), random(LAYERS, HEADS * DV, WIDTH)
        self.head = random(WIDTH, VOCABULARY)


WEIGHTS = Weights()


def _embedded(tokens: Tensor, positions: Tensor) -> Tensor:
    angles = positions[:, None].double() / torch.arange(1, WIDTH + 1)
    return WEIGHTS.embed[tokens] + angles.sin()


def _attended(q: Tensor, k: Tensor, v: Tensor, at: Tensor, keys_at: Tensor, window: int | None) -> Tensor:
    """q [n, H, D] at positions ``at`` over keys [m, H, D] at ``keys_at``: [n, H * DV]."""
    distance = at[:, None] - keys_at[None]
    seen = (distance >= 0) & (distance < (window or 1 << 30))
    scores = torch.einsum("nhd,mhd->hnm", q, k) / 4 - 0.01 * distance
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, v).flatten(1)


def _layer(x: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    y = x / x.norm(dim=-1, keepdim=True)
    return tuple(torch.einsum("tw,whd->thd", y, w[layer]) for w in (WEIGHTS.q, WEIGHTS.k, WEIGHTS.v))  # type: ignore[return-value]


def whole(tokens: list[int], window: int | None) -> Tensor:
    """The last token's logits [1, V], without a cache."""
    at = torch.arange(len(tokens))
    x = _embedded(torch.tensor(tokens), at)
    for layer in range(LAYERS):
        q, k, v = _layer(x, layer)
        x = x + _attended(q, k, v, at, at, window) @ WEIGHTS.o[layer]
    return (x[-1:] / x[-1:].norm()) @ WEIGHTS.head


@functools.cache
def alone(prompt: tuple[int, ...], params: SamplingParams, seed: int = 0, window: int | None = None) -> tuple[int, ...]:
    """What a prompt becomes without cache, batch or chunks."""
    out: list[int] = []
    while len(out) < params.max_new_tokens:
        (token,) = sample(whole([*prompt, *out], window), [params], [seed], [len(out)]).read()
        assert token is not None
        out.append(token)
        if token in params.stop_tokens:
            break
    return tuple(out)


class Toy:
    """The step function. It checks its inputs, and fills with NaN, before it runs, every slot that nobody may read: free pages, and the unused ends of held ones."""

    def __init__(self, cache: PagedCache, window: int | None = None) -> None:
        self.cache, self.window = cache, window
        self.manager: BlockManager | None = None
        self.most_tokens = 0
        for pair in cache.tensors:
            for x in pair:
                x.fill_(torch.nan)

    def poison(self) -> None:
        assert self.manager is not None
        # a reusable page is full of what its name says, and is kept
        fill = [self.cache.page_size if p in self.manager._reusable else n for p, n in enumerate(self.manager._fill)]
        unused = torch.arange(self.cache.page_size) >= torch.tensor(fill)[:, None]
        for pair in self.cache.tensors:
            for x in pair:
                x[unused] = torch.nan

    def __call__(self, tokens: Tensor, positions: Tensor, slots: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, seqlens_k: Tensor, rows: Tensor) -> Tensor:
        if self.manager is not None:
            self.poison()
        T, R = len(tokens), len(seqlens_k)
        self.most_tokens = max(self.most_tokens, T)
        assert [x.dtype for x in (tokens, positions, slots, rows)] == [torch.int64] * 4
        assert [x.dtype for x in (block_table, cu_seqlens_q, seqlens_k)] == [torch.int32] * 3
        assert positions.shape == slots.shape == (T,) and block_table.shape[0] == R and cu_seqlens_q.shape == (R + 1,)
        assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == T and bool((cu_seqlens_q.diff() > 0).all())
        assert len(set(slots.tolist())) == T and block_table.min() >= 0 and block_table.max() < self.cache.pages
        size = self.cache.page_size
        x = _embedded(tokens, positions)
        for layer, (k_cache, v_cache) in enumerate(self.cache.tensors):
            q, k, v = _layer(x, layer)
            k_cache.flatten(0, 1)[slots], v_cache.flatten(0, 1)[slots] = k, v
            o = []
            for r in range(R):
                t0, t1, n = int(cu_seqlens_q[r]), int(cu_seqlens_q[r + 1]), int(seqlens_k[r])
                first = max(0, n - (t1 - t0) - self.window + 1) if self.window else 0
                keys_at = torch.arange(first, n)
                at = block_table[r, keys_at // size].long() * size + keys_at % size
                o.append(_attended(q[t0:t1], k_cache.flatten(0, 1)[at], v_cache.flatten(0, 1)[at], positions[t0:t1], keys_at, self.window))
            x = x + torch.cat(o) @ WEIGHTS.o[layer]
        x = x[rows]
        return (x / x.norm(dim=-1, keepdim=True)) @ WEIGHTS.head


def make_engine(pages: int = 64, page_size: int = 4, window: int | None = None, **options: object) -> Engine:
    cache = PagedCache([LayerShape(HEADS, D, DV, torch.float64)] * LAYERS, page_size, pages)
    toy = Toy(cache, window)
    engine = Engine(toy, cache, vocabulary=VOCABULARY, window=window, **{"run_ahead": RUN_AHEAD, **options})  # type: ignore[arg-type]
    toy.manager = engine.manager
    return engine


def expected(request: Request, window: int | None = None) -> list[int]:
    return list(alone(tuple(request.prompt), request.params, request.seed, window))
