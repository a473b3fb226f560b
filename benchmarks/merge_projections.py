"""Query, key and value projections one by one against one product over their weights, by width and sequence length.

Both forms run in turn, so that a machine whose speed drifts is fair to both; quoted are medians over pairs.

    python benchmarks/merge_projections.py [--device cpu] [--threads 1] [--lengths 1,16,128,512] [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import show, write
from torch import Tensor

from attnopt.kernels.linear import merged_linear, pack

WIDTHS = ((512, 512), (1024, 256), (2048, 512))
"""Of the hidden state and the queries, and of keys and of values."""


def seconds(run: Callable[[], Any], times: int, device: str) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def measure(width: int, kv: int, length: int, device: str, rounds: int) -> dict[str, Any]:
    x = torch.randn(1, length, width, device=device)
    weights = [torch.randn(n, width, device=device) for n in (width, kv, kv)]
    apart = [w.clone() for w in weights]
    none: list[Tensor | None] = [None] * 3
    assert pack(weights)

    def merged() -> object:
        return merged_linear(x, weights, none)

    def separate() -> object:
        return [F.linear(x, w) for w in apart]

    once = max(seconds(f, 3, device) for f in (merged, separate))
    times = max(1, round(0.02 / once))
    pairs = [(seconds(separate, times, device), seconds(merged, times, device)) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    quarter = len(ratios) // 4
    return {
        "width": width,
        "kv": kv,
        "S": length,
        "separate ms": statistics.median(a for a, _ in pairs) * 1e3,
        "merged ms": statistics.median(b for _, b in pairs) * 1e3,
        "faster": statistics.median(ratios),
        "quartiles": f"{ratios[quarter]:.2f}..{ratios[-1 - quarter]:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", default="1,16,128,512")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        rows = [measure(width, kv, int(s), options.device, options.rounds) for width, kv in WIDTHS for s in options.lengths.split(",")]
    show(f"q, k and v projections, {options.device}, float32, batch 1", rows)
    write("merge_projections" if options.device == "cpu" else f"merge_projections_{options.device}", rows, threads=options.threads)


if __name__ == "__main__":
    main()
