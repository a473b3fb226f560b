"""Calls of a generated kernel with a table over distances that was made before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnopt.kernels.distance_table_op import table_alone
from attnopt.kernels.programs import programs_of
from tests.kernels.cases import BY_NAME

CASE = BY_NAME["relative-buckets"]


def table(weight: Tensor, margin: int) -> Tensor:
    """That of ``CASE``, as a graph makes it."""
    B, Hq, _, Sq, Skv, _, _ = CASE.shape
    spec = table_alone(CASE.spec(), programs_of(CASE.spec()).parts[0], {0: 0})
    assert spec is not None
    return torch.ops.attnopt.distance_table(weight, [weight], [], B, Hq, Sq, Skv, spec.to_json(), margin)  # type: ignore[no-any-return]


def forward() -> None:
    """The same numbers as without it; and with another table others, so it is what the kernel reads."""
    from attnopt.kernels.triton import launch

    q, k, v, loads = CASE.tensors(torch.float32)
    given = table(loads[0], 0)
    want = launch.attention(q, k, v, loads, [], CASE.spec())
    for x, y in zip(launch.attention(q, k, v, loads, [], CASE.spec(), tables=[given]), want, strict=True):
        assert torch.equal(x, y)
    # of a kernel that reads whole tiles: this one leaves the margin alone
    wide = table(loads[0], 16)
    wide[:, :16] = wide[:, -16:] = torch.nan
    assert torch.equal(launch.attention(q, k, v, loads, [], CASE.spec(), tables=[wide])[0], want[0])
    assert not torch.allclose(launch.attention(q, k, v, loads, [], CASE.spec(), tables=[given.flip(1)])[0], want[0], atol=1e-3)


def graph() -> None:
    """By way of the operator, with gradients, against the formula."""
    q, k, v, loads = CASE.tensors(torch.float32)
    leaves = [q, k, v, loads[0]]
    for x in leaves:
        x.requires_grad_()
    o = torch.ops.attnopt.attention(q, k, v, loads, [], CASE.spec().to_json(), "triton/triton", tables=[table(loads[0], 0)])
    want, _ = CASE.naive(q, k, v, loads)
    torch.testing.assert_close(o.double(), want, atol=5e-6, rtol=5e-6)
    grad = torch.randn(o.shape, generator=torch.Generator().manual_seed(0))
    for a, b in zip(torch.autograd.grad(o, leaves, grad), torch.autograd.grad(want, leaves, grad.double()), strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5, check_dtype=False)


CHECKS: dict[str, Callable[..., None]] = {"table-forward": forward, "table-graph": graph}
