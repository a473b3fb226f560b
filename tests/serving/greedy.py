"""The plainest way to generate with a serving model: every request has pages of its own from the start, and all run in lockstep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.serving import ServingModel

PAGE_SIZE = 16


Context = Sequence[tuple[Tensor, Tensor]]
"""What ``encode`` gives for one request."""


def generate(serving: ServingModel, prompts: Sequence[Sequence[int]], new_tokens: int, chunk: int, contexts: Sequence[Context] = ()) -> list[list[int]]:
    """Greedy continuations; prompts are fed ``chunk`` tokens at a time, beside the generated tokens of requests that are further. Unused cache is NaN."""
    width = -(-(max(map(len, prompts)) + new_tokens) // PAGE_SIZE)
    pages = torch.randperm(len(prompts) * width, generator=torch.Generator().manual_seed(1)).view(len(prompts), width).int()
    caches = serving.new_caches(pages.numel(), PAGE_SIZE)
    for pair in caches:
        for x in pair:
            x.fill_(torch.nan)
    others, lengths_of_others = _filled(serving, caches, contexts)
    texts = [list(p) for p in prompts]
    done = [0] * len(texts)
    ends = [len(p) + new_tokens for p in prompts]
    while active := [r for r, text in enumerate(texts) if len(text) < ends[r]]:
        counts = [min(chunk, len(texts[r]) - done[r]) for r in active]
        tokens = torch.tensor([t for r, n in zip(active, counts, strict=True) for t in texts[r][done[r] : done[r] + n]])
        positions = torch.tensor([p for r, n in zip(active, counts, strict=True) for p in range(done[r], done[r] + n)])
        owners = torch.tensor([r for r, n in zip(active, counts, strict=True) for _ in range(n)])
        slots = pages[owners, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
        for r, n in zip(active, counts, strict=True):
            done[r] += n
        bounds = torch.tensor([0, *counts]).cumsum(0).int()
        lengths = torch.tensor([done[r] for r in active]).int()
        cross = (others[active], lengths_of_others[active]) if contexts else None
        logits = serving.run(tokens, positions, slots, pages[active], bounds, lengths, caches, rows=bounds[1:].long() - 1, cross=cross)
        for r, best in zip(active, logits.argmax(-1).tolist(), strict=True):
            if done[r] == len(texts[r]):
                texts[r].append(best)
    return [text[len(p) :] for text, p in zip(texts, prompts, strict=True)]


def _filled(serving: ServingModel, caches: list[tuple[Tensor, Tensor]], contexts: Sequence[Context]) -> tuple[Tensor, Tensor]:
    """Caches of their own for layers that read another sequence, with block table and lengths."""
    lengths = [len(c[0][0]) for c in contexts]
    width = max((-(-n // PAGE_SIZE) for n in lengths), default=0)
    table = torch.arange(len(contexts) * width).flip(0).view(len(contexts), width).int()
    crossing = [i for i, layer in enumerate(serving.layers) if layer.cross]
    for n, i in enumerate(crossing):
        pair = tuple(torch.full((table.numel(), PAGE_SIZE, *x.shape[2:]), torch.nan) for x in caches[i])
        for r, context in enumerate(contexts):
            place = torch.arange(lengths[r])
            for cache, x in zip(pair, context[n], strict=True):
                cache[table[r, place // PAGE_SIZE].long(), place % PAGE_SIZE] = x
        caches[i] = (pair[0], pair[1])
    return table, torch.tensor(lengths).int()
