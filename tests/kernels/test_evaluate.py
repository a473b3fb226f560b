"""The interpreter of expressions: each operation by value and by gradient, and shapes no larger than they must be."""

from __future__ import annotations

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.kernels import reference
from attnopt.kernels.evaluate import Env, evaluate
from tests.kernels.cases import Case, dims
from tests.kernels.operations import OPERATION_CASES, OPERATIONS

SHAPE = (2, 3, 3, 5, 7, 4, 4)


def env(*loads: torch.Tensor, **ranges: tuple[int, int]) -> Env:
    whole = {"b": (0, 2), "h": (0, 3), "q": (0, 5), "k": (0, 7)} | ranges
    return Env(whole, loads, {"n": 3}, torch.float32, torch.device("cpu"))


def test_every_operation_has_a_case() -> None:
    assert set(OPERATIONS) == E.OPERATIONS


@pytest.mark.parametrize("case", OPERATION_CASES.values(), ids=lambda c: c.name)
def test_operation(case: Case) -> None:
    name = case.name.removeprefix("operation-")
    spec = case.spec()
    assert any(e.op == name for e in E.postorder(spec.score)), f"the score {spec.score} has no {name}"
    q, k, v, _ = case.tensors(torch.float64)
    q.requires_grad_()
    o, _ = reference.attention(q, k, v, [], [], spec)
    want, _ = case.naive(q, k, v, [])
    torch.testing.assert_close(o, want, atol=1e-12, rtol=1e-12)
    grad = torch.randn_like(o)
    (by_hand,) = torch.autograd.grad(want, q, grad)
    with torch.no_grad():
        (got,) = reference.gradients(grad, q, k, v, [], [], spec, 0, [True, False, False])
    torch.testing.assert_close(got, by_hand, atol=1e-10, rtol=1e-10)


def test_values_stay_as_small_as_they_can() -> None:
    d = dims(SHAPE)
    pad = torch.ones(2, 7, dtype=torch.bool)
    slope = torch.randn(3)
    (padding, bias, size), _ = evaluate(
        (E.load(0, (d.b, d.k), "bool"), E.mul(E.load(1, (d.h,), "float"), E.as_float(d.k)), E.mul(E.sym("n"), E.const(2))), env(pad, slope)
    )
    assert isinstance(padding, torch.Tensor) and isinstance(bias, torch.Tensor)
    assert padding.shape == (2, 1, 1, 7)
    assert padding.data_ptr() == pad.data_ptr()
    assert bias.shape == (1, 3, 1, 7)
    assert size == 6


@pytest.mark.parametrize("axes", ["bhqk", "kqhb", "hk", "kb", "q", ""])
def test_a_load_by_plain_variables_is_a_view(axes: str) -> None:
    d = dims(SHAPE)
    variables = {"b": d.b, "h": d.h, "q": d.q, "k": d.k}
    sizes = {"b": 2, "h": 3, "q": 5, "k": 7}
    x = torch.randn([sizes[a] for a in axes])
    part = {"q": (1, 4), "k": (2, 6)}
    (got,), _ = evaluate((E.load(0, [variables[a] for a in axes], "float"),), env(x, **part))
    assert isinstance(got, torch.Tensor)
    assert got.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    ranges = {"b": (0, 2), "h": (0, 3), **part}
    want = x[tuple(slice(*ranges[a]) for a in axes)]
    order = sorted(range(len(axes)), key=lambda i: "bhqk".index(axes[i]))
    torch.testing.assert_close(got.squeeze(), want.permute(order).squeeze())


@pytest.mark.parametrize("offset", [-3, 0, 2])
def test_a_load_by_a_shifted_variable_slices_where_it_fits_and_clamps_where_not(offset: int) -> None:
    d = dims(SHAPE)
    x = torch.randn(9)
    (got,), _ = evaluate((E.load(0, (E.add(d.k, E.const(offset)),), "float"),), env(x))
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got.flatten(), x[(torch.arange(7) + offset).clamp(0, 8)])


def test_the_same_variable_twice_reads_the_diagonal() -> None:
    d = dims(SHAPE)
    x = torch.randn(7, 7)
    (got,), _ = evaluate((E.load(0, (d.k, d.k), "float"),), env(x))
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got.flatten(), x.diagonal())


def test_unkept_values_are_dropped() -> None:
    d = dims(SHAPE)
    root = E.function("exp", E.mul(E.const(0.1), E.as_float(E.sub(d.k, d.q))))
    _, table = evaluate((root,), env())
    assert set(table) == {root}
    _, kept = evaluate((root,), env(), keep=True)
    assert len(kept) == len(list(E.postorder(root)))


@pytest.mark.parametrize("recording", [True, False])
def test_a_clamp_passes_on_the_whole_gradient_at_its_bound(recording: bool) -> None:
    """As torch.clamp does, where torch.maximum would share it with the bound."""
    shape = (1, 1, 1, 3, 3, 1, 4)
    case = Case("clamp", shape, score=lambda d, s: E.maximum(E.add(s, E.load(0, (d.k,), "float")), E.const(0.0)), loads=lambda sh: [torch.zeros(3)])
    v = torch.randn(1, 1, 3, 4)
    q, k, bias = torch.zeros(1, 1, 3, 1), torch.ones(1, 1, 3, 1), torch.zeros(3, requires_grad=True)
    want = torch.softmax((q @ k.mT + bias).clamp(min=0.0), -1) @ v
    grad = torch.randn_like(want)
    (expected,) = torch.autograd.grad(want, bias, grad)
    if recording:
        o, _ = reference.attention(q, k, v, [bias], [], case.spec())
        (got,) = torch.autograd.grad(o, bias, grad)
    else:
        with torch.no_grad():
            (got,) = reference.gradients(grad, q, k, v, [bias], [], case.spec(), 0, [False, False, False, True])
    torch.testing.assert_close(got, expected)
