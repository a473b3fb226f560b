"""The README's tables of GPU figures, as Markdown, from benchmarks/results/kernels.json and models.json.

python tools/gpu_tables.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import RESULTS, stored  # noqa: E402
from verdicts import OWN_KERNELS, Line, kernel_lines, model_lines, summaries  # noqa: E402

Row = dict[str, Any]
PEERS = {
    "cuDNN SDPA": "cuDNN",
    "flash SDPA": "flash SDPA",
    "efficient SDPA": "efficient SDPA",
    "FlexAttention": "FlexAttention",
    "flash-attn-4": "flash-attn-4",
}
WAYS = {"eager": "eager", "eager+compile": "eager, compiled", "sdpa": "sdpa", "sdpa+compile": "sdpa, compiled", "flex+compile": "flex, compiled"}
WAYS |= {"attnopt": "attnopt", "attnopt+compile": "attnopt, compiled"}


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(line) + " |" for line in lines)])


def where(rows: list[Row]) -> str:
    """On what the rows were measured: more than one entry where several runs filled the file."""
    found = dict.fromkeys((r["device"], r["date"], r["versions"]["torch"], r["versions"]["triton"], r["commit"]) for r in rows)
    return "; ".join(f"{device}, {date}, torch {torch}, triton {triton}, commit {commit}" for device, date, torch, triton, commit in found)


def bold(cells: list[str], best: int | None) -> list[str]:
    return [f"**{c}**" if i == best else c for i, c in enumerate(cells)]


def kernels(rows: list[Row]) -> str:
    """TFLOP/s by cell: our best kernel, then the peers; the ratio is over the best peer."""
    lines = []
    peers = [p for p in PEERS if any(r["backend"] == p and r["ms"] for r in rows)]
    for kind, cell in dict.fromkeys((r["kind"], r["cell"]) for r in rows):
        found = {r["backend"]: r for r in rows if (r["kind"], r["cell"]) == (kind, cell) and r["status"] == "ok" and r["ms"]}
        mine = min((found[n] for n in (*OWN_KERNELS, *(("auto",) if kind == "backward" else ())) if n in found), key=lambda r: r["ms"], default=None)
        others = [found[p]["ms"] for p in peers if p in found]
        ratio = "-" if mine is None or not others else f"{min(others) / mine['ms']:.2f}x"
        values = [None if mine is None else mine["tflops"], *(found[p]["tflops"] if p in found else None for p in peers)]
        best = max((v for v in values if v is not None), default=None)
        texts = ["-" if v is None else f"{v:.0f}" for v in values]
        title = f"{'forward + backward, ' if kind == 'backward' else ''}{cell}"
        lines.append([title, *bold(texts, None if best is None else values.index(best)), ratio])
    return markdown(["attention, TFLOP/s of visible scores", "attnopt", *(PEERS[p] for p in peers), "over the best"], lines)


def models(rows: list[Row]) -> str:
    """Milliseconds and peak memory by model."""
    ways = [w for w in WAYS if any(r["variant"] == w and r["ms"] for r in rows)]
    lines = []
    ratios = {x.cell: x.ratio for x in model_lines(rows) if x.target.endswith("with torch.compile over the best peer")}
    for model in dict.fromkeys(r["model"] for r in rows):
        found = {r["variant"]: r for r in rows if r["model"] == model and r["status"] == "ok" and r["ms"]}
        times = [found[w]["ms"] if w in found else None for w in ways]
        best = min((t for t in times if t is not None), default=None)
        texts = ["-" if w not in found else f"{found[w]['ms']:.1f} ({found[w]['peak_gib'] or 0:.1f})" for w in ways]
        first = next(r for r in rows if r["model"] == model)
        ratio = ratios.get(model)
        lines.append(
            [
                f"{first['remark']}, length {first['S']}, batch {first['B']}",
                *bold(texts, None if best is None else times.index(best)),
                "-" if ratio is None else f"{ratio:.2f}x",
            ]
        )
    return markdown(["model, ms (peak GiB over weights)", *(WAYS[w] for w in ways), "over the best peer"], lines)


def met(lines: list[Line]) -> str:
    """How many cells meet each target."""
    found = [[x.target, x.limit, f"{x.met} of {x.cells}", "-" if x.low is None else f"{x.low:.2f} to {x.high:.2f}"] for x in summaries(lines)]
    return markdown(["target", "ratio", "met", "measured"], found)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    for name, table, lines in (("kernels", kernels, kernel_lines), ("models", models, model_lines)):
        rows = [r for r in stored(folder / f"{name}.json") if r.get("l2") in (None, "cold")]
        if not rows:
            sys.stderr.write(f"benchmarks/results/{name}.json holds no rows; benchmarks/{name}.py writes them.\n")
            continue
        sys.stdout.write(f"{where(rows)} ([benchmarks/results/{name}.json](benchmarks/results/{name}.json)):\n\n{table(rows)}\n\n{met(lines(rows))}\n\n")


if __name__ == "__main__":
    main()
