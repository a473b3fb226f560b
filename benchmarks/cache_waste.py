"""How much of a paged KV cache is allocated and holds no token, on ragged traffic, beside contiguous caches for the same requests. No model runs.

Lengths are drawn from log-normal distributions, as in chat traffic: many short texts and a few long ones. Each step's figure counts by its size.
``padded`` is a contiguous cache [requests, longest now]; ``reserved`` one that has room for prompt and all new tokens of each request, padded to the largest.

    python benchmarks/cache_waste.py [--requests 400] [--page-sizes 8,16,32,64]
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from torch import Tensor

from attnopt.runtime import Engine, LayerShape, PagedCache, SamplingParams, Statistics

SLOTS = 32768


def lengths(rng: random.Random, median: float, spread: float, most: int) -> int:
    return max(1, min(most, int(rng.lognormvariate(0, spread) * median)))


def traffic(page_size: int, requests: int, seed: int = 0) -> Statistics:
    """Requests that arrive about as fast as they end, through a cache of 32,768 slots."""
    rng = random.Random(seed)

    def run(tokens: Tensor, positions: Tensor, slots: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, seqlens_k: Tensor, rows: Tensor) -> Tensor:
        return torch.zeros(len(rows), 1)

    cache = PagedCache([LayerShape(1, 1, 1)], page_size, SLOTS // page_size)
    engine = Engine(run, cache, vocabulary=50000, token_budget=2048, chunk=512, max_requests=64)
    left = requests
    while left or engine.scheduler.busy:
        while left and len(engine.scheduler.waiting) < 4 and rng.random() < 0.3:
            prompt = [rng.randrange(50000) for _ in range(lengths(rng, 300, 0.9, 4000))]
            engine.add(prompt, SamplingParams(max_new_tokens=lengths(rng, 120, 0.8, 1000)))
            left -= 1
        engine.step()
    engine.manager.check()
    return engine.statistics()


def row(page_size: int, requests: int) -> dict[str, Any]:
    s = traffic(page_size, requests)
    return {
        "page size": page_size,
        "requests": s.finished,
        "steps": s.steps,
        "peak cache use": s.peak_pages / s.usage.pages,
        "preempted": s.preemptions,
        "paged waste": s.mean_waste,
        "padded waste": s.mean_padded_waste,
        "reserved waste": s.mean_reserved_waste,
    }


def main() -> None:
    from common import show, write

    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--page-sizes", default="8,16,32,64")
    options = parser.parse_args()
    rows = [row(int(size), options.requests) for size in options.page_sizes.split(",")]
    show("Slots allocated and not filled, as a part of those allocated", rows)
    write("cache_waste", rows, slots=SLOTS)


if __name__ == "__main__":
    main()
