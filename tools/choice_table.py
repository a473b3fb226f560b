"""Makes ``attnopt/kernels/choice_table.json``, by which ``backend="auto"`` chooses, from the results of ``benchmarks/kernels.py``.

    python tools/choice_table.py [benchmarks/results/kernels.json ...] --arch sm_90 [--output attnopt/kernels/choice_table.json] [--l2 cold]

Of each row it reads ``direction`` (``forward``, ``backward``, or ``forward+backward``), ``D``, ``Dv``, ``S``, ``causal``, ``variant``,
``dtype``, ``backend``, ``tflops`` and, where they are there, ``status``, ``by``, ``l2``, ``note``, ``B``, ``Hq`` and ``Hkv``. Rows
that are not ok, not attnopt's own, or not in half precision are left out, and said to be.

A row of ``forward+backward`` gives the backward pass what is left of its time without the forward row of the same cell and
backend. It counts for the backend that computed the gradients: the one that its note names ("backward by cudnn"), or its own.
FlashAttention's generation is read from the note ("FlashAttention-4, causal").
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HALF = ("bfloat16", "float16")
WORDS = {"plain": "", "window": "window", "softcap": "softcap", "alibi": "alibi", "table": "table", "bias": "bias", "padding": "padding", "documents": "documents", "sinks": "sinks"}
"""A word of a variant's name -> the word of ``attnopt.kernels.choice.program_class``."""
ORDER = ("documents", "padding", "mask", "softcap", "alibi", "bias", "table", "sinks")
FORWARD_PART = 2 / 7
"""Of the operations of a forward and a backward pass, those of the forward: two products of seven."""


class UnknownVariant(ValueError):
    pass


def program(causal: bool, variant: str) -> str:
    """The class of program of a row, as ``program_class`` says it of the spec: ``causal``, ``window+softcap``, ``full+bias``."""
    found = {WORDS[w] for w in re.findall(r"[a-z]+", variant.lower()) if w in WORDS}
    if not found:
        raise UnknownVariant(f"variant {variant!r} has none of the words {', '.join(WORDS)}")
    first = "window" if "window" in found else "causal" if causal else "full"
    return "+".join([first, *(w for w in ORDER if w in found)])


def backend(row: dict[str, Any]) -> str:
    """The row's backend as the table calls it."""
    return named(row["backend"], row.get("note") or "")


def named(name: str, note: str) -> str:
    if name != "flash_attn":
        return name
    generation = re.search(r"FlashAttention-(\d)", note)
    if generation is None:
        raise ValueError("a row of flash_attn has no generation in its note (FlashAttention-4, ...)")
    return f"flash_attn_{generation.group(1)}"


def usable(rows: Iterable[dict[str, Any]], l2: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows that count, and how many were left out for what."""
    kept: list[dict[str, Any]] = []
    left: dict[str, int] = {}
    for row in rows:
        reason = (
            "not ok"
            if row.get("status", "ok") != "ok" or not row.get("tflops")
            else "not attnopt's own"
            if row.get("by", "attnopt") != "attnopt" or row["backend"] == "auto"
            else "not half precision"
            if row["dtype"] not in HALF
            else f"not L2 {l2}"
            if row.get("l2") not in (None, l2)
            else None
        )
        if reason is None:
            kept.append(row)
        else:
            left[reason] = left.get(reason, 0) + 1
    return kept, left


def cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(k) for k in ("B", "Hq", "Hkv", "D", "Dv", "S", "causal", "variant", "dtype"))


def backward_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of direction ``backward`` from those of ``forward+backward``, where the forward of the same cell was measured too."""
    forward = {(cell(r), r["backend"]): r for r in rows if r["direction"] == "forward"}
    made = []
    for row in rows:
        before = forward.get((cell(row), row["backend"]))
        if row["direction"] != "forward+backward" or before is None:
            continue
        # in units of the operations of both passes: time is operations / speed
        rest = 1 / row["tflops"] - FORWARD_PART / before["tflops"]
        if rest <= 0:
            continue
        by = re.search(r"backward by (\w+)", row.get("note") or "")
        made.append({**row, "direction": "backward", "backend": by.group(1) if by else row["backend"], "tflops": (1 - FORWARD_PART) / rest})
    return made


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the choice table: one for each direction, program and shape. Of several figures (heads, batches) of a backend there the best counts."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in [*(r for r in rows if r["direction"] in ("forward", "backward")), *backward_rows(rows)]:
        key = (row["direction"], program(row["causal"], row["variant"]), row["D"], row["Dv"], row["S"])
        name = backend(row)
        speeds = found.setdefault(key, {})
        speeds[name] = max(speeds.get(name, 0.0), round(float(row["tflops"]), 1))
    names = ("direction", "program", "D", "Dv", "S")
    return [{**dict(zip(names, key, strict=True)), "tflops": dict(sorted(speeds.items()))} for key, speeds in sorted(found.items())]


def load(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows, and what stands beside them (device, date, versions); a plain list of rows says nothing else."""
    data = json.loads(path.read_text())
    return (data, {}) if isinstance(data, list) else (data["rows"], {k: v for k, v in data.items() if k != "rows"})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, default=[ROOT / "benchmarks" / "results" / "kernels.json"])
    parser.add_argument("--arch", required=True, help="the device's capability, as sm_90")
    parser.add_argument("--device", help="its name; otherwise that of the results")
    parser.add_argument("--output", type=Path, default=ROOT / "attnopt" / "kernels" / "choice_table.json")
    parser.add_argument("--l2", default="cold", choices=("cold", "warm"))
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    for path in options.results:
        more, beside = load(path)
        rows, about = [*rows, *more], {**about, **beside}
    kept, left = usable(rows, options.l2)
    if not kept:
        sys.stderr.write(f"no row of {', '.join(map(str, options.results))} counts: {left}\n")
        return 1
    first = kept[0]
    device = options.device or about.get("device") or first.get("device")
    if not device:
        sys.stderr.write("the results do not name their device: --device\n")
        return 1
    made = table(kept)
    old = json.loads(options.output.read_text()) if options.output.exists() else {"format": 1, "tables": {}}
    beside = {k: about.get(k, first.get(k)) for k in ("date", "commit", "versions") if about.get(k, first.get(k)) is not None}
    old["tables"][options.arch] = {"device": device, **beside, "rows": made}
    options.output.write_text(dumped(old))
    sys.stdout.write(f"{options.output}: {len(made)} shapes on {device} from {len(kept)} rows; left out: {left or 'none'}\n")
    return 0


def dumped(data: dict[str, Any]) -> str:
    """JSON with one row a line, so that a change shows what changed."""
    tables = []
    for arch, one in sorted(data["tables"].items()):
        head = json.dumps({k: v for k, v in one.items() if k != "rows"})[1:-1]
        rows = ",\n   ".join(json.dumps(r) for r in one["rows"])
        tables.append(f'  {json.dumps(arch)}: {{{head}, "rows": [\n   {rows}\n  ]}}')
    inside = ",\n".join(tables)
    return f'{{\n "format": {data["format"]},\n "tables": {{\n{inside}\n }}\n}}\n' if tables else f'{{\n "format": {data["format"]},\n "tables": {{}}\n}}\n'


if __name__ == "__main__":
    raise SystemExit(main())
