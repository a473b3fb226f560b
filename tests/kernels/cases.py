"""Attentions with known formulas: each a spec, its tensors, and the same thing written out by hand in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec, Dims, EmptyRows, Load, Traits, Weightless

Shape = tuple[int, int, int, int, int, int, int]
"""B, Hq, Hkv, Sq, Skv, D, Dv."""

SMALL: Shape = (2, 4, 2, 37, 37, 16, 16)


def dims(shape: Shape, symbolic: bool = True) -> Dims:
    """The sizes of a site: batch and sequences symbolic, as capture finds them, or all constant."""
    B, Hq, Hkv, Sq, Skv, D, Dv = shape
    c = E.const
    if not symbolic:
        return Dims(c(B), c(Hq), c(Hkv), c(Sq), c(Skv), c(D), c(Dv))
    sq = E.sym("s1")
    skv = sq if Sq == Skv else E.sym("s2")
    return Dims(E.sym("s0"), c(Hq), c(Hkv), sq, skv, c(D), c(Dv))


def indices(shape: Shape) -> tuple[Tensor, Tensor]:
    """Query and key indices as [Sq, 1] and [1, Skv]."""
    return torch.arange(shape[3])[:, None], torch.arange(shape[4])[None, :]


@dataclass(frozen=True)
class Case:
    """``score`` and ``mask`` build the spec; ``naive_score`` and ``naive_mask`` compute the same from [B, Hq, Sq, Skv] scores."""

    name: str
    shape: Shape = SMALL
    scale: float = 0.25
    score: Callable[[Dims, Expr], Expr] | None = None
    naive_score: Callable[[Tensor, Tensor, Tensor, list[Tensor]], Tensor] | None = None
    mask: Callable[[Dims], Expr] | None = None
    naive_mask: Callable[[Tensor, Tensor, list[Tensor]], Tensor] | None = None
    loads: Callable[[Shape], list[Tensor]] = lambda shape: []
    empty_rows: EmptyRows = "nan"
    empty_score: Callable[[Dims, Expr], Expr] | None = None
    weightless: Weightless = "nan"
    naive_empty: Callable[[Tensor, Tensor, Tensor, list[Tensor]], Tensor] | None = None
    sink: Callable[[Dims], Expr] | None = None
    naive_sink: Callable[[Tensor, list[Tensor]], Tensor] | None = None
    """From the query index [Sq, 1] and the loads, something that broadcasts to [B, Hq, Sq, 1]."""
    softcap: float | None = None
    sdpa: bool = True
    """Whether torch's kernel takes it."""
    float64: bool = True
    """Whether the formula means the same in float64; a sum with float32's least number does not."""
    symbolic: bool = True
    sizes: dict[str, int] = field(default_factory=dict)

    def spec(self) -> AttentionSpec:
        d = dims(self.shape, self.symbolic)
        s = E.score()
        tensors = self.loads(self.shape)
        kinds: dict[torch.dtype, E.Kind] = {torch.bool: "bool", torch.int64: "int", torch.int32: "int", torch.float32: "float"}
        read = E.mul(E.const(self.scale), s) if self.score is None else self.score(d, s)
        mask = E.TRUE if self.mask is None else self.mask(d)
        return AttentionSpec(
            dims=d,
            score=read,
            mask=mask,
            empty_rows=self.empty_rows,
            empty_score=None if self.empty_score is None else self.empty_score(d, s),
            weightless=self.weightless,
            sink=None if self.sink is None else self.sink(d),
            loads=tuple(Load(f"load{i}", kinds[x.dtype]) for i, x in enumerate(tensors)),
            sizes=tuple(self.sizes),
            traits=Traits(softcap=self.softcap),
        )

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """q, k, v and loads. Float loads stay float32, or float64 where the dtype is."""
        B, Hq, Hkv, Sq, Skv, D, Dv = self.shape
        g = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((B, Hq, Sq, D), (B, Hkv, Skv, D), (B, Hkv, Skv, Dv)))
        torch.manual_seed(seed)
        loads = self.loads(self.shape)
        return q, k, v, [x.double() if dtype == torch.float64 and x.is_floating_point() else x for x in loads]

    def naive(self, q: Tensor, k: Tensor, v: Tensor, loads: list[Tensor], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """o and lse by the book, in ``dtype``, everything in memory."""
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        loads = [x.to(dtype) if x.is_floating_point() else x for x in loads]
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        raw = q @ k.transpose(-1, -2)
        i, j = indices((q.shape[0], q.shape[1], 0, q.shape[2], k.shape[2], 0, 0))
        score = raw * self.scale if self.naive_score is None else self.naive_score(raw, i, j, loads).to(dtype)
        visible = torch.ones((), dtype=torch.bool) if self.naive_mask is None else self.naive_mask(i, j, loads)
        visible = visible.expand(raw.shape)
        score = score.expand(raw.shape).masked_fill(~visible, -math.inf)
        if self.naive_sink is not None:
            score = torch.cat([score, self.naive_sink(i, loads).to(dtype).expand(*raw.shape[:3], 1)], -1)
            return torch.softmax(score, -1)[..., :-1] @ v, torch.logsumexp(score, -1)
        lse = torch.logsumexp(score, -1)
        empty = ~visible.any(-1, keepdim=True)
        if self.empty_rows == "zero":
            empty = (score == -math.inf).all(-1, keepdim=True)
        if self.empty_rows == "program":
            assert self.naive_empty is not None
            score = torch.where(empty, self.naive_empty(raw, i, j, loads).to(dtype), score)
        elif self.empty_rows in ("uniform", "zero"):
            score = torch.where(empty, 0.0, score)
        p = torch.softmax(score, -1)
        if self.empty_rows == "zero":
            p = torch.where(empty, 0.0, p)
        if self.weightless == "zero":
            p = torch.where((score == -math.inf).all(-1, keepdim=True), 0.0, p)
        return p @ v, lse


# ------------------------------------------------------------------------------------------------ masks

causal = lambda d: E.le(d.k, d.q)  # noqa: E731
naive_causal = lambda i, j, L: j <= i  # noqa: E731
bottom_right = lambda d: E.le(d.k, E.add(d.q, E.sub(d.Skv, d.Sq)))  # noqa: E731
padding = lambda d: E.load(0, (d.b, d.k), "bool")  # noqa: E731
naive_padding = lambda i, j, L: L[0][:, None, None, :]  # noqa: E731


def some_padding(shape: Shape) -> list[Tensor]:
    """Ragged on the right; the last batch has no visible key at all."""
    keep = torch.arange(shape[4])[None] < torch.randint(1, shape[4], (shape[0], 1))
    keep[-1] = False
    return [keep]


def left_padding(shape: Shape) -> list[Tensor]:
    keep = torch.ones(shape[0], shape[4], dtype=torch.bool)
    keep[0, :5] = False
    return [keep]


def documents(shape: Shape) -> list[Tensor]:
    return [torch.sort(torch.randint(0, 4, (shape[0], shape[4])), -1).values]


def window(d: Dims, left: int, right: int | None) -> Expr:
    parts = [E.le(E.sub(d.q, d.k), E.const(left))]
    parts += [E.le(E.sub(d.k, d.q), E.const(right))] if right is not None else []
    return E.all_of(*parts)


# ------------------------------------------------------------------------------------------------ scores


def alibi(d: Dims, s: Expr) -> Expr:
    return E.add(E.mul(E.const(0.25), s), E.mul(E.load(0, (d.h,), "float"), E.as_float(E.sub(d.k, d.q))))


def naive_alibi(s: Tensor, i: Tensor, j: Tensor, L: list[Tensor]) -> Tensor:
    return 0.25 * s + L[0][None, :, None, None] * (j - i)


def bucket(distance: Expr) -> Expr:
    """T5's bidirectional bucket (Raffel et al., arXiv:1910.10683), with 8 buckets and a greatest distance of 20."""
    n = E.absolute(distance)
    far = E.add(E.const(2), E.as_int(E.mul(E.const(2 / math.log(20 / 2)), E.function("log", E.div(n, E.const(2.0))))))
    return E.add(E.where(E.gt(distance, E.ZERO), E.const(4), E.ZERO), E.where(E.lt(n, E.const(2)), n, E.minimum(far, E.const(3))))


def naive_bucket(distance: Tensor) -> Tensor:
    n = distance.abs()
    # float32, as the model computes it
    far = 2 + (torch.log(n.float() * 0.5) * (2 / math.log(20 / 2))).clamp(min=-100).to(torch.int64)
    return torch.where(distance > 0, 4, 0) + torch.where(n < 2, n, far.clamp(max=3))


def t5(d: Dims, s: Expr) -> Expr:
    return E.add(s, E.load(0, (bucket(E.sub(d.k, d.q)), d.h), "float"))


def naive_t5(s: Tensor, i: Tensor, j: Tensor, L: list[Tensor]) -> Tensor:
    return s + L[0][naive_bucket(j - i)].permute(2, 0, 1)


def softcap(d: Dims, s: Expr) -> Expr:
    return E.mul(E.const(5.0), E.function("tanh", E.mul(E.const(0.25 / 5.0), s)))


def dense(d: Dims, s: Expr) -> Expr:
    return E.add(E.mul(E.const(0.25), s), E.load(0, (d.b, d.h, d.q, d.k), "float"))


def slopes(shape: Shape) -> list[Tensor]:
    return [2.0 ** -torch.arange(1, shape[1] + 1).float()]


CASES = [
    Case("full"),
    Case("full-constant-sizes", symbolic=False),
    Case("full-Dv-less", shape=(2, 4, 2, 37, 37, 24, 16)),
    Case("full-Dv-more", shape=(1, 2, 2, 20, 33, 16, 40)),
    Case("full-MQA-cross", shape=(2, 4, 1, 19, 70, 16, 16)),
    Case("causal-GQA", mask=causal, naive_mask=naive_causal),
    Case("causal-top-left-Sq-less", shape=(1, 2, 2, 21, 70, 16, 16), mask=causal, naive_mask=naive_causal),
    Case("causal-top-left-Sq-more", shape=(1, 2, 2, 70, 21, 16, 16), mask=causal, naive_mask=naive_causal),
    Case("causal-bottom-right-Sq-less", shape=(1, 2, 2, 21, 70, 16, 16), mask=bottom_right, naive_mask=lambda i, j, L: j <= i + 49),
    Case("causal-bottom-right-empty-rows-nan", shape=(1, 2, 2, 70, 21, 16, 16), mask=bottom_right, naive_mask=lambda i, j, L: j <= i - 49),
    Case("causal-bottom-right-empty-rows-zero", shape=(1, 2, 2, 70, 21, 16, 16), mask=bottom_right, naive_mask=lambda i, j, L: j <= i - 49, empty_rows="zero"),
    Case(
        "causal-bottom-right-empty-rows-uniform",
        shape=(1, 2, 2, 70, 21, 16, 16),
        mask=bottom_right,
        naive_mask=lambda i, j, L: j <= i - 49,
        empty_rows="uniform",
    ),
    Case(
        "causal-bottom-right-empty-rows-uniform-long",
        shape=(1, 1, 1, 2100, 21, 16, 16),
        mask=bottom_right,
        naive_mask=lambda i, j, L: j <= i - 2079,
        empty_rows="uniform",
    ),
    Case("causal-bottom-right-one-query", shape=(2, 4, 2, 1, 45, 16, 16), mask=bottom_right, naive_mask=lambda i, j, L: j <= i + 44),
    Case("reverse-causal", mask=lambda d: E.ge(d.k, d.q), naive_mask=lambda i, j, L: j >= i),
    Case(
        "window-causal",
        shape=(1, 2, 1, 150, 150, 16, 16),
        mask=lambda d: E.all_of(causal(d), window(d, 20, None)),
        naive_mask=lambda i, j, L: (j <= i) & (i - j <= 20),
    ),
    Case("window-both-sides", shape=(1, 2, 1, 150, 150, 16, 16), mask=lambda d: window(d, 9, 6), naive_mask=lambda i, j, L: (j - i <= 6) & (i - j <= 9)),
    Case("padding-nan", mask=padding, naive_mask=naive_padding, loads=some_padding),
    Case("padding-zero", mask=padding, naive_mask=naive_padding, loads=some_padding, empty_rows="zero"),
    Case("padding-uniform", mask=padding, naive_mask=naive_padding, loads=some_padding, empty_rows="uniform"),
    Case(
        "padding-program",
        mask=padding,
        naive_mask=naive_padding,
        loads=some_padding,
        empty_rows="program",
        empty_score=lambda d, s: E.add(E.mul(E.const(0.5), s), E.mul(E.const(0.1), E.as_float(d.k))),
        naive_empty=lambda s, i, j, L: 0.5 * s + 0.1 * j.double(),
    ),
    *(
        Case(
            f"padding-program-weightless-{weightless}",
            mask=lambda d: E.all_of(causal(d), padding(d)),
            naive_mask=lambda i, j, L: (j <= i) & L[0][:, None, None, :],
            loads=left_padding,
            empty_rows="program",
            empty_score=lambda d, s: E.where(E.ge(d.q, E.const(3)), E.add(E.mul(E.const(0.5), s), E.where(causal(d), E.FZERO, E.const(-math.inf))), E.const(-math.inf)),
            naive_empty=lambda s, i, j, L: torch.where((i >= 3) & (j <= i), 0.5 * s, -math.inf),
            weightless=weightless,
        )
        for weightless in ("nan", "zero")
    ),
    Case(
        "padding-program-beyond-float32",
        mask=lambda d: E.all_of(causal(d), padding(d)),
        naive_mask=lambda i, j, L: (j <= i) & L[0][:, None, None, :],
        loads=left_padding,
        empty_rows="program",
        empty_score=lambda d, s: E.add(E.mul(E.const(0.5), s), E.where(E.lt(d.k, E.const(30)), E.FZERO, E.const(-6e38))),
        naive_empty=lambda s, i, j, L: torch.where(j < 30, 0.5 * s, -math.inf),
    ),
    Case(
        "causal-left-padding-uniform",
        mask=lambda d: E.all_of(causal(d), padding(d)),
        naive_mask=lambda i, j, L: (j <= i) & L[0][:, None, None, :],
        loads=left_padding,
        empty_rows="uniform",
    ),
    Case(
        "documents-causal",
        mask=lambda d: E.all_of(causal(d), E.eq(E.load(0, (d.b, d.q), "int"), E.load(0, (d.b, d.k), "int"))),
        naive_mask=lambda i, j, L: (j <= i) & (L[0][:, None, :, None] == L[0][:, None, None, :]),
        loads=documents,
    ),
    Case(
        "chunks",
        mask=lambda d: E.all_of(causal(d), E.eq(E.floordiv(d.q, E.const(8)), E.floordiv(d.k, E.const(8)))),
        naive_mask=lambda i, j, L: (j <= i) & (i // 8 == j // 8),
    ),
    Case("alibi-causal", score=alibi, naive_score=naive_alibi, mask=causal, naive_mask=naive_causal, loads=slopes),
    Case(
        "softcap-causal",
        score=softcap,
        naive_score=lambda s, i, j, L: 5 * torch.tanh(0.25 * s / 5),
        mask=causal,
        naive_mask=naive_causal,
        softcap=5.0,
        sdpa=False,
    ),
    Case("dense-bias", score=dense, naive_score=lambda s, i, j, L: 0.25 * s + L[0], loads=lambda sh: [torch.randn(sh[0], sh[1], sh[3], sh[4])]),
    Case(
        "dense-bias-finfo-min",
        score=lambda d, s: E.add(E.mul(E.const(0.25), s), E.load(0, (d.b, E.ZERO, d.q, d.k), "float")),
        naive_score=lambda s, i, j, L: (0.25 * s.float() + L[0].float()).double(),
        loads=lambda sh: [torch.where(torch.arange(sh[4])[None] < torch.arange(sh[3])[:, None], 0.0, torch.finfo(torch.float32).min).expand(sh[0], 1, -1, -1)],
        float64=False,
    ),
    Case(
        "dense-bias-minus-infinity-zero",
        score=dense,
        naive_score=lambda s, i, j, L: 0.25 * s + L[0],
        loads=lambda sh: [torch.where(torch.arange(sh[4])[None] < torch.arange(sh[3])[:, None], 0.0, -math.inf).expand(sh[0], sh[1], -1, -1)],
        empty_rows="zero",
    ),
    Case("relative-buckets", shape=(1, 4, 4, 37, 45, 16, 16), score=t5, naive_score=naive_t5, loads=lambda sh: [torch.randn(8, sh[1])]),
    Case(
        "scale-by-size",
        score=lambda d, s: E.mul(s, E.function("rsqrt", E.as_float(E.sym("n")))),
        naive_score=lambda s, i, j, L: s / math.sqrt(7),
        sizes={"n": 7},
        sdpa=False,
    ),
    Case(
        "per-head-scale",
        score=lambda d, s: E.mul(s, E.load(0, (d.h,), "float")),
        naive_score=lambda s, i, j, L: s * L[0][None, :, None, None],
        loads=slopes,
        sdpa=False,
    ),
    Case(
        "negative-constant-where-masked",
        score=lambda d, s: E.where(causal(d), E.mul(E.const(0.25), s), E.const(-10000.0)),
        naive_score=lambda s, i, j, L: torch.where(j <= i, 0.25 * s, -10000.0),
        sdpa=False,
    ),
    Case(
        "large-terms-that-cancel",
        score=lambda d, s: E.add(E.mul(E.const(0.25), s), E.mul(E.const(1e4), E.load(0, (d.b, d.k), "float")), E.const(-1e4)),
        naive_score=lambda s, i, j, L: 0.25 * s + (1e4 * L[0] - 1e4)[:, None, None, :],
        loads=lambda sh: [left_padding(sh)[0].float()],
    ),
    Case(
        "sinks-causal-GQA",
        mask=causal,
        naive_mask=naive_causal,
        sink=lambda d: E.load(0, (d.h,), "float"),
        naive_sink=lambda i, L: L[0][None, :, None, None],
        loads=lambda sh: [torch.randn(sh[1]) * 2],
        sdpa=False,
    ),
    Case(
        "sinks-padding",
        mask=padding,
        naive_mask=naive_padding,
        sink=lambda d: E.load(1, (d.h, d.q), "float"),
        naive_sink=lambda i, L: L[1][None, :, :, None],
        loads=lambda sh: [*some_padding(sh), torch.randn(sh[1], sh[3])],
        empty_rows="zero",
        sdpa=False,
    ),
    Case("softmax-plus-one", shape=(1, 4, 2, 37, 70, 16, 24), sink=lambda d: E.FZERO, naive_sink=lambda i, L: torch.zeros(()), empty_rows="zero", sdpa=False),
    Case(
        "sinks-dense-bias-window",
        score=dense,
        naive_score=lambda s, i, j, L: 0.25 * s + L[0],
        mask=lambda d: E.all_of(causal(d), window(d, 9, None)),
        naive_mask=lambda i, j, L: (j <= i) & (i - j <= 9),
        sink=lambda d: E.load(1, (d.h,), "float"),
        naive_sink=lambda i, L: L[1][None, :, None, None],
        loads=lambda sh: [torch.randn(sh[0], sh[1], sh[3], sh[4]), torch.randn(sh[1])],
        sdpa=False,
    ),
    Case(
        "index-out-of-range-in-the-branch-not-taken",
        score=lambda d, s: E.add(E.mul(E.const(0.25), s), E.where(E.ge(d.k, E.const(5)), E.load(0, (E.sub(d.k, E.const(5)),), "float"), E.FZERO)),
        naive_score=lambda s, i, j, L: 0.25 * s + torch.cat([torch.zeros(5), L[0]]),
        loads=lambda sh: [torch.randn(sh[4] - 5)],
    ),
]

BY_NAME = {c.name: c for c in CASES}
assert len(BY_NAME) == len(CASES)
