"""Draws benchmarks/results/kernels.png from kernels.json: TFLOP/s by sequence length for plain attention, by variant for the rest.

python benchmarks/plot.py [--input kernels.json] [--output kernels.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
from common import RESULTS, stored

mpl.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {
    "gluon": "#c1121f",
    "triton": "#f08a24",
    "auto": "#7a0010",
    "cuDNN SDPA": "#2f7d32",
    "flash SDPA": "#7cb342",
    "efficient SDPA": "#b7d48a",
    "FlexAttention": "#3a6ea5",
    "flash-attn-4": "#6a4c93",
    "flash-attn-3": "#9b7fc0",
    "flash-attn-2": "#c3b1dd",
}
"""Ours warm, the others cold; the order is that of the bars."""
Row = dict[str, Any]


def bars(axis: Any, rows: list[Row], title: str, label: str) -> None:
    """Groups of bars: one group for each value of ``label``, one bar for each backend that has a time and a right result."""
    good = [r for r in rows if r["tflops"] and r["status"] == "ok" and r["backend"] in COLOURS]
    groups = list(dict.fromkeys(r[label] for r in rows))
    names = [n for n in COLOURS if any(r["backend"] == n for r in good)]
    width = 0.85 / max(len(names), 1)
    for n, name in enumerate(names):
        found = {r[label]: r["tflops"] for r in good if r["backend"] == name}
        places = [i + (n - (len(names) - 1) / 2) * width for i, g in enumerate(groups) if g in found]
        axis.bar(places, [found[g] for g in groups if g in found], width, label=name, color=COLOURS[name])
    axis.set_xticks(range(len(groups)), [str(g) for g in groups], fontsize=8)
    axis.set_title(title, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def panels(rows: list[Row]) -> list[tuple[str, str, list[Row]]]:
    """(title, what tells the groups of bars apart, rows) of each part of the picture."""
    out = []
    for kind, what in (("forward", "forward"), ("backward", "forward + backward")):
        for D, causal in dict.fromkeys((r["D"], r["causal"]) for r in rows if r["kind"] == kind):
            mine = [r for r in rows if (r["kind"], r["D"], r["causal"]) == (kind, D, causal)]
            out.append((f"{what}, d{D}, {'causal' if causal else 'full'}, by length", "S", mine))
    for shape in dict.fromkeys((r["D"], r["S"], r["B"], r["Hq"], r["Hkv"]) for r in rows if r["kind"] == "variants"):
        mine = [r for r in rows if r["kind"] == "variants" and (r["D"], r["S"], r["B"], r["Hq"], r["Hkv"]) == shape]
        D, S, B, Hq, Hkv = shape
        out.append((f"variants, d{D}, heads {Hq}/{Hkv}, length {S}, batch {B}", "variant", mine))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, default=RESULTS / "kernels.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels.png")
    options = parser.parse_args()
    rows = stored(options.input)
    if not rows:
        raise SystemExit(f"{options.input} holds no rows; benchmarks/kernels.py writes them.")
    parts = panels(rows)
    columns = 3
    figure, axes = plt.subplots(-(-len(parts) // columns), columns, figsize=(15, 3.1 * -(-len(parts) // columns)), squeeze=False)
    for axis, (title, label, mine) in zip(axes.flat, parts, strict=False):
        bars(axis, mine, title, label)
    for axis in axes.flat[len(parts) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s of visible scores", fontsize=8)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles.update({label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)})
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=len(handles) or 1, fontsize=8, frameon=False)
    devices = " and ".join(dict.fromkeys(r["device"] for r in rows))
    figure.suptitle(f"{devices}, {rows[0]['dtype']}, L2 {rows[0]['l2']}, {rows[0]['date']}", fontsize=10)
    figure.tight_layout(rect=(0, 0.04, 1, 0.98))
    figure.savefig(options.output, dpi=110)
    print(f"drawn to {options.output}")


if __name__ == "__main__":
    main()
