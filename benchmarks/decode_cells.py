"""The cells of ``decode.py``: caches, queries and page tables, the bytes that a call must read, and float64 truth for every request.

One memory serves all layouts: request r of the contiguous cache has the slots [r * ctx, (r + 1) * ctx), and pages of any size are pieces of the same slots,
handed out in random order. So a layout computes other numbers than the next, of which each has a truth of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from cells import Cell
from torch import Tensor
from variants import SOFTCAP, WINDOW

from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.paged_reference import quantized

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
VARIANTS = (f"window {WINDOW}", f"softcap {SOFTCAP:g}", "ALiBi", *DTYPES)
"""Each over pages of 16, beside ``plain``; fp8 and int8 are plain attention over a quantized cache."""


@dataclass(frozen=True)
class Shape:
    """One token of each of ``B`` requests, over ``ctx`` keys each."""

    B: int
    ctx: int
    Hq: int = 32
    Hkv: int = 8
    D: int = 128

    @property
    def name(self) -> str:
        return f"b{self.B} ctx{self.ctx // 1024}k" if self.ctx % 1024 == 0 else f"b{self.B} ctx{self.ctx}"

    def spec(self, variant: str = "plain") -> AttentionSpec:
        return Cell("decode", self.B, self.Hq, self.Hkv, self.ctx, self.D, True, attention_of(variant)).spec()

    def bytes_read(self, variant: str, element: int) -> int:
        """Of keys, values and their scales: what no kernel can do without."""
        keys = min(self.ctx, WINDOW) if variant.startswith("window") else self.ctx
        of_key = 2 * self.D * (1 if variant in DTYPES else element) + (8 if variant in DTYPES else 0)
        return self.B * self.Hkv * keys * of_key


SHAPES = [Shape(1, 8192), Shape(1, 131072), Shape(16, 8192), Shape(64, 8192), Shape(128, 2048)]
QUICK = [Shape(1, 128, 4, 2, 16), Shape(3, 64, 4, 2, 16)]
"""To see that everything runs."""


def attention_of(variant: str) -> str:
    """The name in ``variants.py``."""
    return "plain" if variant in DTYPES else variant


@dataclass(frozen=True)
class Layout:
    """How the slots of a request are found. ``page_size`` is ``ctx`` where each request has one page."""

    name: str
    page_size: int
    table: Tensor
    """int32 [B, pages of a request]."""

    def slots(self, r: int) -> Tensor:
        """Of the keys of request r, in order: int64 [ctx]."""
        place = torch.arange(self.table.shape[1] * self.page_size, device=self.table.device)
        return self.table[r].long()[place // self.page_size] * self.page_size + place % self.page_size

    def rolled(self, pages: int) -> Layout:
        """The same pages, of which each request's last ones are other ones."""
        return Layout(self.name, self.page_size, self.table.roll(pages, 1).contiguous())

    def first(self, keys: int) -> Layout:
        """So many keys of each request."""
        return Layout(self.name, self.page_size, self.table[:, : -(-keys // self.page_size)].contiguous())


@dataclass
class Pool:
    """Keys and values of all slots, [slots, Hkv, D], and of a quantized cache their scales [slots, Hkv]."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def pages(self, x: Tensor, page_size: int) -> Tensor:
        return x.view(-1, page_size, *x.shape[1:])

    def small(self, dtype: torch.dtype) -> Pool:
        """Quantized by the package's own reference, a part at a time."""
        found = []
        for x in (self.k, self.v):
            parts = [quantized(part, dtype) for part in x.split(1 << 16)]
            found.append((torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])))
        (k, ks), (v, vs) = found
        return Pool(k, v, ks, vs)


@dataclass
class Inputs:
    """``count`` pools of one shape and the queries that go with them, so that a call finds none of its keys in L2."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    count: int
    page_sizes: tuple[int, ...] = (16, 64)
    small: dict[str, list[Pool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        s, g = self.shape, torch.Generator(device=self.device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=g, device=self.device, dtype=self.dtype)

        self.queries = [random(s.B, s.Hq, s.D) for _ in range(self.count)]
        self.pools = [Pool(random(s.B * s.ctx, s.Hkv, s.D), random(s.B * s.ctx, s.Hkv, s.D)) for _ in range(self.count)]
        self.lengths = torch.full((s.B,), s.ctx, dtype=torch.int32, device=self.device)
        self.starts = torch.arange(s.B + 1, dtype=torch.int32, device=self.device)

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        s, g = self.shape, torch.Generator().manual_seed(1)
        found = {"contiguous": Layout("contiguous", s.ctx, torch.arange(s.B, dtype=torch.int32, device=self.device)[:, None])}
        for n in self.page_sizes:
            order = torch.randperm(s.B * s.ctx // n, generator=g).to(torch.int32)
            found[f"pages of {n}"] = Layout(f"pages of {n}", n, order.view(s.B, -1).to(self.device))
        return found

    def loads(self, variant: str) -> list[Tensor]:
        s = self.shape
        return Cell("decode", s.B, s.Hq, s.Hkv, s.ctx, s.D, True, attention_of(variant)).variant.loads(s.B, s.Hq, s.ctx, self.device, self.dtype)

    def pools_of(self, variant: str) -> list[Pool]:
        if variant not in DTYPES:
            return self.pools
        if variant not in self.small:
            self.small[variant] = [p.small(DTYPES[variant]) for p in self.pools]
        return self.small[variant]

    def truth(self, layout: Layout, variant: str, n: int, keys: int | None = None) -> Tensor:
        """float64 [B, Hq, D] on pool n, from what its cache holds; of the first ``keys`` keys."""
        s = self.shape
        cell = Cell("decode", s.B, s.Hq, s.Hkv, s.ctx, s.D, True, attention_of(variant))
        pool, loads, keys = self.pools_of(variant)[n], self.loads(variant), keys or s.ctx
        i, j = torch.full((1, 1), keys - 1, device=self.device), torch.arange(keys, device=self.device)[None]
        out = torch.empty(s.B, s.Hq, s.D, dtype=torch.float64, device=self.device)
        for b in range(s.B):
            at = layout.slots(b)[:keys]
            k, v = (_wide(x[at], None if scale is None else scale[at]) for x, scale in ((pool.k, pool.k_scale), (pool.v, pool.v_scale)))
            q = self.queries[n][b].double().view(s.Hkv, -1, s.D)
            score = torch.einsum("gjd,kgd->gjk", q, k).flatten(0, 1) * cell.scale
            score = torch.cat([cell.variant.score64(score[h : h + 1], b, h, i, j, loads) for h in range(s.Hq)])
            weight = score.masked_fill(~cell.visible(b, i, j, loads), -torch.inf).softmax(-1).view(s.Hkv, -1, keys)
            out[b] = torch.einsum("gjk,kgd->gjd", weight, v).flatten(0, 1)
        return out


def _wide(x: Tensor, scale: Tensor | None) -> Tensor:
    return x.double() if scale is None else x.double() * scale.double().unsqueeze(-1)


def error(o: Tensor, truth: Tensor) -> float:
    """norm(o - truth) / norm(truth) of the worst request; NaN where any number is."""
    ratios = (o.double() - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    return float("nan") if bool(ratios.isnan().any()) else float(ratios.max())


def pools_needed(shape: Shape, cache_bytes: int, element: int) -> int:
    """So many that three times the cache's size is touched before one comes again, in a quantized cache too; of the tiny shapes, which only try the script, 16."""
    return 16 if shape in QUICK else 2 + 3 * cache_bytes // shape.bytes_read("fp8" if element <= 2 else "plain", element)
