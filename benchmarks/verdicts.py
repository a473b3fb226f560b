"""What the rows of kernels.json and models.json say about the project's targets, line by line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from common import show

Row = dict[str, Any]
OWN_KERNELS = ("gluon", "triton")
WITHOUT_TARGET = ("dense bias",)
"""Variants that are timed for their own sake."""
FLASH_ATTN = ("flash-attn-4", "flash-attn-3", "flash-attn-2")


@dataclass(frozen=True)
class Line:
    """One ratio that has a target: bigger is better, except for errors. ``ratio`` is None where one side has no time."""

    target: str
    cell: str
    ours: str
    peer: str
    ratio: float | None
    least: float | None
    """None: said, but no target."""
    most: float | None = None

    varies: bool = False
    """Whether the peer is another one from cell to cell."""

    @property
    def group(self) -> str:
        return self.target.split(":")[0]

    @property
    def short(self) -> str:
        return self.target.split(": ")[-1]

    @property
    def limit(self) -> str:
        return f"<= {self.most:g}" if self.most is not None else "" if self.least is None else f">= {self.least:g}"

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "no figure"
        if self.most is not None:
            return "PASS" if self.ratio <= self.most else "over"
        return "" if self.least is None else "PASS" if self.ratio >= self.least else "below"


def _best(rows: Iterable[Row], names: Callable[[Row], bool]) -> Row | None:
    good = [r for r in rows if r["ms"] and r["status"] == "ok" and names(r)]
    return min(good, key=lambda r: r["ms"], default=None)


def _ratio(target: str, cell: str, ours: Row | None, peer: Row | None, least: float | None, varies: bool = False) -> Line:
    ratio = None if ours is None or peer is None else peer["ms"] / ours["ms"]
    return Line(target, cell, _name(ours), _name(peer), ratio, least, varies=varies)


def _name(row: Row | None) -> str:
    return "-" if row is None else row["backend"]


def _is_own(r: Row) -> bool:
    return r["by"] == "attnopt" and r["backend"] in OWN_KERNELS


def kernel_lines(rows: list[Row]) -> list[Line]:
    """Every target on kernels, for every cell that was timed."""
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        cells.setdefault((r["kind"], r["cell"], r["dtype"], r["l2"]), []).append(r)
    lines: list[Line] = []
    for (kind, cell, *_), found in cells.items():
        own = _best(found, _is_own)
        auto = _best(found, lambda r: r["backend"] == "auto")

        def peer(*names: str, found: list[Row] = found) -> Row | None:
            return _best(found, lambda r: r["by"] == "peer" and (not names or r["backend"] in names))

        torch_peers = _best(found, lambda r: r["by"] == "peer" and r["backend"] not in FLASH_ATTN)
        variant = found[0]["variant"]
        if kind == "forward":
            lines.append(_ratio("forward: own over cuDNN", cell, own, peer("cuDNN SDPA"), 1.0))
            lines.append(_ratio("forward: own over flash-attn-4", cell, own, peer("flash-attn-4"), 0.95))
            lines.append(_ratio("forward: own over FlexAttention", cell, own, peer("FlexAttention"), 1.4))
        elif kind == "backward":
            lines.append(_ratio("forward + backward: auto over PyTorch's best", cell, auto, torch_peers, 1.0, varies=True))
            triton = _best(found, lambda r: r["backend"] == "triton")
            lines.append(_ratio("forward + backward: own Triton over FlexAttention", cell, triton, peer("FlexAttention"), 1.1))
            lines.append(_ratio("forward + backward: auto over flash-attn", cell, auto, peer(*FLASH_ATTN), None))
        elif variant != "plain":
            least = None if variant in WITHOUT_TARGET else 1.5
            lines.append(_ratio("variant: auto over the best peer", cell, auto, peer(), least, varies=True))
            lines.append(_ratio("variant: auto over PyTorch's best", cell, auto, torch_peers, None, varies=True))
            lines.append(_without(cell, own, cells, found))
        lines += _errors(cell, found)
    return lines


def _without(cell: str, own: Row | None, cells: dict[tuple[Any, ...], list[Row]], found: list[Row]) -> Line:
    """The own kernel per visible score, against the own kernel at the same shape without the variant."""
    same = ("kind", "D", "S", "B", "Hq", "Hkv", "causal", "dtype", "l2")
    plain = [r for rows in cells.values() for r in rows if r["variant"] == "plain" and all(r[x] == found[0][x] for x in same)]
    base = _best(plain, _is_own)
    ratio = None if own is None or base is None else own["tflops"] / base["tflops"]
    return Line(
        "variant: own per visible score over itself without", cell, _name(own), _name(base), ratio, None if found[0]["variant"] in WITHOUT_TARGET else 0.8
    )


def _errors(cell: str, found: list[Row]) -> list[Line]:
    """Errors against float64, over flash SDPA's where that computes the same, else over that of the first other peer that does."""
    able = {r["backend"]: r for r in found if r["by"] == "peer" and r["status"] == "ok" and r["error"]}
    peer = next((able[n] for n in ("flash SDPA", "FlexAttention", "flash-attn-4", "cuDNN SDPA", "efficient SDPA") if n in able), None)
    mine = [r for r in found if r["by"] == "attnopt" and r["error"] is not None and r["backend"] in (*OWN_KERNELS, "auto")]
    return [Line("error over the peer's", cell, r["backend"], _name(peer), None if peer is None else r["error"] / peer["error"], None, most=1.1) for r in mine]


def show_kernels(rows: list[Row]) -> None:
    """Ratios by cell, one table for each kind of cell, then how many cells meet each target."""
    lines = kernel_lines(rows)
    show_lines([x for x in lines if x.most is None])
    for x in lines:
        if x.verdict == "over":
            print(f"error {x.ratio:.2f} times that of {x.peer}: {x.cell}, {x.ours}")
    for r in rows:
        if r.get("repeatable") is False and r["direction"] == "forward":
            print(f"differs from run to run: {r['cell']} {r['backend']}")
    show_targets(lines)


def show_lines(lines: list[Line]) -> None:
    """``1.07 ok`` meets its target, and ``0.91 <`` and ``1.20 >`` do not; the peer and our kernel are named where they differ from cell to cell."""
    for group in dict.fromkeys(x.group for x in lines):
        table = []
        for cell in dict.fromkeys(x.cell for x in lines if x.group == group):
            mine = [x for x in lines if x.group == group and x.cell == cell]
            row = {"cell": cell, "ours": mine[0].ours}
            for x in mine:
                mark = {"PASS": " ok", "below": " <", "over": " >"}.get(x.verdict, "")
                row[x.short] = "-" if x.ratio is None else f"{x.ratio:.2f}{mark}" + (f" {x.peer}" if x.varies else "")
            table.append(row)
        show(f"{group}: ratios", table, lines=False)


@dataclass(frozen=True)
class Summary:
    """One target over all of its cells."""

    target: str
    limit: str
    met: int
    cells: int
    low: float | None
    high: float | None
    worst: Line | None


def summaries(lines: list[Line]) -> list[Summary]:
    out = []
    for target in dict.fromkeys(x.target for x in lines):
        mine = [x for x in lines if x.target == target and x.limit]
        known = [x for x in mine if x.ratio is not None]
        if mine:
            ratios = [x.ratio for x in known if x.ratio is not None]
            worst = min(known, key=lambda x: -(x.ratio or 0.0) if x.most is not None else (x.ratio or 0.0) / (x.least or 1.0), default=None)
            limits = " or ".join(dict.fromkeys(x.limit for x in mine))
            out.append(Summary(target, limits, sum(x.verdict == "PASS" for x in mine), len(mine), min(ratios, default=None), max(ratios, default=None), worst))
    return out


def show_targets(lines: list[Line]) -> None:
    table = []
    for x in summaries(lines):
        worst = "" if x.worst is None else f"{x.worst.cell}: {x.worst.ours} against {x.worst.peer}"
        span = "-" if x.low is None else f"{x.low:.2f}..{x.high:.2f}"
        table.append({"target": x.target, "ratio": x.limit, "met": f"{x.met}/{x.cells}", "measured": span, "worst": worst})
    if table:
        show("targets", table, lines=False)


# ------------------------------------------------------------------------------------------------ models

UNSERVED = ("bloom", "t5-large-encoder")
"""Models that no fused peer serves."""


def model_lines(rows: list[Row]) -> list[Line]:
    """Time and memory of attnopt composed with torch.compile against the best peer, by model."""
    lines = []
    for model in dict.fromkeys(r["model"] for r in rows):
        found = [{**r, "backend": r["variant"]} for r in rows if r["model"] == model]
        ours = _best(found, lambda r: r["variant"] in ("attnopt+compile", "attnopt backend"))
        alone = _best(found, lambda r: r["variant"] == "attnopt")
        peer = _best(found, lambda r: not r["variant"].startswith("attnopt"))
        lines.append(_ratio("models: attnopt with torch.compile over the best peer", model, ours, peer, 2.0 if model in UNSERVED else 1.0, varies=True))
        memory = None if ours is None or peer is None or not ours["peak_gib"] or not peer["peak_gib"] else ours["peak_gib"] / peer["peak_gib"]
        lines.append(Line("models: its peak memory over that peer's", model, _name(ours), _name(peer), memory, None, most=1.0))
        lines.append(_ratio("models: attnopt alone over the best peer", model, alone, peer, None))
    return lines


def show_models(rows: list[Row]) -> None:
    lines = model_lines(rows)
    show_lines(lines)
    show_targets(lines)
