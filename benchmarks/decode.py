"""Attention of one generated token over a KV cache, side by side in one process: attnopt over contiguous and paged caches, and every installed peer.

GB/s are bytes of keys, values and scales that a call must read, over its time; ``of copy`` is their ratio to a large copy's bytes read and written per
second, timed in the same rounds. ``eager``: calls behind one another, each launched by the host, so that what a call costs the host is in its
time where the device is faster. ``graph``: one CUDA graph of as many calls. All ways take turns in rounds, and figures are medians. L2 is cold: calls
rotate among so many caches (a window: parts of caches) that three times the size of L2 is read before one comes again. All results are
compared with float64 first, for every request; where attnopt is wrong nothing is timed.

    python benchmarks/decode.py [--cells REGEX] [--seconds S] [--output FILE]
    python benchmarks/decode.py --device cpu --quick
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, provenance, save, show
from decode_cells import QUICK, SHAPES, VARIANTS, Inputs, Shape, error, pools_needed
from decode_ways import PEERS, Way, own
from peers import Cannot
from running import message, patience
from torch import Tensor
from variants import WINDOW

WRONG = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Errors from which a result is not the same function."""
COPY = 1 << 30
"""Bytes of the large copy: read once and written once."""
CALLS = 16
"""At least so many to a measurement, while they are short."""

Measured = Callable[[], object]


# ------------------------------------------------------------------------------------------------ timing


def graph_of(way: Way, calls: int) -> Measured:
    """A CUDA graph of ``calls`` calls. They have run before, so that nothing is compiled while it records."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        way.call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for n in range(calls):
            way.call(n)

    def replay(held: Way = way) -> None:
        """``held``: the graph reads tensors, block tables say, that nobody else may have."""
        graph.replay()

    return replay


def eager_of(way: Way, calls: int) -> Measured:
    def run() -> None:
        for n in range(calls):
            way.call(n)

    return run


def milliseconds(device: torch.device, f: Measured) -> float:
    """Between two events around f, the device idle before it."""
    if device.type != "cuda":
        start = time.perf_counter()
        f()
        return (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    f()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def in_turn(device: torch.device, functions: dict[Any, Measured], seconds: float, most: int = 60) -> dict[Any, list[float]]:
    """Milliseconds of every function by round; the first runs last in the next round, and so on. On a GPU two rounds before are not counted."""
    times: dict[Any, list[float]] = {name: [] for name in functions}
    names = list(functions)
    least, before = (5, 2) if device.type == "cuda" else (1, 0)
    for _ in range(before):
        for name in names:
            milliseconds(device, functions[name])
    start, r = time.perf_counter(), 0
    while r < least or (r < most and time.perf_counter() - start < seconds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            times[name].append(milliseconds(device, functions[name]))
        r += 1
    return times


def calls_of(way: Way, size: int, device: torch.device) -> int:
    """Calls to a measurement: whole rotations."""
    return way.turns * max(1, -(-(CALLS if size < 1 << 30 and device.type == "cuda" else 1) // way.turns))


def copying(device: torch.device, size: int) -> Measured:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


# ------------------------------------------------------------------------------------------------ one cell


def checked(way: Way, inputs: Inputs, truths: dict[Any, Tensor]) -> float:
    """The error of the first and of the last call of a rotation, the worse."""
    worst = 0.0
    for n in {0, way.turns - 1}:
        key = (way.layout.name, way.variant, way.keys, n)
        if key not in truths:
            truths[key] = inputs.truth(way.seen(n, inputs), way.variant, n % inputs.count, way.keys)
        found = error(way.call(n), truths[key])
        worst = found if not found <= worst else worst
    return worst


def describe(shape: Shape, way: Way, options: argparse.Namespace) -> dict[str, Any]:
    size = shape.bytes_read(way.variant, options.torch_dtype.itemsize)
    if way.keys is not None:
        size = size * way.keys // shape.ctx
    return {
        "cell": shape.name, "B": shape.B, "ctx": shape.ctx, "Hq": shape.Hq, "Hkv": shape.Hkv, "D": shape.D, "dtype": options.dtype, "backend": way.name, "by": way.by,
        "layout": way.layout.name, "variant": way.variant, "keys": way.keys, "bytes": size, "mode": "", "us": None, "gbs": None, "of_copy": None, "error": None,
        "status": "ok", "note": "", "l2": "cold" if options.device == "cuda" else None,
    }  # fmt: skip


def inputs_of(shape: Shape, options: argparse.Namespace) -> tuple[Inputs, int]:
    device = torch.device(options.device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    sizes = (16, 64) if options.layouts is None else tuple(int(m[1]) for m in re.finditer(r"pages of (\d+)", options.layouts))
    count = pools_needed(shape, cache, options.torch_dtype.itemsize) if device.type == "cuda" else 2
    return Inputs(shape, device, options.torch_dtype, count, sizes), cache


def ways_of(inputs: Inputs, cache: int, options: argparse.Namespace) -> tuple[list[Way], list[dict[str, Any]]]:
    """Everybody who can compute the cell, and a row for each who cannot."""
    shape, rows = inputs.shape, []
    ways = [own(inputs, layout) for layout in inputs.layouts.values()]
    paged = inputs.layouts[f"pages of {inputs.page_sizes[0]}"] if inputs.page_sizes else inputs.layouts["contiguous"]
    for variant in options.variants.split(","):
        if variant:
            ways.append(own(inputs, paged, variant, cache_bytes=cache))
        if variant.startswith("window") and shape.ctx > WINDOW:
            ways.append(own(inputs, paged, keys=WINDOW, cache_bytes=cache))
    for name in filter(None, options.peers.split(",")):
        for layout in inputs.layouts.values():
            way = Way(name, "peer", layout, "plain", lambda n: torch.empty(0), inputs.count)
            try:
                with patience(options.patience):
                    ways.append(Way(name, "peer", layout, "plain", PEERS[name](inputs, layout), inputs.count))
            except Cannot as e:
                rows.append({**describe(shape, way, options), "status": "cannot", "note": str(e)})
            except Exception as e:  # noqa: BLE001 - a peer may raise anything; its message stands in its row
                rows.append({**describe(shape, way, options), "status": "failed", "note": message(e)})
    return ways, rows


def measure(shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one cell. Raises SystemExit where attnopt's result is wrong."""
    device = torch.device(options.device)
    inputs, cache = inputs_of(shape, options)
    ways, rows = ways_of(inputs, cache, options)
    truths: dict[Any, Tensor] = {}
    functions: dict[Any, Measured] = {}
    per: dict[Any, tuple[dict[str, Any], int]] = {}
    for way in ways:
        row = describe(shape, way, options)
        try:
            with patience(options.patience):
                row["error"] = checked(way, inputs, truths)
        except Exception as e:
            if way.by == "attnopt":
                raise
            rows.append({**row, "status": "failed", "note": message(e)})
            continue
        if not row["error"] <= WRONG[options.torch_dtype]:
            if way.by == "attnopt":
                raise SystemExit(f"{shape.name}, {way.name}, {way.layout.name}: error {row['error']:.3g} against float64; nothing is timed.")
            rows.append({**row, "error": None, "status": "wrong", "note": f"error {row['error']:.3g} against float64"})
            continue
        calls = calls_of(way, row["bytes"], device)
        made: dict[str, Callable[[Way, int], Measured]] = {"eager": eager_of} | ({"graph": graph_of} if device.type == "cuda" else {})
        for mode, make in made.items():
            try:
                functions[way, mode] = make(way, calls)
                per[way, mode] = ({**row, "mode": mode}, calls)
            except RuntimeError as e:
                if way.by == "attnopt":
                    raise
                rows.append({**row, "mode": mode, "status": "failed", "note": message(e)})
    size = COPY if device.type == "cuda" else 1 << 20
    times = in_turn(device, functions | {"copy": copying(device, size)}, options.seconds)
    copy = 2 * size / statistics.median(times.pop("copy")) / 1e6
    for key, found in times.items():
        row, calls = per[key]
        us, ordered = statistics.median(found) / calls * 1e3, sorted(found)
        gbs = row["bytes"] / us / 1e3
        quartiles = [x / calls * 1e3 for x in (ordered[len(found) // 4], ordered[-1 - len(found) // 4])]
        rows.append(
            {
                **row,
                "us": us,
                "quartiles": quartiles,
                "gbs": gbs,
                "copy_gbs": copy,
                "of_copy": gbs / copy,
                "rounds": len(found),
                "calls": calls,
                "pools": inputs.count,
            }
        )
    return rows


# ------------------------------------------------------------------------------------------------ all cells


def table(rows: list[dict[str, Any]]) -> None:
    """GB/s by cell and way, eager and under a graph, each beside its ratio to the copy; then what a variant costs per byte."""
    done = [r for r in rows if r["us"]]
    for mode in dict.fromkeys(r["mode"] for r in done):
        mine = [r for r in done if r["mode"] == mode]
        cells = list(dict.fromkeys(r["cell"] for r in mine))
        lines = [{"backend": "copy", "layout": "", **{c: f"{next(r['copy_gbs'] for r in mine if r['cell'] == c):.0f}" for c in cells}}]
        for backend, layout in dict.fromkeys((r["backend"], r["layout"]) for r in mine):
            found = {r["cell"]: r for r in mine if (r["backend"], r["layout"]) == (backend, layout)}
            lines.append(
                {"backend": backend, "layout": layout, **{c: f"{found[c]['gbs']:.0f} {found[c]['of_copy']:.2f}" if c in found else None for c in cells}}
            )
        show(f"{mode}: GB/s of keys and values read, and its ratio to the copy", lines, lines=False)
        if ratios := over_peers(mine):
            show(f"{mode}: attnopt over each peer", ratios, lines=False)
        if ratios := per_byte(mine):
            show(f"{mode}: GB/s of a variant over that of plain attention", ratios, lines=False)


def over_peers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """attnopt's speed over that of a peer on the same layout, by cell."""
    plain = {(r["cell"], r["layout"]): r["gbs"] for r in rows if r["backend"] == "attnopt"}
    cells = list(dict.fromkeys(r["cell"] for r in rows))
    out = []
    for backend, layout in dict.fromkeys((r["backend"], r["layout"]) for r in rows if r["by"] == "peer"):
        found = {r["cell"]: plain[r["cell"], layout] / r["gbs"] for r in rows if (r["backend"], r["layout"]) == (backend, layout)}
        out.append({"peer": backend, "layout": layout, **{c: found.get(c) for c in cells}})
    return out


def per_byte(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each variant against the plain kernel over the same layout; a window also against the plain kernel over as many keys."""
    own_rows = [r for r in rows if r["by"] == "attnopt"]
    out = []
    for cell in dict.fromkeys(r["cell"] for r in own_rows):
        mine = [r for r in own_rows if r["cell"] == cell]
        line: dict[str, Any] = {"cell": cell}
        for r in mine:
            plain = [x for x in mine if x["variant"] == "plain" and x["layout"] == r["layout"]]
            if r["variant"] != "plain":
                line[r["variant"]] = next((r["gbs"] / x["gbs"] for x in plain if x["keys"] is None), None)
            if r["variant"].startswith("window"):
                line["window, plain over its keys"] = next((r["gbs"] / x["gbs"] for x in plain if x["keys"] is not None), None)
        if len(line) > 1:
            out.append(line)
    names = list(dict.fromkeys(k for line in out for k in line))
    return [{n: line.get(n) for n in names} for line in out]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="", help="a regular expression that the cell's name must contain, as 'b1 ctx8k|b16'")
    parser.add_argument("--layouts", default=None, help="layouts, separated by commas: contiguous, pages of 16, pages of 64 (contiguous is always there)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, separated by commas")
    parser.add_argument("--peers", default=",".join(PEERS), help="names, separated by commas")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing for each cell")
    parser.add_argument("--patience", type=int, default=90, help="seconds until something has to be compiled and run once")
    parser.add_argument("--quick", action="store_true", help="tiny cells, to see that everything runs")
    parser.add_argument("--output", type=Path, default=None, help="default: benchmarks/results/decode.json")
    return parser


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    options.torch_dtype = getattr(torch, options.dtype, None)
    if options.torch_dtype not in WRONG:
        parser.error(f"--dtype is {options.dtype}; supported are {', '.join(str(d).removeprefix('torch.') for d in WRONG)}.")
    for name, given, known in (
        ("--peers", options.peers, PEERS),
        ("--variants", options.variants, VARIANTS),
    ):
        if unknown := [x for x in given.split(",") if x and x not in known]:
            parser.error(f"{name} has {', '.join(unknown)}; there are {', '.join(known)}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/decode.py times on a CUDA device, and PyTorch sees none; --device cpu --quick tries the script.")
    every = QUICK if options.quick else SHAPES
    chosen = [s for s in every if re.search(options.cells, s.name)]
    if not chosen:
        parser.error(f"--cells {options.cells!r} names no cell; there are {', '.join(s.name for s in every)}.")
    output = options.output or RESULTS / "decode.json"
    about = provenance()
    print(f"{', '.join(s.name for s in chosen)} on {about['device']}, L2 cold, commit {about['commit']}, {about['versions']}", flush=True)
    rows: list[dict[str, Any]] = []
    for shape in chosen:
        start = time.time()
        rows += measure(shape, options)
        save(output, rows, **about)
        print(f"{shape.name}: {time.time() - start:.0f} s", flush=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    for reason in dict.fromkeys(f"{r['backend']}, {r['layout']}: {r['status']}, {r['note']}" for r in rows if r["status"] != "ok"):
        print(reason[:180])
    table(rows)


if __name__ == "__main__":
    main()
