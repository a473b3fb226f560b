"""The Hopper kernels on a real GPU against attention written out in float64."""

from __future__ import annotations

import pytest
import torch

from attnopt.kernels.gluon import launch
from attnopt.kernels.programs import programs_of
from tests.kernels.cases import BY_NAME, CASES, Case
from tests.kernels.mask_cases import MASK_CASES, MASKS
from tests.kernels.poison import poisoned
from tests.kernels.test_gpu import TOLERANCE, of_shape, on_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.is_available() and launch.available() is not None, reason=str(launch.available()))]

DTYPES = pytest.mark.parametrize("dtype", launch.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
TAKEN = [c for c in [*CASES, *MASK_CASES] if launch.refusal(c.spec(), "cuda", torch.bfloat16) is None and not {n % 8 for n in c.shape[5:]} - {0}]


def check(case: Case, dtype: torch.dtype) -> None:
    q, k, v, loads = case.tensors(dtype)
    want, want_lse = case.naive(q, k, v, loads)
    given = q.cuda(), k.cuda(), v.cuda(), [x.cuda() for x in loads], list(case.sizes.values()), case.spec()
    o, lse = launch.attention(*given)
    assert o.dtype == dtype and o.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(o.double().cpu(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)
    torch.testing.assert_close(lse.double().cpu(), want_lse, atol=1e-4, rtol=1e-4)
    again = launch.attention(*given)  # by the plan of the first call
    assert torch.equal(again[0].nan_to_num(7.0), o.nan_to_num(7.0)) and torch.equal(again[1], lse)


@DTYPES
@pytest.mark.parametrize("case", TAKEN, ids=lambda c: c.name)
def test_case(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("D", [40, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("name", ["full", "causal-GQA", "window-causal", "alibi-causal", "softcap-causal", "dense-bias", "padding-zero", "sinks-causal-GQA"])
def test_head_sizes(name: str, D: int) -> None:
    # lengths that no block size divides
    check(of_shape(BY_NAME[name], (2, 4, 2, 333, 333, D, D)), torch.bfloat16)


@pytest.mark.parametrize(("D", "Dv"), [(64, 128), (128, 64), (192, 128), (40, 72)])
def test_unequal_head_sizes(D: int, Dv: int) -> None:
    check(of_shape(BY_NAME["causal-GQA"], (1, 4, 2, 200, 200, D, Dv)), torch.bfloat16)


@pytest.mark.parametrize(("Sq", "Skv"), [(1, 1000), (17, 513), (513, 17), (128, 128), (129, 1023)])
@pytest.mark.parametrize("name", ["full", "causal-GQA", "reverse-causal", "relative-buckets"])
def test_lengths(name: str, Sq: int, Skv: int) -> None:
    check(of_shape(BY_NAME[name], (1, 4, 4, Sq, Skv, 64, 64)), torch.float16)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("name", ["full", "causal-GQA", "window-causal"])
def test_many_tiles_for_each_multiprocessor(name: str, D: int) -> None:
    check(of_shape(BY_NAME[name], (2, 16, 8, 3001, 3001, D, D)), torch.bfloat16)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("name", ["padding-by-lengths", "documents-causal-padded-window", "block-table"])
def test_maps_of_odd_lengths(name: str, D: int) -> None:
    check(of_shape(MASKS[name], (3, 4, 2, 1777, 1777, D, D)), torch.bfloat16)


@pytest.mark.parametrize("name", [n for n in MASKS if MASKS[n].empty_rows not in ("uniform", "program")])
def test_hidden_keys_are_not_read(name: str) -> None:
    case = MASKS[name]
    if case not in TAKEN:
        pytest.skip("a case that this kernel does not take")
    q, k, v, loads = on_gpu(case, torch.float16)
    sizes = launch.block_sizes(case.spec(), "cuda", torch.float16)
    hidden = None if sizes is None else poisoned(case, q, k, v, loads, sizes[1])
    if hidden is None:
        pytest.skip("some query sees each of its keys")
    o, _ = launch.attention(q, k, v, loads, list(case.sizes.values()), case.spec())
    again, _ = launch.attention(q, *hidden, loads, list(case.sizes.values()), case.spec())
    assert torch.equal(again.nan_to_num(7.0), o.nan_to_num(7.0))


def test_large_scores() -> None:
    """Maxima that grow from block to block, slowly and by jumps: sums are kept under a maximum that was passed a little."""
    case = of_shape(BY_NAME["full"], (1, 2, 2, 300, 2000, 64, 64))
    q, k, v, _ = case.tensors(torch.bfloat16)
    for growth in (3e-4, 3e-3, 3e-2):
        # visited from the last key on
        k = (k.float().sign() * (1 + growth * torch.arange(2000, 0, -1))[None, None, :, None]).to(torch.bfloat16)
        want, want_lse = case.naive(q.float().sign().to(torch.bfloat16), k, v, [])
        o, lse = launch.attention(q.float().sign().to(torch.bfloat16).cuda(), k.cuda(), v.cuda(), [], [], case.spec())
        torch.testing.assert_close(o.double().cpu(), want, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse.double().cpu(), want_lse, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("layout", ["BSHD", "transposed", "stride-2", "unaligned"])
def test_any_strides(layout: str) -> None:
    case = of_shape(BY_NAME["causal-GQA"], (2, 4, 2, 150, 150, 64, 64))
    q, k, v, loads = on_gpu(case, torch.float16)
    want, _ = case.naive(q.cpu(), k.cpu(), v.cpu(), [])
    if layout == "BSHD":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "transposed":
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    elif layout == "stride-2":
        q, k, v = (torch.stack([x, x], -1)[..., 0] for x in (q, k, v))
    else:
        q, k, v = (torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v))
    o, _ = launch.attention(q, k, v, loads, [], case.spec())
    torch.testing.assert_close(o.double().cpu(), want, atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize("name", ["causal-GQA", "documents", "padding-long"])
def test_no_wait_and_in_a_cuda_graph(name: str) -> None:
    case = of_shape({**MASKS, **BY_NAME}[name], (3, 4, 2, 600, 600, 64, 64))
    q, k, v, loads = on_gpu(case, torch.float16)
    spec = case.spec()
    assert not programs_of(spec).retries
    want, _ = launch.attention(q, k, v, loads, [], spec)
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch.attention(q, k, v, loads, [], spec)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = launch.attention(q, k, v, loads, [], spec)
    o.fill_(7.0)
    graph.replay()
    assert torch.equal(o.nan_to_num(7.0), want.nan_to_num(7.0))
