"""Launch settings of the decode kernel on a CUDA device, side by side: how ``launch_paged.config`` and ``splits`` came about.

For each cell (a shape, a layout, a variant of ``decode.py``) every setting is compiled first, side by side in processes, and compared with float64; then all are
timed in turn, beside the copy, a kernel that only reads as many bytes (``read``), and cuDNN where the cache is contiguous. L2 is cold, as in ``decode.py``.

``us``: of a call in a CUDA graph of calls behind one another, where a kernel may be put in place while the one before it ends.
``alone``: of a call behind a kernel of PyTorch that writes its query, in a graph; the time of that kernel by itself is taken off.
GB/s are bytes of keys, values and scales over ``us``. Settings are named by what differs from the usual ones: N, W, S and x are BLOCK_N, warps, stages and splits,
R the warps of the reduction, ``warm``, ``ahead``, ``once`` and ``half`` those of ``launch_paged.Config``, and ``by head`` is a layout of scales (``decode_ways.own``).

    python benchmarks/decode_probe.py [--only REGEX] [--settings REGEX] [--seconds 3] [--jobs 12] [--output FILE]
    TRITON_INTERPRET=1 python benchmarks/decode_probe.py --device cpu --quick
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from common import RESULTS, provenance, save, show
from decode import COPY, WRONG, Measured, calls_of, checked, copying, graph_of, in_turn
from decode_cells import DTYPES, Inputs, Shape, pools_needed
from decode_ways import PEERS, Way, own
from running import message
from torch import Tensor
from variants import WINDOW

from attnopt.kernels.triton.launch import SHARED_MEMORY_SM90, power_of_two
from attnopt.kernels.triton.launch_paged import config

FIELDS = {"N": "BLOCK_N", "W": "num_warps", "S": "num_stages", "warm": "warm", "ahead": "ahead", "R": "reduce_warps"}
FLAGS = ("half", "once")


@dataclass(frozen=True)
class Cell:
    """``keys``: the first so many of each request alone."""

    name: str
    shape: Shape
    layout: str
    variant: str
    settings: tuple[str, ...]
    keys: int | None = None


USUAL = ("", "ahead2", "warm1", "warm2", "warm3", "warm1 ahead2", "warm2 ahead2", "warm3 ahead2")
SMALL = (
    *("R8", "R8 warm2 ahead2", "R8 x64 warm2 ahead2", "x16", "x22", "x32", "x43", "x64", "N128 W8 x16", "N128 W8 x32", "N128 W4 S2 x32", "N32 x43", "N32 x64", "N32 S5 x64", "N64 S4 x32", "N64 S5 x16", "N64 W8 S4 x32"),
    *("x22 warm3 ahead3", "x32 warm4 ahead3", "x64 warm2 ahead2", "N128 W8 x16 warm2 ahead2", "N128 W8 x32 warm2 ahead2", "N32 x64 warm2 ahead2", "N64 S4 x32 warm4 ahead3"),
    *("once", "x16 once", "x32 once", "warm2 ahead2 once", "warm3 ahead2 once", "x16 warm4 ahead3 once", "x32 warm3 ahead3 once", "N64 S4 x32 warm4 ahead3 once", "x64 warm2 once", "W8 S4 x32 warm3 ahead3"),
)
NARROW = (
    *("", "warm1", "warm2", "warm2 ahead1", "x8", "x16", "x16 warm1", "x4 warm4", "x8 warm2 ahead1", "N32 x16", "N32 x16 warm2", "N32 x32", "N32 x32 warm1"),
    *("N16 x32 warm2", "N16 x64 warm1", "N128 W8 x8", "N128 W8 x8 warm1", "W8 x16", "W8 x16 warm1", "once", "x16 once", "x16 warm1 once", "x8 warm2 ahead1 once", "N32 x32 warm1 once"),
)
LARGE = (
    *("", "warm1", "warm2", "warm2 ahead2", "x1", "x2", "x3", "x6", "S4 x1", "S5 x1", "S6 x1", "N128 W8 x1", "N128 W8 S4 x1", "N128 W8 x2", "N128 W4 x1", "N128 W4 S2 x1", "N128 W4 S2 x2", "W8 S4 x1", "N32 S6 x3"),
    *("x1 warm2 ahead2", "S5 x1 warm4 ahead2", "N128 W8 x1 warm2 ahead2", "N128 W8 S4 x1 warm2 ahead2", "N128 W8 S4 x1 warm3", "S4 x2 warm2", "once", "warm2 ahead2 once"),
)
LONG = (
    *("", "warm2", "warm2 ahead2", "x16", "S4 x16", "S5 x16", "S6 x16", "S4 x32", "N128 W8 x16", "N128 W8 S4 x16", "N128 W4 x16", "N128 W4 S2 x32", "x49", "x98", "W8 S4 x16", "once"),
    *("N128 W8 x16 warm2 ahead2", "N128 W8 S4 x16 warm3 ahead2", "S4 x32 warm3 ahead2", "N128 W8 x16 once", "N128 W8 x16 warm2 ahead2 once"),
)
BYTES = (
    *("", "by head", "half", "half by head", "half by head S4", "half by head S5", "N128 W8", "half N128 W8", "half by head N128 W8", "half by head N128 W8 S4"),
    *("N128 W4", "half N128 W4", "half by head N128 W4", "half by head N128 W4 S2", "half by head N128 W4 x1", "half by head N128 W4 S4 x1", "half by head N128 W4 x2"),
    *("half by head N128 W4 x32", "half by head N128 W4 x32 warm2 ahead1", "half N128 W4 x32 warm2 ahead1", "half by head N128 W4 x16 warm4 ahead3"),
    *("half by head x1", "half by head N128 W8 x1", "half by head N128 W8 S4 x1", "half warm2 ahead2", "half by head warm2 ahead2", "half by head warm3 ahead2"),
    *("half by head N128 W8 warm2 ahead2", "half by head x16 warm4 ahead2", "half by head x32 warm3 ahead2", "half by head warm2 ahead2 once"),
)
ONE, MANY, MOST = Shape(1, 8192), Shape(16, 8192), Shape(64, 8192)
CELLS = [
    Cell("b1 8k", ONE, "contiguous", "plain", (*USUAL, *SMALL)),
    Cell("b1 8k, pages", ONE, "pages of 16", "plain", (*USUAL, *SMALL)),
    Cell("b1 window", ONE, "pages of 16", f"window {WINDOW}", NARROW),
    Cell("b1 1k", ONE, "pages of 16", "plain", NARROW, WINDOW),
    *(Cell(f"b1 8k {x}", ONE, "pages of 16", x, BYTES) for x in DTYPES),
    Cell("b16 8k", MANY, "contiguous", "plain", LARGE),
    Cell("b16 8k, pages", MANY, "pages of 16", "plain", LARGE),
    Cell("b1 128k", Shape(1, 131072), "contiguous", "plain", LONG),
    Cell("b64 8k", MOST, "contiguous", "plain", LARGE),
    *(Cell(f"b64 8k {x}", MOST, "pages of 16", x, BYTES) for x in DTYPES),
]
TINY = Shape(1, 128, 4, 2, 32)
QUICK = [
    Cell("plain", TINY, "contiguous", "plain", ("", "warm2 ahead1", "x3", "N32 x2 once")),
    Cell("pages", TINY, "pages of 16", "plain", ("", "N32 x3 warm1 ahead2", "once")),
    *(Cell(x, TINY, "pages of 16", x, ("", "half", "half by head x2", "half x3 once")) for x in DTYPES),
]


def way_of(setting: str, inputs: Inputs, cell: Cell, cache_bytes: int) -> Way:
    """The kernel so launched. ``setting`` is words, as ``N128 W8 x16 warm2 half by head``."""
    words = setting.replace("by head", "by-head").split()
    splits, changes = None, {}
    for word in words:
        m = re.fullmatch(r"([A-Za-z]+)(\d+)", word)
        if m is None:
            if word not in (*FLAGS, "by-head"):
                raise ValueError(f"{setting!r} has {word!r}; there are {', '.join((*FIELDS, 'x', *FLAGS))} and by head.")
            changes |= {word: True} if word in FLAGS else {}
        elif m[1] == "x":
            splits = int(m[2])
        else:
            changes[FIELDS[m[1]]] = int(m[2])
    s = inputs.shape
    memory = torch.cuda.get_device_properties(inputs.device).shared_memory_per_block_optin if inputs.device.type == "cuda" else SHARED_MEMORY_SM90
    usual = config(s.D, s.D, s.Hq // s.Hkv, 1, inputs.dtype, memory)
    return own(inputs, inputs.layouts[cell.layout], cell.variant, cell.keys, cache_bytes, replace(usual, **changes), splits, "by-head" in words)


def inputs_of(cell: Cell, options: argparse.Namespace, count: int | None = None) -> tuple[Inputs, int]:
    device = torch.device(options.device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    count = count or (pools_needed(cell.shape, cache, options.torch_dtype.itemsize) if device.type == "cuda" else 2)
    return Inputs(cell.shape, device, options.torch_dtype, count, (16,)), cache


def compile_one(job: tuple[int, str, argparse.Namespace]) -> None:
    """Runs a setting once, which leaves its code in Triton's cache. What it raises the measurement raises again."""
    cell = CELLS[job[0]]
    try:
        inputs, cache = inputs_of(cell, job[2], 1)
        way_of(job[1], inputs, cell, cache).call(0)
        torch.cuda.synchronize()
    except Exception as e:  # noqa: BLE001 - whatever it is, it is printed, and stands beside the setting in the table
        print(f"{cell.name}, {job[1]}: {message(e)}", flush=True)


# ------------------------------------------------------------------------------------------------ what they are measured by


@triton.jit
def read_only(K, V, OUT, words, each, BLOCK: tl.constexpr):
    """Reads BLOCK of the ``words`` 4-byte words of K or of V a program; nobody asks for the sum, and it is never written but by chance."""
    part = tl.program_id(0) % each
    at = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) < each:
        found = tl.load(K + at, mask=at < words, other=0)
    else:
        found = tl.load(V + at, mask=at < words, other=0)
    total = tl.sum(found, 0)
    tl.store(OUT, total, mask=total == 0x7EADBEEF)


def reading(inputs: Inputs, cell: Cell, like: Way) -> Way:
    """A kernel that reads all keys and values of a pool, without their scales."""
    held = [[x.view(torch.int32).flatten() for x in (p.k, p.v)] for p in inputs.pools_of(cell.variant)]
    out = torch.zeros(1, dtype=torch.int32, device=inputs.device)

    def call(n: int) -> Tensor:
        k, v = held[n % inputs.count]
        each = triton.cdiv(k.numel(), 4096)
        read_only[(2 * each,)](k, v, out, k.numel(), each, BLOCK=4096, num_warps=4)
        return out

    return replace(like, name="read", call=call)


def behind_another(way: Way, inputs: Inputs, calls: int) -> Measured:
    """A graph in which a kernel of PyTorch writes each call's query, with the values that it has."""
    return graph_of(replace(way, call=lambda n: (inputs.queries[n % inputs.count].mul_(1.0), way.call(n))[1]), calls)


def bytes_of(cell: Cell, dtype: torch.dtype) -> int:
    size = cell.shape.bytes_read(cell.variant, dtype.itemsize)
    return size if cell.keys is None else size * cell.keys // cell.shape.ctx


def measure(cell: Cell, options: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    inputs, cache = inputs_of(cell, options)
    size, truths = bytes_of(cell, options.torch_dtype), {}
    rows: list[dict[str, Any]] = []
    functions: dict[Any, Measured] = {}
    calls: dict[Any, int] = {}

    def add(way: Way, row: dict[str, Any]) -> None:
        key = len(rows)
        rows.append({"cell": cell.name, "shape": cell.shape.name, "layout": cell.layout, "variant": cell.variant, "keys": cell.keys, "bytes": size, "note": "", **row})
        calls[key] = calls_of(way, size, device)
        if device.type == "cuda":
            functions[key, "us"] = graph_of(way, calls[key])
            functions[key, "alone"] = behind_another(way, inputs, calls[key])

    for setting in cell.settings:
        if not re.search(options.settings, setting):
            continue
        try:
            way = way_of(setting, inputs, cell, cache)
            error = checked(way, inputs, truths)
            note = "" if error <= WRONG[options.torch_dtype] else "wrong"
            if note:
                rows.append({"cell": cell.name, "setting": setting, "error": None if error != error else error, "note": note})
                continue
            add(way, {"setting": setting, "error": error})
        except Exception as e:  # noqa: BLE001 - too much shared memory, say: its message stands in its row
            rows.append({"cell": cell.name, "setting": setting, "error": None, "note": message(e)})
    peer = Way("", "peer", inputs.layouts[cell.layout], cell.variant, lambda n: torch.empty(0), inputs.count)
    if device.type == "cuda":
        if cell.keys is None and not cell.variant.startswith("window"):
            read = reading(inputs, cell, peer)
            read.call(0)
            only = 2 * cell.shape.B * cell.shape.ctx * cell.shape.Hkv * cell.shape.D * (1 if cell.variant in DTYPES else options.torch_dtype.itemsize)
            add(read, {"setting": "read", "error": None, "bytes": only})
        if cell.layout == "contiguous":
            dense = replace(peer, call=PEERS["cuDNN SDPA"](inputs, peer.layout))
            add(dense, {"setting": "cuDNN", "error": checked(dense, inputs, truths)})
        empty = replace(peer, call=lambda n: torch.empty(0))
        functions["before"] = behind_another(empty, inputs, calls_of(peer, size, device))
        functions["copy"] = copying(device, COPY)
    if device.type == "cuda":
        times = in_turn(device, functions, options.seconds, 40)
        copy = 2 * COPY / statistics.median(times["copy"]) / 1e6
        before = statistics.median(times["before"]) / calls_of(peer, size, device) * 1e3
        for i, row in enumerate(rows):
            if (i, "us") not in times:
                continue
            us, behind = (statistics.median(times[i, x]) / calls[i] * 1e3 for x in ("us", "alone"))
            ordered = sorted(times[i, "us"])
            spread = (ordered[-1 - len(ordered) // 4] - ordered[len(ordered) // 4]) / calls[i] * 1e3
            gbs = row["bytes"] / us / 1e3
            row |= {"us": us, "spread": spread, "gbs": gbs, "of_copy": gbs / copy, "alone": behind - before, "copy_gbs": copy}
    return sorted(rows, key=lambda r: r.get("us") or 1e30)


def table(cell: Cell, rows: list[dict[str, Any]]) -> None:
    def number(x: float | None, digits: int) -> str:
        return "" if x is None else f"{x:.{digits}f}"

    usual = next((r.get("us") for r in rows if r["setting"] == ""), None)
    lines = [
        {
            "setting": r["setting"] or "(usual)",
            "us": number(r.get("us"), 2),
            "spread": number(r.get("spread"), 2),
            "GB/s": number(r.get("gbs"), 0),
            "of copy": number(r.get("of_copy"), 3),
            "over usual": number(usual / r["us"] if usual and r.get("us") else None, 3),
            "alone": number(r.get("alone"), 2),
            "error": "" if r["error"] is None else f"{r['error']:.2g}",
            "note": r["note"][:60],
        }
        for r in rows
    ]
    show(f"{cell.name} ({cell.shape.name}, {cell.layout}, {cell.variant})", lines, lines=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that the cell's name must contain")
    parser.add_argument("--settings", default="", help="a regular expression that a setting must contain")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing for each cell")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default=None, help="default: bfloat16, or float16 where the interpreter computes")
    parser.add_argument("--quick", action="store_true", help="tiny cells, to see that everything runs")
    parser.add_argument("--output", type=Path, default=None, help="default: decode_probe.json in the folder that OUT names, or benchmarks/results")
    options = parser.parse_args()
    options.torch_dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float16"))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/decode_probe.py times on a CUDA device, and PyTorch sees none; TRITON_INTERPRET=1 ... --device cpu --quick tries the script.")
    every = QUICK if options.quick else CELLS
    chosen = [i for i, c in enumerate(every) if re.search(options.only, c.name)]
    if options.device == "cuda" and not options.quick:
        jobs: list[tuple[int, str, argparse.Namespace]] = []
        known: set[Any] = set()
        for i in chosen:
            c = every[i]
            for setting in c.settings:
                # one compilation serves all shapes and numbers of splits
                what = (re.sub(r"\bx(\d+)", lambda m: f"x{min(power_of_two(int(m[1])), 32)}", setting), c.layout, c.variant, c.shape.ctx if c.layout == "contiguous" else 0)
                if re.search(options.settings, setting) and what not in known:
                    known.add(what)
                    jobs.append((i, setting, options))
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            for _ in pool.imap_unordered(compile_one, jobs):
                pass
        print(f"{len(jobs)} kernels compiled", flush=True)
    about = provenance()
    print(f"{about['device']}, commit {about['commit']}, {about['versions']}", flush=True)
    output = options.output or Path(os.environ.get("OUT") or RESULTS) / "decode_probe.json"
    rows: list[dict[str, Any]] = []
    for i in chosen:
        rows += (found := measure(every[i], options))
        table(every[i], found)
        if options.device == "cuda":
            save(output, rows, **about)
            torch.cuda.empty_cache()
    if wrong := [f"{r['cell']}, {r['setting']}" for r in rows if r["note"] == "wrong"]:
        raise SystemExit(f"Wrong against float64, and not timed: {'; '.join(wrong)}.")


if __name__ == "__main__":
    main()
