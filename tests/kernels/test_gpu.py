"""The kernels on a real GPU against attention written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnopt.kernels import ops, reference, registry
from attnopt.kernels.distance_table_op import table_alone
from attnopt.kernels.programs import programs_of
from attnopt.kernels.triton import launch, launch_backward
from attnopt.verify.budget import judge
from tests.kernels import dropout_checks
from tests.kernels.cases import BY_NAME, CASES, Case, Shape
from tests.kernels.operations import OPERATION_CASES

assert ops.__doc__  # the operator is registered
pytestmark = pytest.mark.gpu

# Rounding of the output, and of the probabilities before the product with V in half precision.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
HEADS = [40, 64, 80, 128, 192, 256]


def of_shape(case: Case, shape: Shape) -> Case:
    return Case(**{**vars(case), "shape": shape})


def on_gpu(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    q, k, v, loads = case.tensors(dtype)
    return q.cuda(), k.cuda(), v.cuda(), [x.cuda() for x in loads]


def check(case: Case, dtype: torch.dtype) -> None:
    q, k, v, loads = case.tensors(dtype)
    want, want_lse = case.naive(q, k, v, loads)
    o, lse = launch.attention(q.cuda(), k.cuda(), v.cuda(), [x.cuda() for x in loads], list(case.sizes.values()), case.spec())
    assert o.dtype == dtype and o.transpose(1, 2).is_contiguous()
    if dtype is torch.float32:
        # large scores amplify rounding, so float32 is measured by what the plain computation loses in it (see attnopt.verify.budget)
        plain = judge("", [o.cpu()], [case.naive(q, k, v, loads, dtype)[0]], [want], dtype)
        assert plain.passed, (plain.error, plain.budget)
    else:
        torch.testing.assert_close(o.double().cpu(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)
    torch.testing.assert_close(lse.double().cpu(), want_lse, atol=1e-4, rtol=1e-4)
    again = launch.attention(q.cuda(), k.cuda(), v.cuda(), [x.cuda() for x in loads], list(case.sizes.values()), case.spec())  # by what was compiled at the first call
    assert torch.equal(again[0].nan_to_num(7.0), o.nan_to_num(7.0)) and torch.equal(again[1], lse)


def test_a_launch_that_is_known_takes_other_tensors_and_another_seed() -> None:
    """Also of tensors at other multiples of 16, which are compiled for on their own."""
    case = of_shape(BY_NAME["causal-left-padding-uniform"], (2, 4, 2, 333, 333, 64, 64))
    for seed in (0, 1):
        q, k, v, loads = case.tensors(torch.float16)
        q = q.roll(seed, 2)
        want, _ = case.naive(q, k, v, loads)
        for shift in (0, 1, 0):
            held = torch.empty(q.numel() + 8, dtype=q.dtype, device="cuda")
            moved = held[shift : shift + q.numel()].view_as(q).copy_(q)
            o, _ = launch.attention(moved, k.cuda(), v.cuda(), [x.cuda() for x in loads], [], case.spec())
            torch.testing.assert_close(o.double().cpu(), want, atol=3e-3, rtol=3e-3)
    spec = BY_NAME["full"].spec().replace(dropout=0.5)
    q, k, v, _ = on_gpu(BY_NAME["full"], torch.float16)
    first, other, again = (launch.attention(q, k, v, [], [], spec, seed)[0] for seed in (3, (1 << 61) + 5, 3))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_a_table_that_was_made_before(backend: str) -> None:
    """The same numbers as from the kernel's own, of lengths with and without a tail."""
    if registry.backends()[backend].available() is not None:
        pytest.skip(str(registry.backends()[backend].available()))
    for n in (256, 333):
        case = of_shape(BY_NAME["relative-buckets"], (2, 4, 4, n, n, 64, 64))
        q, k, v, loads = on_gpu(case, torch.float16)
        spec = case.spec()
        margin = registry.table_margin(backend, spec, device="cuda", dtype=torch.float16)
        (part,) = programs_of(spec).parts
        alone = table_alone(spec, part, {0: 0})
        assert alone is not None and margin is not None
        table = torch.ops.attnopt.distance_table(q, loads, [], 2, 4, n, n, alone.to_json(), margin)
        run = torch.ops.attnopt.attention
        for _ in range(2):
            want = run(q, k, v, loads, [], spec.to_json(), backend)
            assert torch.equal(run(q, k, v, loads, [], spec.to_json(), backend, tables=[table]), want)


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", OPERATION_CASES.values(), ids=lambda c: c.name)
def test_operation(case: Case) -> None:
    check(case, torch.float32)


@DTYPES
@pytest.mark.parametrize("D", HEADS)
@pytest.mark.parametrize(
    "name", ["full", "causal-GQA", "window-causal", "alibi-causal", "softcap-causal", "causal-left-padding-uniform", "dense-bias", "padding-program"]
)
def test_head_sizes(name: str, D: int, dtype: torch.dtype) -> None:
    # lengths that no block size divides
    check(of_shape(BY_NAME[name], (2, 4, 2, 333, 333, D, D)), dtype)


@DTYPES
@pytest.mark.parametrize(("Sq", "Skv"), [(1, 1000), (17, 513), (513, 17), (128, 128), (129, 1023)])
@pytest.mark.parametrize("name", ["full", "causal-GQA", "reverse-causal", "relative-buckets"])
def test_lengths(name: str, Sq: int, Skv: int, dtype: torch.dtype) -> None:
    check(of_shape(BY_NAME[name], (1, 4, 4, Sq, Skv, 64, 64)), dtype)


@pytest.mark.parametrize("layout", ["BSHD", "transposed", "stride-2"])
def test_any_strides(layout: str) -> None:
    case = of_shape(BY_NAME["causal-GQA"], (2, 4, 2, 150, 150, 64, 64))
    q, k, v, loads = on_gpu(case, torch.float16)
    want, _ = case.naive(q.cpu(), k.cpu(), v.cpu(), [])
    if layout == "BSHD":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "transposed":
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    else:
        q, k, v = (torch.stack([x, x], -1)[..., 0] for x in (q, k, v))
    o, _ = launch.attention(q, k, v, loads, [], case.spec())
    torch.testing.assert_close(o.double().cpu(), want, atol=3e-3, rtol=3e-3)


@DTYPES
@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
@pytest.mark.parametrize("name", ["full", "causal-GQA", "padding-uniform", "padding-nan", "alibi-causal", "causal-bottom-right-empty-rows-zero"])
def test_backends_agree(name: str, backend: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    q, k, v, loads = on_gpu(case, dtype)
    want, _ = case.naive(q.cpu(), k.cpu(), v.cpu(), [x.cpu() for x in loads])
    with torch.no_grad():
        o = registry.find(backend).run(q, k, v, loads, [], case.spec())
    torch.testing.assert_close(o.double().cpu(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("kernel", ["sdpa", "triton"])
def test_gradients_through_the_operator(kernel: str) -> None:
    case = BY_NAME["causal-GQA"]
    q, k, v, loads = (x.requires_grad_() if isinstance(x, Tensor) else x for x in on_gpu(case, torch.float32))
    assert isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    o = torch.ops.attnopt.attention(q, k, v, loads, [], case.spec().to_json(), kernel)
    grad = torch.randn_like(o)
    got = torch.autograd.grad(o, (q, k, v), grad)
    leaves = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(case.naive(*leaves, [])[0], leaves, grad.double().cpu())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, atol=2e-5, rtol=2e-5)


def test_no_wait_for_the_device() -> None:
    """Neither the generated kernel nor the reference reads anything back, so that a CUDA graph can hold them."""
    case = BY_NAME["causal-left-padding-uniform"]
    q, k, v, loads = on_gpu(case, torch.float16)
    spec = case.spec()
    launch.attention(q, k, v, loads, [], spec)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            launch.attention(q, k, v, loads, [], spec)
            reference.attention(q, k, v, loads, [], spec)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------------------ gradients

# Of the largest element of a gradient: weights and their gradients are rounded before the products.
GRADIENTS = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def gradients(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], float]:
    """Of q, k, v and the float loads, from the kernels; and from the formula in float64 (in float32 where that means another thing).

    Last, how far rounding o to ``dtype`` alone moves sum(grad * o) of a row in that formula. A load is given the row's weights times it, so where
    one element of a table gathers all the keys of a row, and its gradient all but cancels, that is what is left.
    """
    q, k, v, loads = case.tensors(dtype)
    spec, sizes = case.spec(), list(case.sizes.values())
    needs = [True] * 3 + [x.is_floating_point() for x in loads]
    exact = torch.float64 if case.float64 else torch.float32
    grad = torch.randn(*q.shape[:3], v.shape[3], generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = [x.to(exact) if x.is_floating_point() else x for x in (q, k, v, *loads)]
    want = reference.gradients(grad.to(exact), wide[0], wide[1], wide[2], wide[3:], sizes, spec, 0, needs)
    true_o = reference.attention(wide[0], wide[1], wide[2], wide[3:], sizes, spec)[0].nan_to_num(0.0)
    moved = (grad.to(exact) * (true_o.to(dtype).to(exact) - true_o)).sum(-1).abs().max()
    q, k, v, *loads = (x.cuda() for x in (q, k, v, *loads))
    o, lse = launch.attention(q, k, v, loads, sizes, spec)
    return launch_backward.gradients(grad.cuda(), q, k, v, o, lse, loads, sizes, spec, 0, needs), want, float(moved)


def check_gradients(case: Case, dtype: torch.dtype) -> None:
    got, want, moved = gradients(case, dtype)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        most = float(b.nan_to_num(0.0).abs().max())
        atol = GRADIENTS[dtype] * max(most, 0.1) + (moved if i >= 3 else 0.0)
        torch.testing.assert_close(a.to(b.dtype).cpu(), b, atol=atol, rtol=GRADIENTS[dtype], equal_nan=True)


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gradients_of_case(case: Case, dtype: torch.dtype) -> None:
    check_gradients(case, dtype)


@DTYPES
@pytest.mark.parametrize("D", HEADS)
@pytest.mark.parametrize(
    "name", ["full", "causal-GQA", "window-both-sides", "alibi-causal", "softcap-causal", "causal-left-padding-uniform", "dense-bias", "relative-buckets"]
)
def test_gradients_of_head_sizes(name: str, D: int, dtype: torch.dtype) -> None:
    groups = 1 if name == "relative-buckets" else 2
    check_gradients(of_shape(BY_NAME[name], (2, 4, 4 // groups, 333, 333, D, D)), dtype)


@pytest.mark.parametrize(("D", "Dv"), [(64, 128), (128, 64), (192, 128), (40, 72)])
def test_gradients_of_unequal_head_sizes(D: int, Dv: int) -> None:
    check_gradients(of_shape(BY_NAME["causal-GQA"], (1, 4, 2, 200, 200, D, Dv)), torch.bfloat16)


@pytest.mark.parametrize(("Sq", "Skv"), [(1, 1000), (17, 513), (513, 17), (128, 128), (129, 1023)])
@pytest.mark.parametrize("name", ["full", "causal-GQA", "reverse-causal", "relative-buckets", "sinks-causal-GQA"])
def test_gradients_of_lengths(name: str, Sq: int, Skv: int) -> None:
    check_gradients(of_shape(BY_NAME[name], (1, 4, 4, Sq, Skv, 64, 64)), torch.float16)


@pytest.mark.parametrize("name", ["causal-GQA", "dense-bias", "relative-buckets", "alibi-causal"])
def test_gradients_are_the_same_from_run_to_run(name: str) -> None:
    case = of_shape(BY_NAME[name], (2, 4, 4, 500, 500, 64, 64))
    first, *_ = gradients(case, torch.bfloat16)
    again, *_ = gradients(case, torch.bfloat16)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", list(dropout_checks.CHECKS))
def test_dropout(name: str) -> None:
    dropout_checks.CHECKS[name]("cuda")


@pytest.mark.parametrize("layout", ["BSHD", "transposed", "expanded gradient"])
def test_gradients_of_any_strides(layout: str) -> None:
    case = of_shape(BY_NAME["causal-GQA"], (2, 4, 2, 150, 150, 64, 64))
    q, k, v, _ = on_gpu(case, torch.float16)
    spec = case.spec()
    o, lse = launch.attention(q, k, v, [], [], spec)
    grad = torch.ones((), device="cuda", dtype=torch.float16).expand(o.shape) if layout == "expanded gradient" else torch.randn_like(o)
    want = launch_backward.gradients(grad.contiguous(), q, k, v, o, lse, [], [], spec, 0, [True] * 3)
    axes = (2, 3) if layout == "transposed" else (1, 2)
    q, k, v = (x.transpose(*axes).contiguous().transpose(*axes) for x in (q, k, v))
    got = launch_backward.gradients(grad, q, k, v, o, lse, [], [], spec, 0, [True] * 3)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_the_backward_does_not_wait_for_the_device() -> None:
    case = BY_NAME["causal-left-padding-uniform"]
    q, k, v, loads = on_gpu(case, torch.float16)
    spec = case.spec()
    o, lse = launch.attention(q, k, v, loads, [], spec)
    run = lambda: launch_backward.gradients(torch.ones_like(o), q, k, v, o, lse, loads, [], spec, 0, [True] * 3 + [False] * len(loads))  # noqa: E731
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
