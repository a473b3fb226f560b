"""What must hold of dropout in the generated kernels, on any device: they run under the interpreter and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import ops
from attnopt.kernels.triton import launch, launch_backward
from attnopt.kernels.triton.launch_backward import BackwardConfig, Blocks
from tests.kernels.cases import BY_NAME, Case, Shape, causal, naive_causal

assert ops.__doc__  # the operator is registered
SEED = (1 << 61) + 12345
RATE = 0.3
SHAPE: Shape = (2, 4, 2, 37, 45, 16, 16)


def dropping(case: Case) -> AttentionSpec:
    return case.spec().replace(dropout=RATE)


def pattern(case: Case, seed: int, device: str) -> Tensor:
    """Which weights [B, Hq, Sq, Skv] the forward keeps: with the unit matrix for values it gives the weights themselves."""
    B, Hq, Hkv, Sq, Skv, D, _ = case.shape
    square = Case(**{**vars(case), "shape": (B, Hq, Hkv, Sq, Skv, D, Skv)})
    q, k, _, loads = square.tensors(torch.float32)
    q, k, loads = q.to(device), k.to(device), [x.to(device) for x in loads]
    unit = torch.eye(Skv, device=device).expand(B, Hkv, -1, -1)
    dropped, lse = launch.attention(q, k, unit, loads, [], dropping(square), seed)
    weights, plain_lse = launch.attention(q, k, unit, loads, [], square.spec())
    assert torch.equal(lse, plain_lse), "the sum of weights is that of all weights, dropped or not"
    keep = dropped != 0
    torch.testing.assert_close(dropped, torch.where(keep, weights / (1 - RATE), 0.0), atol=1e-6, rtol=1e-5)
    return keep | (weights == 0)


def rate(device: str = "cpu") -> None:
    """The rate is right, in each head, and other seeds, heads, rows and batches drop other weights."""
    case = Case("full", shape=SHAPE)
    keep = pattern(case, SEED, device)
    n = keep.numel()
    assert abs(float((~keep).double().mean()) - RATE) < 4 * math.sqrt(RATE * (1 - RATE) / n)
    flat = keep.flatten(0, 1).flatten(1)
    assert flat.unique(dim=0).shape[0] == flat.shape[0]
    assert bool(((~flat).double().mean(1) - RATE).abs().max() < 4.5 * math.sqrt(RATE * (1 - RATE) / flat.shape[1]))
    for other in (SEED + 1, SEED + (1 << 31), 0):
        agree = float((pattern(case, other, device) == keep).double().mean())
        assert abs(agree - (RATE**2 + (1 - RATE) ** 2)) < 5 * math.sqrt(0.25 / n)


def replay(device: str = "cpu") -> None:
    """The backward drops what the forward dropped, whatever its block sizes: its gradients are those of the formula with that pattern."""
    case = Case("causal", shape=SHAPE, mask=causal, naive_mask=naive_causal)
    keep = pattern(case, SEED, device).double().cpu()
    q, k, v, _ = case.tensors(torch.float32)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    k2, v2 = (x.repeat_interleave(2, 1) for x in leaves[1:])
    score = (0.25 * leaves[0] @ k2.transpose(-1, -2)).masked_fill(~torch.ones(37, 45, dtype=torch.bool).tril(), -torch.inf)
    want_o = (torch.softmax(score, -1) * keep / (1 - RATE)) @ v2
    q, k, v = q.to(device), k.to(device), v.to(device)
    o, lse = launch.attention(q, k, v, [], [], dropping(case), SEED)
    torch.testing.assert_close(o.double().cpu(), want_o, atol=2e-5, rtol=2e-5)
    grad = torch.randn(want_o.shape, generator=torch.Generator().manual_seed(0))
    want = torch.autograd.grad(want_o, leaves, grad.double())
    for choice in (None, BackwardConfig(Blocks(16, 16, 4, 1), Blocks(16, 64, 4, 1), Blocks(64, 32, 4, 1), Blocks(16, 16, 4, 1))):
        got = launch_backward.gradients(grad.to(device), q, k, v, o, lse, [], [], dropping(case), SEED, [True] * 3, choice)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double().cpu(), b, atol=5e-5, rtol=5e-5)


def checkpointing(device: str = "cpu") -> None:
    """The seed comes from the default CPU generator, which activation checkpointing puts back."""
    case = BY_NAME["causal-GQA"]
    q, k, v, _ = (x if isinstance(x, list) else x.to(device) for x in case.tensors(torch.float32))
    assert isinstance(q, Tensor)
    spec = dropping(case).to_json()
    q.requires_grad_()

    def run(x: Tensor) -> Tensor:
        return torch.ops.attnopt.attention(x, k, v, [], [], spec, "triton")  # type: ignore[no-any-return]

    torch.manual_seed(3)
    (want,) = torch.autograd.grad(run(q).sum(), q)
    torch.manual_seed(3)
    (got,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, q, use_reentrant=False).sum(), q)
    (other,) = torch.autograd.grad(run(q).sum(), q)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(other, want)


CHECKS: dict[str, Callable[..., None]] = {"rate": rate, "replay": replay, "checkpointing": checkpointing}
