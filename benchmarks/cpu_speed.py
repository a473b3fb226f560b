"""Eager against optimized on the CPU: time and peak memory of the Llama example by sequence length.

Each length runs in a process of its own, where both models run in turn. The model is captured once, at a short length.

    python benchmarks/cpu_speed.py [--lengths 512,2048,4096] [--layers 2] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from common import example, show, write

import attnopt
from attnopt.cli.measure import compare


def measure(length: int, layers: int) -> dict[str, Any]:
    llama = example("llama")
    model = llama.model(layers=layers)
    optimized = attnopt.optimize(model, kwargs=llama.example_inputs(batch=1, length=128))
    inputs = llama.example_inputs(batch=1, length=length)
    with torch.no_grad():
        error = (optimized(**inputs) - model(**inputs)).abs().max().item()
    c = compare(model, optimized, (), inputs, seconds=20)
    row: dict[str, Any] = {"S": length, "runs": c.runs, "eager ms": c.original.seconds * 1e3, "optimized ms": c.optimized.seconds * 1e3, "faster": c.speedup}
    for name, m in (("eager", c.original), ("optimized", c.optimized)):
        row[f"{name} peak MiB"] = None if m.peak_bytes is None else m.peak_bytes / 2**20
    return {**row, "less memory": c.memory_ratio, "largest difference": error, "verdict": str(optimized.attnopt_report.verdict)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", default="512,2048,4096")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="fewer than cores where other work runs beside it")
    parser.add_argument("--one", action="store_true", help="measure the given length in this process and print JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(int(options.lengths), options.layers)))
        return
    rows = []
    for length in options.lengths.split(","):
        command = [sys.executable, __file__, "--one", "--lengths", length, "--layers", str(options.layers), "--threads", str(options.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    show(f"Llama example, {options.layers} layers, batch 1, float32", [{k: v for k, v in row.items() if k != "verdict"} for row in rows])
    write("cpu_speed", rows, layers=options.layers)


if __name__ == "__main__":
    main()
