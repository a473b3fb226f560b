"""What is asked of the generated kernels over a paged cache, under the interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.kernels import paged_batched, paged_reference
from attnopt.kernels.paged_choice import CacheSetting, choose
from attnopt.kernels.registry import BackendRefusal
from attnopt.kernels.triton import cache_write, launch_paged
from attnopt.kernels.triton.launch_paged import Config
from attnopt.runtime.paged_cache import empty_scales
from tests.kernels.cases import BY_NAME
from tests.kernels.paged import BY_CASE, MIXED, Paged, call, loads_of, one_by_one, paged, slots_of

TOLERANCE = {"float32": 5e-6, "float16": 3e-3, "bfloat16": 2e-2}


def launched(name: str, p: Paged, **options: object) -> Tensor:
    case = BY_CASE[name]
    return launch_paged.attention(*p.arguments, p.loads, list(case.sizes.values()), case.spec(), **options)  # type: ignore[arg-type]


def check_case(name: str, dtype: str, page_size: str) -> None:
    """The operator's choice, a mixed batch."""
    case = BY_CASE[name]
    p = paged(MIXED, int(page_size), getattr(torch, dtype), Hkv=case.shape[2], loads=loads_of(case))
    o = call(case, p, "triton")
    assert o.dtype == p.q.dtype and o.shape == (len(p.q), 4, 16)
    torch.testing.assert_close(o.double(), one_by_one(case, p), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def check_splits(name: str) -> None:
    """Any number of splits gives the same, with blocks so small that there are more of all kinds; the same number twice gives the same bits."""
    case = BY_CASE[name]
    p = paged(((1, 70), (9, 65), (0, 3)), 16, loads=loads_of(case))
    want = one_by_one(case, p)
    for n in (1, 4):
        c = Config(16, 16, 2, 4, 1)
        o = launched(name, p, chosen=c, num_splits=n)
        torch.testing.assert_close(o.double(), want, atol=5e-6, rtol=5e-6)
        assert torch.equal(o, launched(name, p, chosen=c, num_splits=n))
        o = launched(name, p, chosen=replace(c, one_query=True), num_splits=n)  # one loop, and not one for each kind of block
        torch.testing.assert_close(o.double(), want, atol=5e-6, rtol=5e-6)


def check_heads(Hq: str, Hkv: str, D: str, Dv: str, page_size: str) -> None:
    """Any number of heads in a group, and head sizes of one block or two."""
    case = BY_CASE["causal"]
    p = paged(((2, 21), (1, 33)), int(page_size), Hq=int(Hq), Hkv=int(Hkv), D=int(D), Dv=int(Dv))
    want = one_by_one(case, p)
    for n in (1, 2):
        torch.testing.assert_close(launched("causal", p, num_splits=n).double(), want, atol=2e-5, rtol=2e-5)


def check_latents(_: str) -> None:
    """The values are the first features of the keys, in one tensor."""
    case = BY_CASE["causal"]
    p = paged(((2, 21), (1, 33)), 16, Hq=20, Hkv=1, D=48, Dv=32)
    p = replace(p, v_cache=p.k_cache[..., :32], values=[k[..., :32] for k in p.keys])
    assert launch_paged.shares(p.k_cache, p.v_cache)
    torch.testing.assert_close(launched("causal", p).double(), one_by_one(case, p), atol=2e-5, rtol=2e-5)


def check_chunks(name: str) -> None:
    """A prompt at once, in chunks and token by token: the same numbers."""
    case = BY_CASE[name]
    long, short = 17, 11
    whole = paged(((long, long), (short, short)), 16, loads=loads_of(case))
    want = one_by_one(case, whole)
    for chunk in (1, 7, long):
        got: list[list[Tensor]] = [[], []]
        for start in range(0, long, chunk):
            ends = [min(start + chunk, n) for n in (long, short)]
            counts = [max(0, e - start) for e in ends]
            q = torch.cat([whole.q[base + start : base + start + m] for base, m in zip((0, long), counts, strict=True)])
            cu = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32)
            step = replace(whole, q=q, cu_seqlens_q=cu, seqlens_k=torch.tensor(ends, dtype=torch.int32))
            for r, x in enumerate(call(case, step, "triton").split(counts)):
                got[r].append(x)
        torch.testing.assert_close(torch.cat([*got[0], *got[1]]).double(), want, atol=5e-6, rtol=5e-6)


def check_nothing_else_is_read(_: str) -> None:
    """Pages before a window or a chunk may be given away, tokens of no request are zero, a batch may have no tokens, and a cache one page a request."""
    case = BY_CASE["window"]
    p = paged(((1, 73), (3, 75)), 16)
    want = launched("window", p)
    torch.testing.assert_close(want.double(), one_by_one(case, p), atol=5e-6, rtol=5e-6)
    p.give_away(3)  # keys 0..47: the query at 72 sees keys from 52 on, in a block that begins at 32
    assert torch.equal(launched("window", p), want)
    more = replace(p, q=torch.cat([p.q, torch.full_like(p.q[:3], torch.nan)]))
    for n in (1, 2):
        o = launched("window", more, num_splits=n)
        assert not o[-3:].any()
        torch.testing.assert_close(o[:-3], want, atol=5e-6, rtol=5e-6)
    assert launched("window", paged(((0, 9), (0, 0)), 16)).shape == (0, 4, 16)
    case = BY_CASE["chunks"]  # of 8 positions
    spec = case.spec()
    p = paged(((1, 60), (3, 62)), 16)
    want = one_by_one(case, p)
    p.give_away(3)
    for f in (paged_reference.attention, launch_paged.attention):
        torch.testing.assert_close(f(*p.arguments, [], [], spec).double(), want, atol=5e-6, rtol=5e-6)
    case = BY_CASE["window"]
    one = paged(((7, 33), (1, 75)), 75, spare=0)  # a page that is no power of two
    assert one.block_table.shape == (2, 1)
    torch.testing.assert_close(launched("window", one, num_splits=2).double(), one_by_one(case, one), atol=5e-6, rtol=5e-6)


def scales_of(cache: Tensor) -> tuple[Tensor, Tensor]:
    """As the runtime allocates them for a cache of keys and one of values, NaN."""
    k, v = (empty_scales(*cache.shape[:3], cache.device).fill_(torch.nan) for _ in range(2))
    return k, v


def check_quantized(cache: str, dtype: str, D: str = "16", Dv: str = "16") -> None:
    """What the kernel writes is what PyTorch writes, and what it reads is cache * scale."""
    case, kind = BY_CASE["window"], getattr(torch, cache)
    p = paged(((1, 40), (9, 21)), 16, getattr(torch, dtype), D=int(D), Dv=int(Dv))
    p = replace(p, q=p.q * (16 / int(D)) ** 0.5)
    k8, v8 = (torch.zeros(x.shape, dtype=torch.uint8).view(kind) for x in (p.k_cache, p.v_cache))
    caches = (k8, v8, *scales_of(k8))
    same = (*(x.clone() for x in caches[:2]), *(torch.full(k8.shape[:3], torch.nan) for _ in range(2)))
    k, v, slots = torch.cat(p.keys), torch.cat(p.values), slots_of(p)
    cache_write.write(k, v, *caches[:2], slots, *caches[2:])
    paged_reference.cache_write(k, v, *same[:2], slots, *same[2:])
    for a, b in zip(caches, same, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)
    held = [(x.double() * s.double().unsqueeze(-1)).flatten(0, 1)[slots].split([len(x) for x in p.keys]) for x, s in zip(caches[:2], caches[2:], strict=True)]
    want = one_by_one(case, replace(p, keys=list(held[0]), values=list(held[1])))
    for n, scales in ((1, caches[2:]), (2, same[2:])):  # however they lie
        quantized = replace(p, k_cache=k8, v_cache=v8)
        o = launched("window", quantized, k_scale=scales[0], v_scale=scales[1], num_splits=n)
        torch.testing.assert_close(o.double(), want, atol=2 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def check_in_float16(cache: str, dtype: str, name: str) -> None:
    """Products of a quantized cache in float16, where queries of bfloat16 and values are far out of its range, a value is zero, and a sink comes first."""
    case, kind = BY_CASE[name], getattr(torch, cache)
    p = paged(((1, 40), (9, 21)), 16, getattr(torch, dtype), D=64, Dv=32, loads=loads_of(case))
    k, v, slots = torch.cat(p.keys), torch.cat(p.values), slots_of(p)
    v[3] = 0.0
    for size in (1e-4, 1.0, 1e4) if dtype == "float16" else (1e-15, 1e-5, 1e6, 1e15):
        k8, v8 = (torch.zeros(x.shape, dtype=torch.uint8).view(kind) for x in (p.k_cache, p.v_cache))
        ks, vs = scales_of(k8)
        inverse = 1.0 if dtype == "float16" else 0.5 / size
        paged_reference.cache_write((k * (0.5 / inverse)).to(k.dtype), (v * size).to(v.dtype), k8, v8, slots, ks, vs)
        held = [(x.double() * s.double().unsqueeze(-1)).flatten(0, 1)[slots].split([len(x) for x in p.keys]) for x, s in ((k8, ks), (v8, vs))]
        scaled = replace(p, q=p.q * inverse)
        want = one_by_one(case, replace(scaled, keys=list(held[0]), values=list(held[1])))
        for n in (1, 3):
            c = Config(16, 16, 2, 4, 1)
            o = launched(name, replace(scaled, k_cache=k8, v_cache=v8), k_scale=ks, v_scale=vs, chosen=c, num_splits=n)
            assert float((o.double() - want).norm()) <= TOLERANCE[dtype] * float(want.norm()), (size, n)


def check_write(dtype: str) -> None:
    """As PyTorch writes it: tokens without a slot left out, values of no size, keys in a tensor of another order."""
    for D, Dv in ((24, 40), (48, 0)):
        k, v = (torch.randn(3, 20, n).to(getattr(torch, dtype)).transpose(0, 1) for n in (D, Dv))
        slots = torch.randperm(20 * 8)[:20]
        slots[5] = -1
        found = []
        for f in (paged_reference.cache_write, cache_write.write):
            caches = tuple(torch.full((20, 8, 3, n), 7.0, dtype=k.dtype) for n in (D, Dv))
            f(k, v, *caches, slots)
            found.append(caches)
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


def check_more_queries_than_keys(_: str) -> None:
    """As in cross attention: where no program looks at positions, they may lie before the first key."""
    p, case = paged(((5, 3), (2, 40)), 16), BY_CASE["full"]
    want = torch.cat([case.naive(*(x.transpose(0, 1).unsqueeze(0) for x in one), [])[0][0].transpose(0, 1) for one in zip(p.q.split([5, 2]), p.keys, p.values, strict=True)])
    for o in (call(case, p), launched("full", p)):
        torch.testing.assert_close(o.double(), want, atol=5e-6, rtol=5e-6)


def check_refusals(_: str) -> None:
    """What the generated kernels do not compute, in words; ``auto`` then names another, and why."""
    cpu = CacheSetting("cpu", torch.float32, 16, 16, 16)
    causal, dense = BY_CASE["causal"].spec(), BY_NAME["padding-uniform"].spec()
    k, q, length = causal.dims.k, causal.dims.q, causal.dims.Skv
    by_length = causal.replace(mask=E.le(k, E.add(q, E.floordiv(length, E.const(2)))))
    table = causal.replace(score=E.add(causal.score, E.as_float(E.as_int(E.function("sqrt", E.as_float(E.mul(q, k)))))))
    said = {
        "its pages hold a power of two of keys from 16 on, and page_size is 24": (causal, replace(cpu, page_size=24)),
        "it has D up to 576 and Dv up to 512, and they are 640 and 16": (causal, replace(cpu, D=640)),
        "it computes float16, bfloat16 and float32, and the query is float64": (causal, replace(cpu, dtype=torch.float64)),
        "rows without a visible key average all keys, of which there are more at each step": (dense, cpu),
        "how far a query sees depends on the length of each request": (by_length, cpu),
        "a part of its program would be a table of all queries times all keys": (table, cpu),
    }
    assert choose(causal, cpu)[0] == "triton"
    assert choose(causal, replace(cpu, page_size=24, contiguous=True))[0] == "triton"
    for reason, (spec, setting) in said.items():
        name, why = choose(spec, setting)
        assert name == ("reference" if paged_batched.refusal(spec, "cpu") else "batched") and f"(not triton: {reason}" in why, (name, why)
        try:
            choose(spec, setting, "triton")
        except BackendRefusal as e:
            assert e.reason == reason
        else:
            raise AssertionError(f"triton took what it cannot compute: {reason}")


CHECKS: dict[str, Callable[..., None]] = {
    "case": check_case,
    "splits": check_splits,
    "heads": check_heads,
    "latents": check_latents,
    "chunks": check_chunks,
    "quantized": check_quantized,
    "in-float16": check_in_float16,
    "write": check_write,
    "more-queries-than-keys": check_more_queries_than_keys,
    "refusals": check_refusals,
    "nothing-else-is-read": check_nothing_else_is_read,
}
