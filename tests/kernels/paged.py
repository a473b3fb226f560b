"""Requests over a paged cache: their tensors, laid out in shuffled pages, and the same attention one request at a time in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.kernels import ops
from tests.kernels.cases import BY_NAME, Case, causal, naive_causal, slopes, softcap, window

assert ops.__doc__  # the operators are registered

HQ, HKV, D, DV = 4, 2, 16, 16
MIXED = ((3, 3), (1, 70), (0, 5), (20, 65), (1, 1), (7, 33), (0, 0))
"""(queries, keys) of each request: a whole prompt, a generated token, no queries, a chunk, a first token, a chunk, nothing at all."""


@dataclass(frozen=True)
class Paged:
    """The arguments of ``attnopt::paged_attention``, and what each request is."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    cu_seqlens_q: Tensor
    seqlens_k: Tensor
    loads: list[Tensor]
    keys: list[Tensor]
    """Of each request, [n, Hkv, D]."""
    values: list[Tensor]

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.q, self.k_cache, self.v_cache, self.block_table, self.cu_seqlens_q, self.seqlens_k

    def on(self, device: str) -> Paged:
        """What the operator reads, on ``device``; the keys and values by request stay."""
        moved = (x.to(device) for x in self.arguments)
        return Paged(*moved, [x.to(device) for x in self.loads], self.keys, self.values)


def paged(
    lengths: tuple[tuple[int, int], ...],
    page_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    Hq: int = HQ,
    Hkv: int = HKV,
    D: int = D,
    Dv: int = DV,
    loads: list[Tensor] | None = None,
    spare: int = 2,
    seed: int = 0,
) -> Paged:
    """Caches in which all that holds no key is NaN, and every unused entry of the block table is -1. ``spare`` columns more than any request needs."""
    g = torch.Generator().manual_seed(seed)
    columns = max([-(-n // page_size) for _, n in lengths], default=0) + spare
    count = sum(-(-n // page_size) for _, n in lengths) + 2
    pages = torch.randperm(count, generator=g).tolist()
    k_cache = torch.full((count, page_size, Hkv, D), math.nan, dtype=dtype)
    v_cache = torch.full((count, page_size, Hkv, Dv), math.nan, dtype=dtype)
    table = torch.full((len(lengths), columns), -1, dtype=torch.int32)
    keys, values, slots = [], [], []
    for r, (_, n) in enumerate(lengths):
        mine = [pages.pop() for _ in range(-(-n // page_size))]
        table[r, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        keys.append(torch.randn(n, Hkv, D, generator=g, dtype=torch.float64).to(dtype))
        values.append(torch.randn(n, Hkv, Dv, generator=g, dtype=torch.float64).to(dtype))
        slots += [mine[i // page_size] * page_size + i % page_size for i in range(n)]
    torch.ops.attnopt.cache_write(torch.cat(keys), torch.cat(values), k_cache, v_cache, torch.tensor(slots, dtype=torch.int64))
    q = torch.randn(sum(m for m, _ in lengths), Hq, D, generator=g, dtype=torch.float64).to(dtype)
    cu_seqlens_q = torch.tensor([0, *(m for m, _ in lengths)]).cumsum(0).to(torch.int32)
    seqlens_k = torch.tensor([n for _, n in lengths], dtype=torch.int32)
    return Paged(q, k_cache, v_cache, table, cu_seqlens_q, seqlens_k, loads or [], keys, values)


def slots_of(p: Paged) -> Tensor:
    """Of all keys, request by request."""
    page_size = p.k_cache.shape[1]
    return torch.tensor([int(p.block_table[r, i // page_size]) * page_size + i % page_size for r, k in enumerate(p.keys) for i in range(len(k))])


def one_by_one(case: Case, p: Paged) -> Tensor:
    """The definition, in float64: each request alone, all its keys before it, its queries at its last positions."""
    q, loads = p.q.cpu(), [x.cpu() for x in p.loads]
    o = q.new_zeros((*q.shape[:2], p.v_cache.shape[3]), dtype=torch.float64)
    starts = p.cu_seqlens_q.tolist()
    for r, (k, v) in enumerate(zip(p.keys, p.values, strict=True)):
        t0, t1, n = starts[r], starts[r + 1], len(k)
        if t1 == t0 or n == 0:
            continue
        whole = q.new_zeros(n, *q.shape[1:])  # queries before those of this call are not asked for
        whole[n - (t1 - t0) :] = q[t0:t1]
        mine = [x[r : r + 1] if case.name.startswith("by-request") else x for x in loads]
        o_r, _ = case.naive(*(x.transpose(0, 1).unsqueeze(0) for x in (whole, k, v)), mine)
        o[t0:t1] = o_r[0].transpose(0, 1)[n - (t1 - t0) :]
    return o


def of(name: str, **changes: object) -> Case:
    """A case over one open sequence."""
    return replace(BY_NAME[name], **changes)  # type: ignore[arg-type]


SEQUENCE = (1, HQ, HKV, 70, 70, D, DV)
CASES = [
    Case("causal", shape=SEQUENCE, mask=causal, naive_mask=naive_causal),
    Case("full", shape=SEQUENCE),
    Case(
        "window", shape=SEQUENCE, mask=lambda d: E.all_of(causal(d), window(d, 20, None)), naive_mask=lambda i, j, L: (j <= i) & (i - j <= 20)
    ),
    Case("window-both-sides", shape=SEQUENCE, mask=lambda d: window(d, 9, 6), naive_mask=lambda i, j, L: (j - i <= 6) & (i - j <= 9)),
    of("alibi-causal", shape=SEQUENCE),
    of("softcap-causal", shape=SEQUENCE),
    of("sinks-causal-GQA", shape=SEQUENCE),
    Case(
        "softcap-window-sinks",
        shape=SEQUENCE,
        score=softcap,
        naive_score=lambda s, i, j, L: 5 * torch.tanh(0.25 * s / 5),
        mask=lambda d: E.all_of(causal(d), window(d, 7, None)),
        naive_mask=lambda i, j, L: (j <= i) & (i - j <= 7),
        sink=lambda d: E.load(0, (d.h,), "float"),
        naive_sink=lambda i, L: L[0][None, :, None, None],
        loads=slopes,
    ),
    of("chunks", shape=SEQUENCE),
    of("per-head-scale", shape=SEQUENCE, mask=causal, naive_mask=naive_causal),
    of("relative-buckets", shape=(1, 4, 4, 70, 70, 16, 16), mask=causal, naive_mask=naive_causal),
    Case(
        "prefix",
        shape=SEQUENCE,
        mask=lambda d: E.any_of(causal(d), E.lt(d.k, E.const(60))),
        naive_mask=lambda i, j, L: (j <= i) | (j < 60),
    ),
    Case(
        "by-request-prefix",
        shape=(len(MIXED), HQ, HKV, 70, 70, D, DV),
        mask=lambda d: E.any_of(causal(d), E.lt(d.k, E.load(0, (d.b,), "int"))),
        naive_mask=lambda i, j, L: (j <= i) | (j < L[0][:, None, None, None]),
        loads=lambda shape: [torch.tensor([3, 9, 1, 60, 1, 40, 0])],
    ),
    Case(
        "by-request-padding-zero",
        shape=(len(MIXED), HQ, HKV, 70, 70, D, DV),
        mask=lambda d: E.all_of(causal(d), E.load(0, (d.b, d.k), "bool")),
        naive_mask=lambda i, j, L: (j <= i) & L[0][:, None, None, : j.shape[-1]],
        loads=lambda shape: [torch.arange(70)[None] >= torch.tensor([2, 9, 1, 50, 1, 0, 0])[:, None]],
        empty_rows="zero",
    ),
    Case(
        "logit-scale-by-position",
        shape=SEQUENCE,
        score=lambda d, s: E.mul(s, E.load(0, (d.q,), "float")),
        naive_score=lambda s, i, j, L: s * L[0][i],
        mask=causal,
        naive_mask=naive_causal,
        loads=lambda shape: [torch.rand(70)],
    ),
    Case(
        "bias-by-key",
        shape=SEQUENCE,
        score=lambda d, s: E.add(E.mul(E.const(0.25), s), E.load(0, (d.k,), "float")),
        naive_score=lambda s, i, j, L: 0.25 * s + L[0][: j.shape[-1]],
        mask=causal,
        naive_mask=naive_causal,
        loads=lambda shape: [torch.randn(70)],
    ),
    Case(
        "scale-by-length",
        shape=SEQUENCE,
        score=lambda d, s: E.mul(s, E.function("rsqrt", E.as_float(d.Skv))),
        naive_score=lambda s, i, j, L: s / math.sqrt(s.shape[-1]),
        mask=causal,
        naive_mask=naive_causal,
    ),
    Case("bottom-right", shape=(1, HQ, HKV, 7, 70, D, DV), mask=lambda d: E.le(d.k, E.add(d.q, E.sub(d.Skv, d.Sq))), naive_mask=naive_causal, empty_rows="zero"),
]
BY_CASE = {c.name: c for c in CASES}


def call(case: Case, p: Paged, backend: str = "reference") -> Tensor:
    spec, sizes = case.spec(), list(case.sizes.values())
    o: Tensor = torch.ops.attnopt.paged_attention(*p.arguments, p.loads, sizes, spec.to_json(), backend)
    return o


def loads_of(case: Case) -> list[Tensor]:
    torch.manual_seed(0)
    return case.loads(case.shape)
