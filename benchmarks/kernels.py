"""Attention kernels side by side in one process: attnopt's backends and every installed peer.

For each cell (a shape and a variant) all are timed in turn, in rounds, on inputs that rotate so that each call finds a cold L2
(``--l2 warm``: the second run on one set). Times are medians between CUDA events without what a call costs the host, which stands
beside them. TFLOP/s count visible scores only: 2 * (D + Dv) for each, and 3.5 times that with the backward. The error is
norm(result - truth) / norm(truth) against float64, on rows of two heads (backward: one KV head, the worst of o, dq, dk, dv).

    python benchmarks/kernels.py [--cells forward,backward,variants] [--only REGEX] [--budget SECONDS]
    python benchmarks/kernels.py --device cpu --quick

Rows go to benchmarks/results/kernels.json after each cell, and replace rows of the same cell and backend there. A peer that
cannot compute a cell, or fails, has a row that says why.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import verdicts
from cells import CELLS, Cell, Inputs, Truth, quick, sets_needed
from common import RESULTS, provenance, save, show, stored
from own import own
from peers import PEERS, Cannot, Function, Ready
from running import Lost, add_options, again, alive, begin, left_out, message, patience, spent
from timing import Stopwatch, Timed
from torch import Tensor

from attnopt.kernels import registry

OURS = ("gluon", "triton", "cudnn", "sdpa", "auto")
WRONG = 0.05
"""An error from which a result is not the same function."""


# ------------------------------------------------------------------------------------------------ one cell


def results(function: Function, inputs: Inputs, n: int) -> list[Tensor]:
    """[o], or [o, dq, dk, dv]."""
    q, k, v, grad = inputs.sets[n]
    if inputs.cell.direction == "forward":
        with torch.no_grad():
            return [function(q, k, v)]
    o = function(q, k, v)
    return [o, *torch.autograd.grad(o, (q, k, v), grad)]


def measure(cell: Cell, candidates: dict[str, Callable[[Inputs], Ready]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one cell."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    inputs = Inputs.of(cell, device, dtype, sets_needed(cell, cache) if device.type == "cuda" else 2, options.layout)
    truth = Truth.of(inputs)
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[int], object]] = {}
    for name, prepare in candidates.items():
        row = rows[name] = {**describe(cell, options), "backend": name, "by": "attnopt" if name in options.ours else "peer", "status": "ok"}
        try:
            with patience(options.patience):
                ready = prepare(inputs)
                first = results(ready.function, inputs, 0)
                row["error"] = truth.error(first)
            row.update(mask_ms=ready.mask_ms, note=ready.note)
            if name in options.ours:
                row["repeatable"] = torch.equal(first[0], results(ready.function, inputs, 0)[0])
            del first
        except Cannot as e:
            row.update(status="cannot", note=str(e))
        except Exception as e:  # noqa: BLE001 - a peer may raise anything; its message stands in its row
            row.update(status="failed", note=message(e))
            lost_row(options, row, device)
        else:
            if not row["error"] <= WRONG:
                row.update(status="wrong", note=f"error {row['error']:.3g} against float64. {row['note']}".strip())
                row["error"] = row["error"] if math.isfinite(row["error"]) else None
            calls[name] = lambda n, f=ready.function: results(f, inputs, n)
    watch = Stopwatch(device, len(inputs.sets), options.seconds, cold=options.l2 == "cold")
    for name, timed in watch.measure(calls).items():
        if isinstance(timed, Timed):
            rows[name].update(ms=timed.ms, tflops=inputs.flops / timed.ms / 1e9, quartiles=list(timed.quartiles), host_us=timed.host_us, runs=timed.runs)
        else:
            rows[name].update(status="failed", note=timed)
            lost_row(options, rows[name], device)
    return list(rows.values())


def lost_row(options: argparse.Namespace, row: dict[str, Any], device: torch.device) -> None:
    """Where a failure took the device along, keep its row and raise ``Lost``."""
    try:
        alive(device, f"{row['cell']}:{row['backend']}")
    except Lost:
        save(options.output, merged(stored(options.output), [{**row, "note": f"{row['note']} (took the device along)"}]))
        raise


def describe(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "kind": cell.group,
        "direction": cell.direction,
        "D": cell.D,
        "Dv": cell.D,
        "S": cell.S,
        "B": cell.B,
        "Hq": cell.Hq,
        "Hkv": cell.Hkv,
        "causal": cell.causal,
        "variant": cell.variant_name,
        "dtype": options.dtype,
        "backend": "",
        "ms": None,
        "tflops": None,
        "error": None,
        "l2": options.l2 if options.device != "cpu" else None,
        "cell": cell.name,
        **options.provenance,
    }


# ------------------------------------------------------------------------------------------------ all cells


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["kind"], row["cell"], row["dtype"], row["l2"], row["backend"]


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Old rows, with those of ``new`` in place of the same cell and backend."""
    table = {key(r): r for r in old}
    table.update({key(r): r for r in new})
    return list(table.values())


def table(group: str, rows: list[dict[str, Any]]) -> None:
    """TFLOP/s by cell and backend; what cannot be done is a dash."""
    names = [n for n in dict.fromkeys(r["backend"] for r in rows) if any(r["backend"] == n and r["ms"] for r in rows)]
    if not names:
        return
    lines = []
    for cell in dict.fromkeys(r["cell"] for r in rows):
        found = {r["backend"]: r for r in rows if r["cell"] == cell}
        lines.append(
            {
                "cell": cell,
                **{n: (f"{found[n]['tflops']:.3g}" + ("!" if found[n]["status"] == "wrong" else "")) if n in found and found[n]["ms"] else None for n in names},
            }
        )
    show(f"{group}: TFLOP/s per visible score (! wrong result)", lines, lines=False)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="forward,backward,variants", help="groups, separated by commas")
    parser.add_argument("--only", default="", help="a regular expression that the cell's name must contain")
    parser.add_argument("--backends", default=",".join(OURS), help="attnopt's, by the names of the registry; 'all': every one of them but reference")
    parser.add_argument("--peers", default=",".join(PEERS), help="names, separated by commas")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layout", default="bshd", choices=("bshd", "bhsd"), help="how q, k and v lie in memory; projections leave bshd")
    parser.add_argument("--l2", default="cold", choices=("cold", "warm"))
    parser.add_argument("--seconds", type=float, default=0.8, help="of timing for each cell")
    parser.add_argument("--static", action="store_true", help="specs with constant sizes, as capture with dynamic_shapes='static' finds them")
    parser.add_argument("--quick", action="store_true", help="tiny cells, to see that everything runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels.json")
    add_options(parser, budget=540, patience=90)
    return parser


def main() -> None:
    options = arguments().parse_args()
    begin(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/kernels.py times on a CUDA device, and PyTorch sees none; --device cpu --quick tries the script.")
    known = [*registry.backends(), "auto"]
    asked = [n for n in known if n != "reference"] if options.backends == "all" else options.backends.split(",")
    options.ours, options.provenance = [n for n in asked if n in known], provenance()
    if missing := [n for n in asked if n not in known]:
        print(f"attnopt has no backend {', '.join(missing)} here; it has {', '.join(known)}")
    candidates = {n: own(n, not options.static) for n in options.ours} | {n: PEERS[n] for n in options.peers.split(",") if n}
    groups, without = options.cells.split(","), left_out(options)
    chosen = [c for c in (quick() if options.quick else CELLS) if c.group in groups and re.search(options.only, c.name)]
    rows = stored(options.output)
    done: list[dict[str, Any]] = []
    print(
        f"{len(chosen)} cells on {options.provenance['device']}, L2 {options.l2}, commit {options.provenance['commit']}, {options.provenance['versions']}",
        flush=True,
    )
    for number, cell in enumerate(chosen):
        if number <= options.after:
            continue
        if spent() > options.budget:
            print(f"stopped after {options.budget:.0f} s with {len(chosen) - number} cells to go, from number {number} ({cell.name}) on")
            break
        start = time.time()
        here = {n: p for n, p in candidates.items() if f"{cell.name}:{n}" not in without}
        try:
            found = measure(cell, here, options)
        except Lost as lost:
            again(number, lost.pair, options)
        except torch.OutOfMemoryError as e:
            print(f"[{number}] {cell.name}: {message(e)}", flush=True)
            continue
        finally:
            torch._dynamo.reset()
            if options.device == "cuda":
                torch.cuda.empty_cache()
        rows, done = merged(rows, found), [*done, *found]
        save(options.output, rows)
        best = " ".join(f"{r['backend'].replace(' ', '-')}={r['ms']:.3f}" for r in found if r["ms"])
        print(f"[{number}] {cell.name} {time.time() - start:.0f}s {best}", flush=True)
    report([r for r in rows if r["kind"] in groups], done)


def report(rows: list[dict[str, Any]], done: list[dict[str, Any]]) -> None:
    for reason in dict.fromkeys(
        f"{r['backend']} {r['status']} {r['cell'] if r['status'] != 'cannot' else ''}: {r['note']}"[:180] for r in done if r["status"] != "ok"
    ):
        print(reason)
    for group in dict.fromkeys(r["kind"] for r in rows):
        table(group, [r for r in rows if r["kind"] == group])
    verdicts.show_kernels(rows)


if __name__ == "__main__":
    main()
