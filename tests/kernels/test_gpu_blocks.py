"""Maps of blocks on a real GPU: the same as on the CPU, without waiting, and read rightly by the kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnopt.kernels import varlen
from attnopt.kernels.block_map import BlockMap, block_map
from attnopt.kernels.tiling import bind_sizes
from attnopt.kernels.triton import launch
from tests.kernels.cases import BY_NAME, CASES, Case, Shape
from tests.kernels.mask_cases import MASK_CASES, MASKS
from tests.kernels.poison import poisoned
from tests.kernels.test_gpu import DTYPES, check, of_shape, on_gpu
from tests.kernels.test_varlen import HKV, HQ, RAGGED, cumulated, one_by_one, tensors

pytestmark = pytest.mark.gpu

ANY_SHAPE = [
    "padding-long",
    "padding-by-lengths",
    "padding-of-queries-and-keys",
    "documents",
    "documents-causal-padded-window",
    "chunks-by-position",
    "prefix-by-lengths",
    "block-table",
    "dense-mask",
    "threshold-of-a-float",
]
"""Masks whose tensors are made for any shape."""
OF_BOTH = [*CASES, *MASK_CASES]


def map_of(case: Case, device: str, BLOCK_M: int, BLOCK_N: int, transposed: bool = False) -> BlockMap:
    q, k, v, loads = case.tensors(torch.float32)
    spec = case.spec()
    sizes = bind_sizes(spec, list(case.sizes.values()), q, k, v)
    return block_map(spec.mask, [x.to(device) for x in loads], sizes, (*q.shape[:3], k.shape[2]), BLOCK_M, BLOCK_N, torch.device(device), transposed)


def same(a: BlockMap, b: BlockMap) -> None:
    assert torch.equal(a.counts.cpu(), b.counts.cpu())
    assert torch.equal(a.indices.cpu(), b.indices.cpu())


@pytest.mark.parametrize("transposed", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("case", OF_BOTH, ids=lambda c: c.name)
def test_the_map_is_that_of_the_cpu(case: Case, transposed: bool) -> None:
    same(map_of(case, "cuda", 16, 32, transposed), map_of(case, "cpu", 16, 32, transposed))


@pytest.mark.parametrize("name", ANY_SHAPE)
def test_large_maps_are_those_of_the_cpu(name: str) -> None:
    case = of_shape(MASKS[name], (3, 2, 1, 5000, 5000, 16, 16))
    same(map_of(case, "cuda", 128, 64), map_of(case, "cpu", 128, 64))


@DTYPES
@pytest.mark.parametrize("case", MASK_CASES, ids=lambda c: c.name)
def test_mask(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@DTYPES
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("S", [1, 127, 777])
@pytest.mark.parametrize("name", ANY_SHAPE)
def test_mask_at_odd_lengths(name: str, S: int, D: int, dtype: torch.dtype) -> None:
    if S == 1 and name in ("padding-by-lengths", "padding-long", "padding-of-queries-and-keys", "prefix-by-lengths", "threshold-of-a-float"):
        pytest.skip("its lengths are drawn from 1 to S - 1")
    shape: Shape = (2, 4, 2, S, S, D, D)
    check(of_shape(MASKS[name], shape), dtype)


@pytest.mark.parametrize("name", [n for n in ANY_SHAPE if MASKS[n].empty_rows not in ("uniform", "program")])
def test_hidden_keys_are_not_read(name: str) -> None:
    case = of_shape(MASKS[name], (3, 4, 2, 777, 777, 64, 64))
    q, k, v, loads = on_gpu(case, torch.float16)
    hidden = poisoned(case, q, k, v, loads, launch.block_sizes(case.spec(), "cuda", q.dtype)[1])
    if hidden is None:
        pytest.skip("some query sees each of its keys")
    o, _ = launch.attention(q, k, v, loads, [], case.spec())
    again, _ = launch.attention(q, *hidden, loads, [], case.spec())
    assert torch.equal(again.nan_to_num(7.0), o.nan_to_num(7.0))


@pytest.mark.parametrize("name", ["documents", "padding-of-queries-and-keys", "block-table"])
def test_a_map_that_is_given_gives_the_same(name: str) -> None:
    case = of_shape(MASKS[name], (2, 4, 2, 777, 777, 64, 64))
    q, k, v, loads = on_gpu(case, torch.bfloat16)
    spec = case.spec()
    own, _ = launch.attention(q, k, v, loads, [], spec)
    blocks = map_of(case, "cuda", *launch.block_sizes(spec, "cuda", q.dtype))
    given, _ = launch.attention(q, k, v, loads, [], spec, blocks=blocks)
    assert torch.equal(own.nan_to_num(7.0), given.nan_to_num(7.0))
    # and it is read: without its blocks no key is seen
    nothing = BlockMap(blocks.counts * torch.tensor([0, 0, 1], device="cuda", dtype=torch.int32), blocks.indices, blocks.BLOCK_M, blocks.BLOCK_N)
    assert not torch.equal(launch.attention(q, k, v, loads, [], spec, blocks=nothing)[0].nan_to_num(7.0), own.nan_to_num(7.0))


@pytest.mark.parametrize("case", OF_BOTH, ids=lambda c: c.name)
def test_no_wait_for_the_device(case: Case) -> None:
    q, k, v, loads = on_gpu(case, torch.float16)
    spec, sizes = case.spec(), list(case.sizes.values())
    launch.attention(q, k, v, loads, sizes, spec)
    bound = bind_sizes(spec, sizes, q, k, v)
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch.attention(q, k, v, loads, sizes, spec)
        for BLOCK_N in (16, 48):  # the second is met for the first time: nothing is kept of it
            block_map(spec.mask, loads, bound, (*q.shape[:3], k.shape[2]), 16, BLOCK_N, q.device)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("warm", [False, True], ids=["first in the graph", "warm"])
def test_a_cuda_graph_maps_the_mask_that_it_finds(warm: bool) -> None:
    """The padding changes between replays; what is kept from call to call must not be what a capture only promised."""
    S = 600 if warm else 601
    case = of_shape(MASKS["padding-long"], (3, 4, 2, S, S, 64, 64))
    q, k, v, (keep,) = on_gpu(case, torch.float16)
    spec = case.spec()
    launch.attention(*(x[:, :, :64] for x in (q, k, v)), [keep[:, :64]], [], spec)  # compiled
    if warm:
        launch.attention(q, k, v, [keep], [], spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = launch.attention(q, k, v, [keep], [], spec)
    for n in (S, 17, 300):
        keep.copy_((torch.arange(S, device="cuda") < n).expand_as(keep))
        graph.replay()
        want, _ = launch.attention(q, k, v, [keep.clone()], [], spec)
        assert torch.equal(o, want)
        exact, _ = case.naive(q.cpu(), k.cpu(), v.cpu(), [keep.cpu()])
        torch.testing.assert_close(o.double().cpu(), exact, atol=3e-3, rtol=3e-3)


# ------------------------------------------------------------------------------------------------ packed sequences


@DTYPES
@pytest.mark.parametrize(("causal", "window"), [(False, (None, None)), (True, (None, None)), (True, (100, None)), (False, (7, 9))])
@pytest.mark.parametrize("lengths", [RAGGED, ([700, 1, 0, 333, 64], [700, 1, 0, 333, 64]), ([129, 500, 3], [400, 20, 0])], ids=["short", "alike", "ragged"])
def test_packed(lengths: tuple[list[int], list[int]], causal: bool, window: tuple[int | None, int | None], dtype: torch.dtype) -> None:
    Tq, Tk = (sum(x) for x in lengths)
    q, k, v = tensors(Tq, Tk, dtype)
    packing = varlen.pack(cumulated(lengths[0]).cuda(), cumulated(lengths[1]).cuda(), queries=Tq, keys=Tk, causal=causal, window=window)
    o = varlen.attention(q.cuda(), k.cuda(), v.cuda(), packing, backend="triton")
    tolerance = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(o.double().cpu(), one_by_one(q, k, v, lengths, causal, window, q.shape[2] ** -0.5, None), atol=tolerance, rtol=tolerance)


def test_packed_gradients() -> None:
    lengths = ([129, 500, 3], [129, 500, 3])
    q, k, v = tensors(632, 632)
    leaves = [x.cuda().requires_grad_() for x in (q, k, v)]
    o = varlen.attention(*leaves, varlen.pack(cumulated(lengths[0]).cuda(), queries=632, causal=True), backend="triton")
    grad = torch.randn_like(o)
    got = torch.autograd.grad(o, leaves, grad)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(one_by_one(*exact, lengths, True, (None, None), q.shape[2] ** -0.5, None), exact, grad.double().cpu())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, atol=5e-5, rtol=5e-5)


def test_packing_does_not_wait() -> None:
    cu = cumulated([700, 1, 0, 333, 64]).cuda()
    q, k, v = (torch.randn(1098, h, 64, device="cuda", dtype=torch.float16) for h in (HQ, HKV, HKV))

    def run() -> Tensor:
        return varlen.attention(q, k, v, varlen.pack(cu, queries=1098, causal=True), backend="triton")

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------------------ graphs


def test_layers_share_one_map_on_the_gpu() -> None:
    from attnopt.config import OptimizeConfig
    from attnopt.passes.pipeline import run_pipeline
    from tests.passes.test_share_block_maps import B, Encoder, S, inputs, maps, shape_of

    model = Encoder("ppp").eval().cuda()
    dynamic = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},) * 2
    with torch.device("cuda"):
        gm = torch.export.export(model, tuple(x.cuda() for x in inputs()), dynamic_shapes=dynamic, strict=False).module(check_guards=False)
        optimized = run_pipeline(gm, OptimizeConfig(backend="triton")).graph_module
        assert len(maps(optimized)) == 1 and shape_of(optimized) == "000"
        for b, s in ((B, S), (2, 300), (1, 3)):
            args = tuple(x.cuda() for x in inputs(b, s))
            with torch.no_grad():
                torch.testing.assert_close(optimized(*args), model(*args), atol=1e-4, rtol=1e-4)


def test_the_case_of_a_causal_padded_batch_skips_what_it_can() -> None:
    """Left padding of a third: a third of the blocks less, and no mask in most of the rest."""
    case = of_shape(BY_NAME["causal-left-padding-uniform"], (2, 4, 2, 1024, 1024, 64, 64))
    spec = case.spec()
    keep = (torch.arange(1024) >= 341).expand(2, -1).cuda()
    found = block_map(spec.mask, [keep], {"s0": 2, "s1": 1024}, (2, 4, 1024, 1024), 128, 64, torch.device("cuda"))
    partial, full = found.counts[..., :2].sum((0, 1, 2)).tolist()
    causal = sum(2 * (i + 1) for i in range(8)) * 2
    assert partial + full < 0.6 * causal
    assert full > partial
