"""The cells of ``kernels.py``: shapes, inputs, the spec that attnopt gets, and float64 truth on a sample of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from variants import BY_NAME, SOFTCAP, WINDOW, Variant

from attnopt.analysis.classify import traits
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec, Dims, Load

TOKENS = 16384
"""Of all batches together, in the cells of plain attention."""


@dataclass(frozen=True)
class Cell:
    """One attention at one shape. ``group`` is what ``--cells`` selects."""

    group: str
    B: int
    Hq: int
    Hkv: int
    S: int
    D: int
    causal: bool
    variant_name: str = "plain"

    @property
    def variant(self) -> Variant:
        return BY_NAME[self.variant_name]

    @property
    def direction(self) -> str:
        return "forward+backward" if self.group == "backward" else "forward"

    @property
    def scale(self) -> float:
        return self.D**-0.5

    @property
    def name(self) -> str:
        heads = f"h{self.Hq}" if self.Hq == self.Hkv else f"h{self.Hq}/{self.Hkv}"
        sees = "causal" if self.causal else "full"
        words = [f"d{self.D}", heads, f"s{self.S}", f"b{self.B}", sees, *([] if self.variant_name == "plain" else [self.variant_name])]
        return " ".join(words)

    def spec(self, symbolic: bool = True) -> AttentionSpec:
        """As capture finds it: batch and sequence open, or all constant. What analysis proves of it stands in its traits."""
        c, v = E.const, self.variant
        B, S = (E.sym("s0"), E.sym("s1")) if symbolic else (c(self.B), c(self.S))
        d = Dims(B, c(self.Hq), c(self.Hkv), S, S, c(self.D), c(self.D))
        score = v.score(d, E.mul(c(self.scale), E.score()))
        mask = E.all_of(E.le(d.k, d.q), v.mask(d)) if self.causal else v.mask(d)
        loads = tuple(Load(f"load{i}", kind) for i, kind in enumerate(v.kinds))
        empty = "uniform" if v.name == "ragged padding" else "nan"
        return AttentionSpec(dims=d, score=score, mask=mask, empty_rows=empty, loads=loads, traits=traits(score, mask, d, loads))

    def visible(self, b: int, i: Tensor, j: Tensor, loads: list[Tensor]) -> Tensor:
        """bool [n, S] for query indices i [n, 1] and key indices j [1, S]."""
        seen = torch.ones(i.shape[0], j.shape[1], dtype=torch.bool, device=i.device)
        return seen & self.variant.visible(b, i, j, loads) & ((j <= i) if self.causal else True)


@dataclass
class Inputs:
    """``sets`` of q, k, v and the gradient of o, each [B, H, S, D], and the tensors that the variant reads, which all share."""

    cell: Cell
    sets: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    loads: list[Tensor]

    @staticmethod
    def of(cell: Cell, device: torch.device, dtype: torch.dtype, count: int, layout: str = "bshd") -> Inputs:
        """Random, the same in every run. ``layout`` is how they lie in memory: ``bshd`` as projections leave them, or ``bhsd``."""
        g = torch.Generator(device=device).manual_seed(0)

        def tensor(H: int) -> Tensor:
            shape = (cell.B, cell.S, H, cell.D) if layout == "bshd" else (cell.B, H, cell.S, cell.D)
            x = torch.randn(shape, generator=g, device=device, dtype=dtype)
            return x.transpose(1, 2) if layout == "bshd" else x

        sets = [(tensor(cell.Hq), tensor(cell.Hkv), tensor(cell.Hkv), tensor(cell.Hq)) for _ in range(count)]
        if cell.direction == "forward+backward":
            sets = [(*(x.requires_grad_() for x in s[:3]), s[3]) for s in sets]  # type: ignore[misc]
        return Inputs(cell, sets, cell.variant.loads(cell.B, cell.Hq, cell.S, device, dtype))

    @property
    def device(self) -> torch.device:
        return self.sets[0][0].device

    @cached_property
    def visible_scores(self) -> int:
        """Pairs of query and key that see each other, over batches and query heads."""
        S, total = self.cell.S, 0
        same = self.cell.variant_name not in ("ragged padding", "documents")
        j = torch.arange(S, device=self.device)[None]
        for b in range(1 if same else self.cell.B):
            for start in range(0, S, 2048):
                i = torch.arange(start, min(S, start + 2048), device=self.device)[:, None]
                total += int(self.cell.visible(b, i, j, self.loads).sum())
        return total * self.cell.Hq * (self.cell.B if same else 1)

    @property
    def flops(self) -> float:
        """2 * visible * (D + Dv) forward, and two and a half times that backward."""
        return 4.0 * self.visible_scores * self.cell.D * (3.5 if self.cell.direction == "forward+backward" else 1.0)


def sets_needed(cell: Cell, cache_bytes: int, element: int = 2) -> int:
    """How many sets of inputs to rotate among so that twice the cache's size is touched before a set comes again."""
    one = element * cell.B * cell.S * cell.D * (2 * cell.Hq + 2 * cell.Hkv)
    return 2 + 2 * cache_bytes // one


# ------------------------------------------------------------------------------------------------ truth


@dataclass
class Truth:
    """Results in float64 for the first set of inputs, where computing them costs little."""

    parts: list[tuple[int, tuple[slice | Tensor | int, ...], Tensor]]
    """(which of o, dq, dk, dv; where; its values)."""

    @staticmethod
    def of(inputs: Inputs) -> Truth:
        """Forward: o on up to 256 rows each of the first and the last head. Backward: o, dq, dk, dv of the first KV head."""
        return Truth(_gradients(inputs) if inputs.cell.direction == "forward+backward" else _rows(inputs))

    def error(self, results: Sequence[Tensor]) -> float:
        """norm(result - truth) / norm(truth), the worst over o, dq, dk and dv. NaN where a result is."""
        off: dict[int, float] = {}
        norm: dict[int, float] = {}
        for which, where, want in self.parts:
            got = results[which][where].double()
            off[which] = off.get(which, 0.0) + (got - want).square().sum().item()
            norm[which] = norm.get(which, 0.0) + want.square().sum().item()
        errors = [(off[x] / norm[x]) ** 0.5 for x in off]
        return math.nan if any(math.isnan(e) for e in errors) else max(errors)


def _scores(inputs: Inputs, b: int, h: int, q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Scores [n, S] of float64 q [n, D] and k [S, D], hidden ones at -inf."""
    cell = inputs.cell
    i, j = rows[:, None], torch.arange(cell.S, device=rows.device)[None]
    s = cell.variant.score64(q @ k.T * cell.scale, b, h, i, j, inputs.loads)
    return s.masked_fill(~cell.visible(b, i, j, inputs.loads), -torch.inf)


@torch.no_grad()
def _rows(inputs: Inputs) -> list[Any]:
    cell, (q, k, v, _) = inputs.cell, inputs.sets[0]
    parts = []
    for b, h in {(0, 0), (cell.B - 1, cell.Hq - 1)}:
        used = cell.variant.used_rows(b, inputs.loads) or cell.S
        rows = torch.linspace(0, used - 1, min(used, 256), device=q.device).round().long().unique()
        kv = h * cell.Hkv // cell.Hq
        s = _scores(inputs, b, h, q[b, h, rows].double(), k[b, kv].double(), rows)
        parts.append((0, (b, h, rows), torch.softmax(s, -1) @ v[b, kv].double()))
    return parts


def _gradients(inputs: Inputs) -> list[Any]:
    cell, (q, k, v, do) = inputs.cell, inputs.sets[0]
    groups = cell.Hq // cell.Hkv
    rows = torch.arange(cell.S, device=q.device)
    key, value = (x[0, 0].detach().double().requires_grad_() for x in (k, v))
    parts: list[Any] = []
    total: list[Tensor] = []
    for h in range(groups):
        query = q[0, h].detach().double().requires_grad_()
        o = torch.softmax(_scores(inputs, 0, h, query, key, rows), -1) @ value
        found = torch.autograd.grad(o, (query, key, value), do[0, h].double())
        parts += [(0, (0, h), o.detach()), (1, (0, h), found[0])]
        total = [a + b for a, b in zip(total, found[1:], strict=True)] if total else list(found[1:])
    return [*parts, (2, (0, 0), total[0]), (3, (0, 0), total[1])]


# ------------------------------------------------------------------------------------------------ the list

_HEADS = {64: 32, 128: 16, 256: 8}


def _plain(group: str, sizes: Sequence[int], causal: Sequence[bool], lengths: Sequence[int]) -> list[Cell]:
    return [Cell(group, max(1, TOKENS // S), _HEADS[D], _HEADS[D], S, D, c) for D in sizes for c in causal for S in lengths]


_GROUPED = Cell("variants", 2, 32, 8, 8192, 128, True)
_ENCODER = Cell("variants", 4, 16, 16, 2048, 64, False)
_RAGGED = Cell("variants", 32, 16, 16, 512, 64, False)
_PACKED = Cell("variants", 1, 16, 16, 16384, 128, True)

CELLS = [
    *_plain("forward", (64, 128, 256), (True, False), (2048, 8192, 16384)),
    *_plain("backward", (64, 128), (True,), (2048, 8192)),
    *(replace(_GROUPED, variant_name=v) for v in ("plain", f"window {WINDOW}", f"softcap {SOFTCAP:g}", "ALiBi")),
    *(replace(_ENCODER, variant_name=v) for v in ("plain", "T5 table", "dense bias")),
    *(replace(_RAGGED, variant_name=v) for v in ("plain", "ragged padding")),
    *(replace(_PACKED, variant_name=v) for v in ("plain", "documents")),
]


def quick() -> list[Cell]:
    """The same cells at sizes for a CPU: every variant, every group, small and odd."""
    small = {"B": 2, "Hq": 4, "S": 96, "D": 16}
    seen: dict[tuple[str, bool, str], Cell] = {}
    for c in CELLS:
        made = replace(c, **small, Hkv=4 * c.Hkv // c.Hq)
        if c.variant_name.startswith("window"):
            made = replace(made, B=1, S=WINDOW + 100)
        seen.setdefault((c.group, c.causal, f"{c.Hkv < c.Hq}{c.variant_name}"), replace(made, B=1) if c.variant_name == "documents" else made)
    return list(seen.values())


def baseline(cell: Cell) -> Cell:
    """The same shape without the variant."""
    return replace(cell, variant_name="plain")
