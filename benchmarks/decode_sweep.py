"""Launch settings of the decode kernel on a CUDA device, side by side in one process: how ``launch_paged.config`` and ``splits`` came about.

For each cell (a shape, a layout, a variant of ``decode.py``) settings are compiled first, side by side in processes. Each is compared with float64, and those that are right
are timed in turn, in CUDA graphs with cold L2 as in ``decode.py``, beside a kernel that only reads as many bytes (``read``), cuDNN over a contiguous cache, and what the cell is
judged by: plain attention over a whole cache for one of 8 bits, and over as many keys for a window. A table follows each cell, the fastest first.

``over``: time by that measure over time, so that above 1 the setting is faster. Of 8-bit caches both are times per byte. GB/s are bytes of keys, values and scales over ``us``.
Settings are named by what differs from ``config``: N, W, S and x are BLOCK_N, warps, stages and splits. The usual one is what the operator launches by itself.

``benchmarks/results/decode_trials.json`` is of this script at commit 3545597, which had settings that are gone, or are the only ones now (docs/decisions/0026).

    python benchmarks/decode_sweep.py [--only REGEX] [--settings REGEX] [--seconds 3] [--jobs 14] [--compiling 120] [--budget 270] [--output FILE]
    TRITON_INTERPRET=1 python benchmarks/decode_sweep.py --device cpu --quick
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import time
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

from attnopt.kernels.triton.launch import SHARED_MEMORY_SM90
from attnopt.kernels.triton.launch_paged import config

FIELDS = {"N": "BLOCK_N", "W": "num_warps", "S": "num_stages"}


@dataclass(frozen=True)
class Cell:
    """``keys``: the first so many of each request alone."""

    name: str
    shape: Shape
    layout: str
    variant: str
    settings: tuple[str, ...]
    keys: int | None = None


LARGE = ("", "x1", "x2", "x3", "x4", "S4 x1", "N64 W4 S3 x3", "N128 W4 x1", "N128 W8 x1", "N128 W4 S2 x2", "W8 S4 x1")
LONG = ("", "x16", "x32", "x33", "x47", "x66", "N128 W4 x16", "N128 W8 x16", "N128 W4 S2 x32")
SMALL = ("", "x8", "x11", "x16", "x32", "x43", "S4", "S5", "N128 W8", "N128 W4 S2 x32")
NARROW = ("", "x1", "x4", "x8", "x16", "N32 x16", "N32 x32", "N128 W8 x8", "S4")
BYTES = ("", "x1", "x2", "x3", "x4", "x6", "S4", "W8", "N128 W4", "N128 W4 x1", "N128 W4 x2", "N128 W4 S2", "N128 W8 x1")
SHORT = ("", "x16", "x22", "x32", "x64", "S4", "N128 W4", "N128 W4 S2", "N128 W8")
ONE, MANY, MOST = Shape(1, 8192), Shape(16, 8192), Shape(64, 8192)
CELLS = [
    Cell("b16 8k", MANY, "contiguous", "plain", LARGE),
    Cell("b64 8k", MOST, "contiguous", "plain", LARGE),
    Cell("b128 2k", Shape(128, 2048), "contiguous", "plain", LARGE),
    Cell("b33 8k", Shape(33, 8192), "contiguous", "plain", LARGE),
    Cell("b9 8k", Shape(9, 8192), "contiguous", "plain", LARGE),
    Cell("b13 8k", Shape(13, 8192), "contiguous", "plain", LARGE),
    Cell("b1 128k", Shape(1, 131072), "contiguous", "plain", LONG),
    Cell("b1 8k", ONE, "contiguous", "plain", SMALL),
    Cell("b1 window", ONE, "pages of 16", f"window {WINDOW}", NARROW),
    Cell("b1 8k, pages", ONE, "pages of 16", "plain", SMALL),
    Cell("b16 8k, pages", MANY, "pages of 16", "plain", LARGE),
    *(Cell(f"{name} {x}", shape, "pages of 16", x, settings) for name, shape, settings in (("b1 8k", ONE, SHORT), ("b16 8k", MANY, BYTES), ("b64 8k", MOST, BYTES)) for x in DTYPES),
]
TINY = Shape(1, 128, 4, 2, 32)
QUICK = [
    Cell("plain", TINY, "contiguous", "plain", ("", "x3", "N32 x2")),
    Cell("pages", TINY, "pages of 16", "plain", ("", "N32 W8 x3")),
    *(Cell(x, TINY, "pages of 16", x, ("", "x2")) for x in DTYPES),
]


def way_of(setting: str, inputs: Inputs, cell: Cell, cache_bytes: int) -> Way:
    """The kernel so launched. ``setting`` is words, as ``N128 W8 x16``, or empty for the operator."""
    splits, changes = None, {}
    for word in setting.split():
        m = re.fullmatch(r"([A-Za-z]+)(\d+)", word)
        if m is None or m[1] not in (*FIELDS, "x"):
            raise ValueError(f"{setting!r} has {word!r}; there are {', '.join((*FIELDS, 'x'))}, each with a number.")
        if m[1] == "x":
            splits = int(m[2])
        else:
            changes[FIELDS[m[1]]] = int(m[2])
    s = inputs.shape
    memory = torch.cuda.get_device_properties(inputs.device).shared_memory_per_block_optin if inputs.device.type == "cuda" else SHARED_MEMORY_SM90
    chosen = replace(config(s.D, s.D, s.Hq // s.Hkv, 1, inputs.dtype, memory), **changes) if setting else None
    return own(inputs, inputs.layouts[cell.layout], cell.variant, cell.keys, cache_bytes, chosen, splits)


def inputs_of(cell: Cell, options: argparse.Namespace, count: int | None = None) -> tuple[Inputs, int]:
    device = torch.device(options.device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    count = count or (pools_needed(cell.shape, cache, options.torch_dtype.itemsize) if device.type == "cuda" else 2)
    return Inputs(cell.shape, device, options.torch_dtype, count, (16,)), cache


def compiled_as(setting: str, cell: Cell) -> tuple[str, str, str]:
    """What one compilation serves: all shapes, and all numbers of splits from two on."""
    return re.sub(r" ?\bx(?!1\b)\d+", "", setting).strip(), cell.layout, cell.variant


def compile_one(job: tuple[Cell, str, argparse.Namespace]) -> tuple[str, str, str]:
    """Runs a setting once over 8192 keys of one request, which leaves its code in Triton's cache. What it raises the measurement raises again."""
    cell, setting, options = job
    small = replace(cell, shape=ONE)
    try:
        inputs, cache = inputs_of(small, options, 1)
        way_of(setting, inputs, small, cache).call(0)
        torch.cuda.synchronize()
    except Exception as e:  # noqa: BLE001 - whatever it is, it is printed, and stands beside the setting in the table
        print(f"{cell.name}, {setting}: {message(e)}", flush=True)
    return compiled_as(setting, cell)


def compile_all(cells: list[Cell], options: argparse.Namespace) -> set[tuple[str, str, str]]:
    """What could be compiled within ``options.compiling`` seconds, in the order of the cells."""
    jobs: dict[tuple[str, str, str], tuple[Cell, str, argparse.Namespace]] = {}
    for c in cells:
        for setting in c.settings:
            if re.search(options.settings, setting):
                jobs.setdefault(compiled_as(setting, c), (c, setting, options))
    done, start = set(), time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        found = pool.imap_unordered(compile_one, jobs.values())
        for _ in jobs:
            try:
                done.add(found.next(timeout=max(1.0, options.compiling - (time.perf_counter() - start))))
            except multiprocessing.TimeoutError:
                break
    print(f"{len(done)} of {len(jobs)} kernels compiled in {time.perf_counter() - start:.0f} s", flush=True)
    return done


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


def bytes_of(cell: Cell, dtype: torch.dtype) -> int:
    size = cell.shape.bytes_read(cell.variant, dtype.itemsize)
    return size if cell.keys is None else size * cell.keys // cell.shape.ctx


def references(cell: Cell, inputs: Inputs, cache: int) -> dict[str, Way]:
    """The first is what the cell is judged by."""
    layout, found = inputs.layouts[cell.layout], {}
    if cell.variant in DTYPES:
        found["plain"] = own(inputs, layout)
    if cell.variant.startswith("window"):
        found[f"{WINDOW} keys"] = own(inputs, layout, keys=WINDOW, cache_bytes=cache)
    elif inputs.device.type == "cuda":
        dense = inputs.layouts["contiguous"]
        found["cuDNN"] = Way("cuDNN", "peer", dense, "plain", PEERS["cuDNN SDPA"](inputs, dense), inputs.count)
    return found


def measure(cell: Cell, options: argparse.Namespace, ready: set[Any] | None) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    inputs, cache = inputs_of(cell, options)
    truths: dict[Any, Tensor] = {}
    rows: list[dict[str, Any]] = []
    functions: dict[Any, Measured] = {}
    calls: dict[int, int] = {}

    def add(setting: str, way: Way, size: int, check: bool = True) -> None:
        row: dict[str, Any] = {"cell": cell.name, "shape": cell.shape.name, "layout": cell.layout, "variant": cell.variant, "keys": cell.keys, "setting": setting, "bytes": size, "error": None, "note": ""}
        rows.append(row)
        if check:
            error = checked(way, inputs, truths)
            row["error"] = None if error != error else error
            if not error <= WRONG[options.torch_dtype]:
                row["note"] = "wrong"
                return
        if device.type == "cuda":
            # what a graph reads lives as long as its function, which holds the way: tables, lengths and caches with it
            calls[len(rows) - 1] = calls_of(way, size, device)
            functions[len(rows) - 1] = graph_of(way, calls[len(rows) - 1])

    for setting in cell.settings:
        if not re.search(options.settings, setting) or (ready is not None and compiled_as(setting, cell) not in ready):
            continue
        try:
            add(setting, way_of(setting, inputs, cell, cache), bytes_of(cell, options.torch_dtype))
        except Exception as e:  # noqa: BLE001 - too much shared memory, say: its message stands in its row
            if not rows or rows[-1]["setting"] != setting:
                rows.append({"cell": cell.name, "setting": setting, "error": None})
            rows[-1]["note"] = message(e)
    judges = references(cell, inputs, cache)
    for name, way in judges.items():
        size = cell.shape.bytes_read(f"window {WINDOW}" if way.keys else "plain", options.torch_dtype.itemsize)
        add(name, way, size)
    if device.type != "cuda":
        return rows
    if not cell.variant.startswith("window"):
        peer = Way("", "peer", inputs.layouts[cell.layout], cell.variant, lambda n: torch.empty(0), inputs.count)
        read = reading(inputs, cell, peer)
        read.call(0)
        s = cell.shape
        add("read", read, 2 * s.B * s.ctx * s.Hkv * s.D * (1 if cell.variant in DTYPES else options.torch_dtype.itemsize), check=False)
    times = in_turn(device, functions | {"copy": copying(device, COPY)}, options.seconds, 40)
    copy = 2 * COPY / statistics.median(times.pop("copy")) / 1e6
    for i, found in times.items():
        row, ordered = rows[i], sorted(found)
        us = statistics.median(found) / calls[i] * 1e3
        spread = (ordered[-1 - len(ordered) // 4] - ordered[len(ordered) // 4]) / calls[i] * 1e3
        row |= {"us": us, "spread": spread, "gbs": row["bytes"] / us / 1e3, "copy_gbs": copy, "rounds": len(found)}
    judge = next((r for r in rows if judges and r["setting"] == next(iter(judges)) and r.get("us")), None)
    for row in rows:
        if judge is not None and row.get("us"):
            row |= {"judge": judge["setting"], "over": row["gbs"] / judge["gbs"]}
    return sorted(rows, key=lambda r: r.get("us") or 1e30)


def table(cell: Cell, rows: list[dict[str, Any]]) -> None:
    def number(x: float | None, digits: int) -> str:
        return "" if x is None else f"{x:.{digits}f}"

    usual = next((r.get("us") for r in rows if r["setting"] == ""), None)
    judge = next((r["judge"] for r in rows if r.get("judge")), "")
    lines = [
        {
            "setting": r["setting"] or "(usual)",
            "us": number(r.get("us"), 2),
            "spread": number(r.get("spread"), 2),
            "GB/s": number(r.get("gbs"), 0),
            f"over {judge}": number(r.get("over"), 3),
            "over usual": number(usual / r["us"] if usual and r.get("us") else None, 3),
            "error": "" if r["error"] is None else f"{r['error']:.2g}",
            "note": r["note"][:60],
        }
        for r in rows
    ]
    show(f"{cell.name} ({cell.shape.name}, {cell.layout}, {cell.variant})", lines, lines=False)


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that the cell's name must contain")
    parser.add_argument("--settings", default="", help="a regular expression that a setting must contain")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing for each cell")
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile")
    parser.add_argument("--compiling", type=float, default=120.0, help="seconds after which what is not compiled is left out")
    parser.add_argument("--budget", type=float, default=270.0, help="seconds after which no further cell is begun")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default=None, help="default: bfloat16, or float16 where the interpreter computes")
    parser.add_argument("--quick", action="store_true", help="tiny cells, to see that everything runs")
    parser.add_argument("--output", type=Path, default=None, help="default: decode_sweep.json in the folder that OUT names, or benchmarks/results")
    options = parser.parse_args()
    options.torch_dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float16"))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/decode_sweep.py times on a CUDA device, and PyTorch sees none; TRITON_INTERPRET=1 ... --device cpu --quick tries the script.")
    chosen = [c for c in (QUICK if options.quick else CELLS) if re.search(options.only, c.name)]
    ready = compile_all(chosen, options) if options.device == "cuda" and not options.quick else None
    about = provenance()
    print(f"{about['device']}, commit {about['commit']}, {about['versions']}", flush=True)
    output = options.output or Path(os.environ.get("OUT") or RESULTS) / "decode_sweep.json"
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for cell in chosen:
        if time.perf_counter() - start > options.budget:
            print(f"no time for {cell.name}", flush=True)
            continue
        try:
            rows += (found := measure(cell, options, ready))
        except Exception as e:  # noqa: BLE001 - a judge that fails, say: the other cells are measured, and the run fails at its end
            failed.append(f"{cell.name}: {message(e)}")
            print(failed[-1], flush=True)
            continue
        table(cell, found)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
        if options.device == "cuda" or options.output:
            save(output, rows, **about)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if wrong := [f"{r['cell']}, {r['setting']}" for r in rows if r["note"] == "wrong"]:
        raise SystemExit(f"Wrong against float64, and not timed: {'; '.join(wrong)}.")
    if failed:
        raise SystemExit(f"Not measured: {'; '.join(failed)}.")


if __name__ == "__main__":
    main()
