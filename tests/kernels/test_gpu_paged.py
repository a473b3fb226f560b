"""Attention over a paged cache on a real GPU: against each request alone in float64, and under CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.kernels import paged_reference
from attnopt.kernels.triton import cache_write
from attnopt.kernels.triton.launch import shared_memory
from attnopt.kernels.triton.launch_paged import config
from tests.kernels.paged import BY_CASE, CASES, MIXED, call, loads_of, one_by_one, paged, slots_of
from tests.kernels.paged_checks import launched, scales_of

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
LONG = ((1, 700), (1, 17), (130, 400), (0, 40), (64, 64), (1, 1), (1, 513))
ONES = ((1, 700), (1, 17), (1, 1000), (1, 1), (1, 513))


@DTYPES
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_case(name: str, page_size: int, dtype: torch.dtype) -> None:
    case = BY_CASE[name]
    p = paged(MIXED, page_size, dtype, Hkv=case.shape[2], loads=loads_of(case))
    o = call(case, p.on("cuda"), "triton")
    assert o.dtype == dtype
    torch.testing.assert_close(o.cpu().double(), one_by_one(case, p), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(("Hq", "Hkv", "D", "Dv"), [(32, 8, 128, 128), (8, 8, 64, 64), (71, 1, 64, 64), (16, 1, 576, 512), (6, 2, 80, 80), (4, 2, 256, 256), (8, 2, 192, 128)])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("num_splits", [1, 3, 40, None])
def test_heads_and_splits(Hq: int, Hkv: int, D: int, Dv: int, page_size: int, num_splits: int | None, dtype: torch.dtype) -> None:
    case = BY_CASE["causal"]
    p = paged(LONG, page_size, dtype, Hq=Hq, Hkv=Hkv, D=D, Dv=Dv)
    p = replace(p, q=p.q * (4 * D**-0.5))
    moved = p.on("cuda")
    o = launched("causal", moved, num_splits=num_splits)
    torch.testing.assert_close(o.cpu().double(), one_by_one(case, p), atol=2 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(o, launched("causal", moved, num_splits=num_splits))


@pytest.mark.parametrize("num_splits", [1, 5])
def test_a_launch_that_is_known_takes_other_tensors(num_splits: int) -> None:
    """What was compiled at the first call is launched again for tensors elsewhere, and not for those that lie at other multiples."""
    case = BY_CASE["causal"]
    ones = ((1, 700), (1, 17), (1, 400), (1, 1), (1, 513))
    for lengths in (ones, LONG, ones):
        for seed in (0, 1):
            p = paged(lengths, 16, torch.bfloat16, D=128, Dv=128, seed=seed)
            p = replace(p, q=p.q * 0.35)
            want = one_by_one(case, p)
            moved = p.on("cuda")
            for shift in (0, 1, 0):
                held = torch.empty(moved.q.numel() + 8, dtype=moved.q.dtype, device="cuda")
                q = held[shift : shift + moved.q.numel()].view_as(moved.q).copy_(moved.q)
                o = launched("causal", replace(moved, q=q), num_splits=num_splits)
                torch.testing.assert_close(o.cpu().double(), want, atol=4e-2, rtol=2e-2)


@pytest.mark.parametrize("cache", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("lengths", [LONG, ONES], ids=["mixed", "one_query"])
def test_quantized(lengths: tuple[tuple[int, int], ...], dtype: torch.dtype, cache: torch.dtype) -> None:
    if cache == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8_e4m3fn needs compute capability 8.9")
    p = paged(lengths, 16, dtype, Hq=8, D=128, Dv=128)
    p = replace(p, q=p.q * 0.35).on("cuda")
    k, v, slots = torch.cat(p.keys).cuda(), torch.cat(p.values).cuda(), slots_of(p).cuda()
    v[5] = 0.0
    k8, v8 = (torch.zeros(x.shape, dtype=torch.uint8, device="cuda").view(cache) for x in (p.k_cache, p.v_cache))
    ks, vs = scales_of(k8)
    cache_write.write(k, v, k8, v8, slots, ks, vs)
    small, scale = paged_reference.quantized(k, cache)
    torch.testing.assert_close(ks.flatten(0, 1)[slots], scale, rtol=1e-6, atol=0)
    step = (k8.flatten(0, 1)[slots].float() - small.float()).abs()
    assert float((step > 0).float().mean()) < 1e-3 and bool((step <= (1 if cache == torch.int8 else 32)).all())
    want = paged_reference.attention(p.q.double(), k8, v8, *p.arguments[3:], [], [], BY_CASE["window"].spec(), ks, vs)
    for scales in ((ks, vs), (ks.contiguous(), vs.contiguous())):
        for n in (None, 1, 3):
            o = launched("window", replace(p, k_cache=k8, v_cache=v8), k_scale=scales[0], v_scale=scales[1], num_splits=n)
            torch.testing.assert_close(o.double(), want, atol=1e-2, rtol=1e-2)


def test_many_long_tiles_of_a_contiguous_cache() -> None:
    """At least two for each multiprocessor: larger blocks, one program each. Beside them the blocks of few tiles, and fewer tiles in as many programs as multiprocessors."""
    case, many = BY_CASE["causal"], torch.cuda.get_device_properties(0).multi_processor_count
    for requests in (1, 16, 2 * -(-many // 8)):
        p = paged(tuple((1, 2500 - 37 * (r % 11)) for r in range(requests)), 2500, torch.bfloat16, Hq=32, Hkv=8, D=128, Dv=128, spare=0)
        p = replace(p, q=p.q * 0.35)
        assert p.block_table.shape[1] == 1
        moved = p.on("cuda")
        want = one_by_one(case, p)
        usual = config(128, 128, 4, 1, torch.bfloat16, shared_memory(0))
        for options in ({}, {"chosen": usual}, {"chosen": replace(usual, BLOCK_N=128), "num_splits": 1}):
            torch.testing.assert_close(launched("causal", moved, **options).cpu().double(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["causal", "relative-buckets", "softcap-window-sinks"])
def test_one_graph_serves_all_lengths(name: str) -> None:
    """A captured call of one token a request, replayed for other lengths and pages: nothing was read back when it was captured."""
    case = BY_CASE[name]
    loads = loads_of(case)
    batches = [tuple((1, n) for n in lengths) for lengths in ((5, 60, 17, 1), (64, 3, 33, 48), (1, 1, 0, 70))]
    # all caches of one size, whose tables have one width
    made = [paged(b, 16, torch.float16, Hkv=case.shape[2], loads=loads, seed=i) for i, b in enumerate(batches)]
    pages, columns = max(len(p.k_cache) for p in made), max(p.block_table.shape[1] for p in made)
    same = [
        replace(
            p,
            k_cache=torch.cat([p.k_cache, torch.full((pages - len(p.k_cache), *p.k_cache.shape[1:]), torch.nan, dtype=torch.float16)]),
            v_cache=torch.cat([p.v_cache, torch.full((pages - len(p.v_cache), *p.v_cache.shape[1:]), torch.nan, dtype=torch.float16)]),
            block_table=torch.nn.functional.pad(p.block_table, (0, columns - p.block_table.shape[1]), value=-1),
        )
        for p in made
    ]
    held = same[0].on("cuda")
    call(case, held, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = call(case, held, "triton")
    for p in same:
        for into, x in zip(held.arguments, p.arguments, strict=True):
            into.copy_(x)
        graph.replay()
        torch.testing.assert_close(o.cpu().double(), one_by_one(case, p), atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize("name", ["causal", "window"])
@pytest.mark.parametrize("page_size", [16, 1024])
def test_calls_that_follow_one_another_in_a_graph(name: str, page_size: int) -> None:
    """Each is put in place while the one before it runs, whose result is its query, and waits for it."""
    p = paged(ONES, page_size, torch.bfloat16, Hq=8, D=128, Dv=128, spare=0).on("cuda")

    def chain(wait: bool) -> torch.Tensor:
        q = p.q
        for _ in range(12):
            q = launched(name, replace(p, q=q), num_splits=5)
            if wait:
                torch.cuda.synchronize()
        return q

    want = chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = chain(False)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert not o.isnan().any() and torch.equal(o, want)


def test_writing_waits_for_nothing() -> None:
    k, v = torch.randn(33, 4, 80, device="cuda"), torch.randn(33, 4, 64, device="cuda")
    slots = torch.randperm(12 * 16)[:33].cuda()
    slots[4] = -1
    caches = [(torch.zeros(12, 16, 4, 80, device="cuda"), torch.zeros(12, 16, 4, 64, device="cuda")) for _ in range(2)]
    torch.ops.attnopt.cache_write(k, v, *caches[0], slots)  # compiled before
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.attnopt.cache_write(k, v, *caches[0], slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    paged_reference.cache_write(k, v, *caches[1], slots)
    for a, b in zip(*caches, strict=True):
        assert torch.equal(a, b)
