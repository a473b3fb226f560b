"""The host's part of an eager call of an attention, without a GPU: from the call to the launch of its kernels, which are stand-ins (``host_stand_ins.py``).

Rows are what a graph calls (``graph``: an FX graph of one attention with its kernel chosen, and its map of blocks given), the kernel's own function (``kernel``; ``portable`` of the Triton kernels), one of several attentions of a graph (``layers``), and one token over a cache (``paged``). Two
checkouts are compared in processes of their own, in turn, round by round: a row has the microseconds of both, the median of the rounds, and the median of the rounds' ratios.

    python benchmarks/host.py [--against CHECKOUT] [--rounds 7] [--cells graph,paged] [--output FILE]
    python benchmarks/host.py --profile graph/ALiBi

``CHECKOUT`` is another work tree (``git worktree add``). Results go to benchmarks/results/host.json.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, save, show

CALLS = 300
LAYERS = 8
"""Attentions of a graph whose rows (``layers``) are of one of them."""
BATCHES = 9
"""The least of so many batches of ``CALLS`` calls is a figure of one round."""


def cells() -> dict[str, Callable[[], Any]]:
    """The calls by name, ready to be repeated. Small tensors: what the CPU computes in place of a GPU is next to nothing."""
    import host_stand_ins
    from cells import Cell, Inputs
    from decode_cells import Inputs as DecodeInputs
    from decode_cells import Shape
    from decode_ways import own as decode
    from own import graph_of, own

    from attnopt import OptimizeConfig
    from attnopt.emit.direct import call_directly
    from attnopt.kernels.gluon import launch as gluon
    from attnopt.kernels.triton import launch as portable
    from attnopt.passes.pipeline import lowered

    host_stand_ins.install()
    device, found = torch.device("cpu"), {}
    shapes = {"plain": (1, 4, 4, 64), "ALiBi": (1, 4, 4, 64), "T5 table": (1, 4, 4, 64), "ragged padding": (2, 4, 4, 64), "documents": (1, 4, 4, 64)}
    for name, (B, Hq, Hkv, S) in shapes.items():
        cell = Cell("host", B, Hq, Hkv, S, 64, name in ("plain", "ALiBi", "documents"), name)
        inputs = Inputs.of(cell, device, torch.bfloat16, 1)
        q, k, v, _ = inputs.sets[0]
        ready, spec = own("gluon", True)(inputs), cell.spec()
        found[f"graph/{name}"] = lambda call=ready.function, a=(q, k, v): call(*a)
        found[f"kernel/{name}"] = lambda a=(q, k, v, inputs.loads, [], spec): gluon.attention(*a)
        found[f"portable/{name}"] = lambda a=(q, k, v, inputs.loads, [], spec): portable.attention(*a)
        if name == "plain":
            call = own("cudnn", True)(inputs).function
            found["graph/plain by cudnn"] = lambda call=call, a=(q, k, v): call(*a)
        if name == "T5 table":
            layers = lowered(graph_of(inputs, False, LAYERS), OptimizeConfig(backend="gluon"))
            call_directly(layers.graph)
            layers.recompile()
            found[f"layers/{name}"] = lambda call=layers, a=(q, k, v, *inputs.loads): call(*a)
    held = DecodeInputs(Shape(1, 1024, 8, 2, 64), device, torch.bfloat16, 1)
    for name in ("contiguous", "pages of 16"):
        way = decode(held, held.layouts[name])
        found[f"paged/{name}"] = lambda way=way: way.call(0)
    return found


def measure(chosen: list[str]) -> dict[str, float]:
    """Microseconds of each call."""
    torch.set_num_threads(1)
    out = {}
    with torch.no_grad():
        for name, call in cells().items():
            if not any(name.startswith(x) for x in chosen):
                continue
            for _ in range(50):
                call()
            took = []
            for _ in range(BATCHES):
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                took.append((time.perf_counter() - start) / CALLS)
            out[name] = min(took) * 1e6 / (LAYERS if name.startswith("layers") else 1)
    return out


def profile(name: str) -> None:
    call = cells()[name]
    with torch.no_grad():
        for _ in range(50):
            call()
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(2000):
            call()
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(35)


def in_turn(checkouts: dict[str, Path], rounds: int, chosen: str) -> dict[str, list[dict[str, float]]]:
    """By label, the figures of each round. Each process measures all cells in one checkout; the benchmark itself is that of this one."""
    found: dict[str, list[dict[str, float]]] = {label: [] for label in checkouts}
    for _ in range(rounds):
        for label, path in checkouts.items():
            env = os.environ | {"PYTHONPATH": f"{path}", "OMP_NUM_THREADS": "1"}
            done = subprocess.run([sys.executable, __file__, "--worker", "--cells", chosen], env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{label} failed:\n{done.stderr[-3000:]}")
            found[label].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def commit_of(path: Path) -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=path, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, whose figures are the row's 'before'")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cells", default="graph,layers,kernel,portable,paged", help="the first words of the rows' names")
    parser.add_argument("--profile", metavar="NAME")
    parser.add_argument("--output", type=Path, default=RESULTS / "host.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.profile:
        profile(options.profile)
        return
    if options.worker:
        print(json.dumps(measure(options.cells.split(","))))
        return
    checkouts = {**({} if options.against is None else {"before": options.against.resolve()}), "now": ROOT}
    found = in_turn(checkouts, options.rounds, options.cells)
    rows = []
    for name in found["now"][0]:
        row: dict[str, Any] = {"call": name}
        for label, results in found.items():
            row[f"{label}_us"] = statistics.median(r[name] for r in results)
        if "before" in found:
            ratios = [b[name] / a[name] for b, a in zip(found["before"], found["now"], strict=True)]
            row |= {"times_faster": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        rows.append(row)
    show("Host time of an eager call", rows)
    save(options.output, rows, rounds=options.rounds, commits={label: commit_of(path) for label, path in checkouts.items()})


if __name__ == "__main__":
    main()
