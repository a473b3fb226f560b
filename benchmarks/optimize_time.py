"""How long optimize() takes, stage by stage, and how that grows with depth.

The targets: near linear in the number of layers, and the passes in less than half of the time that capture takes.

    python benchmarks/optimize_time.py [--layers 4,8,16,32] [--no-verify]
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from common import example, show, write

import attnopt


def measure(layers: int, verify: bool) -> dict[str, float]:
    """Seconds per stage for the Llama example of that many layers, at a small size: time that depends on the graph alone."""
    llama = example("llama")
    model = llama.model(layers=layers)
    inputs = llama.example_inputs(batch=2, length=64)
    start = time.perf_counter()
    optimized = attnopt.optimize(model, kwargs=inputs, config=attnopt.OptimizeConfig(verify=verify))
    total = time.perf_counter() - start
    report = optimized.attnopt_report
    assert len(report.replaced) == layers, str(report)
    seconds = report.seconds
    return {"layers": layers, **{f"{k} s": v for k, v in seconds.items()}, "total s": total, "passes / capture": seconds["passes"] / seconds["capture"]}


def growth(rows: list[dict[str, float]], key: str) -> float:
    """The exponent p of time ~ layers^p between the shallowest and the deepest model; 1 is linear."""
    first, last = rows[0], rows[-1]
    return math.log(last[key] / first[key]) / math.log(last["layers"] / first["layers"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", default="4,8,16,32")
    parser.add_argument("--no-verify", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure(1, verify=False)  # imports and caches that are filled once
    rows = [measure(int(n), not options.no_verify) for n in options.layers.split(",")]
    show("optimize() by depth", rows)
    exponents = {key.removesuffix(" s"): growth(rows, key) for key in rows[0] if key.endswith(" s")}
    print("growth (1 is linear): " + ", ".join(f"{k} {v:.2f}" for k, v in exponents.items()))
    write("optimize_time", rows, growth=exponents)


if __name__ == "__main__":
    main()
