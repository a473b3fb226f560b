"""Expressions over tiles of indices: the least and the greatest value that each takes in a tile.

A tile is one batch, one query head, a block of queries and a block of keys. Each node of an expression becomes an ``Interval``
at the smallest shape that broadcasts to [B, Hq, M, N] tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.kernels.evaluate import AXES
from attnopt.kernels.extrema import by_block, within
from attnopt.kernels.intervals import DTYPES, Interval, apply, each, limited
from attnopt.kernels.materialise import QUERIES
from attnopt.kernels.tiling import integer

_LARGEST = float(1 << 40)
"""Larger integers in a tensor (ids that mark padding may be) are unknown, and sums and small multiples of others need no look."""
_TABLE_ELEMENTS = 1 << 23
"""Elements of a table for ranges of computed indices; a larger one is not built, and the axis taken whole."""


@dataclass(frozen=True)
class Tiling:
    """How [B, Hq, Sq, Skv] is cut into tiles, and the sizes that expressions read."""

    B: int
    Hq: int
    Sq: int
    Skv: int
    BLOCK_M: int
    BLOCK_N: int
    sizes: tuple[tuple[str, int], ...]
    device: torch.device

    @property
    def M(self) -> int:
        return -(-self.Sq // self.BLOCK_M)

    @property
    def N(self) -> int:
        return -(-self.Skv // self.BLOCK_N)

    @cached_property
    def size_of(self) -> dict[str, int]:
        return dict(self.sizes) | {QUERIES.value[0]: self.Sq}

    def block(self, name: str) -> tuple[int, int]:
        """The extent of an index variable, and how many of it a tile spans."""
        return {"b": (self.B, 1), "h": (self.Hq, 1), "q": (self.Sq, self.BLOCK_M), "k": (self.Skv, self.BLOCK_N)}[name]

    def along(self, name: str, x: Tensor) -> Tensor:
        """A vector with one entry a block, along the variable's axis."""
        shape = [1, 1, 1, 1]
        shape[AXES[name]] = -1
        return x.view(shape)


Constants = dict[Expr, Interval]
"""Intervals of expressions that read no tensor, for one tiling."""


def enclose(root: Expr, tiling: Tiling, loads: Sequence[Tensor], constants: Constants) -> Interval:
    """The interval of ``root`` in every tile. ``constants`` is read and filled."""
    return _Enclosing(tiling, loads, constants).operand(root)


class _Enclosing:
    def __init__(self, tiling: Tiling, loads: Sequence[Tensor], constants: Constants) -> None:
        self.tiling, self.loads, self.constants = tiling, loads, constants
        self.memo: dict[Expr, Interval] = {}

    def visit(self, e: Expr) -> Interval:
        found = self.memo.get(e)
        if found is None:
            found = self.constants.get(e) or self.node(e)
            self.memo[e] = found
        return found

    def operand(self, e: Expr) -> Interval:
        """An operand of something that reads a tensor: what reads none itself is kept for the next time."""
        found = self.visit(e)
        if not any(x.op == "load" for x in e.leaves):
            self.constants[e] = found
        return found

    def node(self, e: Expr) -> Interval:
        if e.op == "const" or e.op == "sym":
            value = e.value if e.op == "const" else self.tiling.size_of[e.value[0]]
            return Interval.point(torch.full((), value, dtype=DTYPES[e.kind], device=self.tiling.device), abs(value))
        if e.op == "var":
            return self.variable(str(e.value))
        if e.op == "score":
            return Interval.point(torch.full((), math.nan, device=self.tiling.device))
        reads = any(x.op == "load" for x in e.leaves)
        args = [self.operand(a) if reads else self.visit(a) for a in e.args]
        return self.load(e, args) if e.op == "load" else apply(e, args)

    def variable(self, name: str) -> Interval:
        extent, block = self.tiling.block(name)
        first = torch.arange(0, extent, block, dtype=torch.float64, device=self.tiling.device)
        low = self.tiling.along(name, first)
        return Interval.point(low, extent) if block == 1 else Interval(low, (low + (block - 1)).clamp(max=extent - 1), extent)

    # ---- loads

    def load(self, e: Expr, index: Sequence[Interval]) -> Interval:
        """The least and greatest element that a load reads in each tile.

        Axes along a variable are reduced block by block, so that they are read by block number; then constants select, single
        values gather, and ranges of computed indices look up a table. Computed indices are clamped, as kernels clamp them.
        """
        x = self.loads[e.value]
        plain = [self.shifted(a) for a in e.args]
        expanded = {d for d, p in enumerate(plain) if p is not None and x.stride(d) == 0}
        for d in expanded:  # the same everywhere, and of extent 1 it broadcasts
            x = x.narrow(d, 0, 1)
        values = Interval.point(x != 0 if e.kind == "bool" and x.dtype != torch.bool else x)
        axes: list[str | None] = []
        ranges: list[Interval] = []
        for n, (a, i, p) in enumerate(zip(e.args, index, plain, strict=True)):
            d = len(axes)
            if all(t.op == "sym" for t in a.leaves):
                at = min(max(integer(a, self.tiling.size_of), 0), values.low.shape[d] - 1)
                values = each(lambda v, d=d, at=at: v.select(d, at), values)
                continue
            if p is not None and n not in expanded:
                values = self.pooled(values, d, *p)
            axes.append(None if p is None else p[0])
            ranges.append(i)
        if e.kind != "bool":
            values = each(lambda v: v.to(DTYPES[e.kind]), values)
        if e.kind == "int":
            values = limited(replace(values, size=2.0 ** torch.iinfo(x.dtype).bits), _LARGEST)
        named = [a for a in axes if a is not None]
        if len(named) == len(set(named)) == len(axes):
            return replace(each(lambda v: self.placed(v, named), values), size=values.size)
        return replace(self.gathered(values, axes, ranges), size=values.size)

    def shifted(self, a: Expr) -> tuple[str, int] | None:
        """``a`` as a variable plus an offset in sizes and constants."""
        offset, name = 0, None
        for c, t in E.terms(a):
            if t is None or all(x.op == "sym" for x in t.leaves):
                offset += int(c) * (1 if t is None else integer(t, self.tiling.size_of))
            elif t.op == "var" and c == 1 and name is None:
                name = str(t.value)
            else:
                return None
        return None if name is None else (name, offset)

    def pooled(self, values: Interval, dim: int, name: str, offset: int) -> Interval:
        """An axis indexed by a variable plus ``offset``, reduced to one entry per block of the variable."""
        extent, block = self.tiling.block(name)
        n = values.low.shape[dim]
        if offset >= 0 and offset + extent <= n:
            values = each(lambda v: v.narrow(dim, offset, extent), values)
        else:
            at = (torch.arange(extent, device=self.tiling.device) + offset).clamp(0, n - 1)
            values = each(lambda v: v.index_select(dim, at), values)
        if block == 1:
            return values
        return Interval(by_block(values.low, dim, block, least=True), by_block(values.high, dim, block, least=False))

    def placed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Axes named by variables as [B, Hq, M, N], 1 where there is none."""
        order = sorted(range(len(names)), key=lambda d: AXES[names[d]])
        shape = [1, 1, 1, 1]
        for d, name in enumerate(names):
            shape[AXES[name]] = x.shape[d]
        return x.permute(order).reshape(shape)

    def gathered(self, values: Interval, axes: Sequence[str | None], ranges: Sequence[Interval]) -> Interval:
        """Entries at block numbers along named axes, and at or within ``ranges`` along the others."""
        starts: list[Tensor] = []
        ends: list[Tensor | None] = []  # None: one value
        shape = values.low.shape
        for d, (name, r) in enumerate(zip(axes, ranges, strict=True)):
            last = max(shape[d] - 1, 0)
            if name is not None:
                starts.append(self.tiling.along(name, torch.arange(shape[d], device=self.tiling.device)))
                ends.append(None)
            else:
                # an unknown index may be any
                starts.append(r.low.nan_to_num(nan=0.0, posinf=last, neginf=0.0).clamp(0, last).long())
                ends.append(r.high.nan_to_num(nan=last, posinf=last, neginf=0.0).clamp(0, last).long())
        wide = [d for d, end in enumerate(ends) if end is not None]
        levels = {d: max(shape[d], 1).bit_length() for d in wide}
        elements = values.low.numel()
        for d in wide:
            elements *= levels[d]
            if elements > _TABLE_ELEMENTS:  # take the whole axis
                elements //= levels[d] * shape[d]
                values = Interval(values.low.amin(d, keepdim=True), values.high.amax(d, keepdim=True))
                starts[d], ends[d] = torch.zeros_like(starts[d]), None
        return Interval(within(values.low, starts, ends, least=True), within(values.high, starts, ends, least=False))
