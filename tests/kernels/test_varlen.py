"""Packed sequences, each against its own attention in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnopt.errors import AttnoptError
from attnopt.ir.spec import Window
from attnopt.kernels import varlen
from attnopt.kernels.block_map import block_map
from tests.kernels.by_blocks import install

HQ, HKV, D, DV = 4, 2, 16, 24
RAGGED = ([5, 0, 12, 1, 0, 9], [5, 3, 12, 4, 0, 2])
"""Lengths of queries and of keys: alike, without queries, fewer and more queries than keys, without either."""


def cumulated(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def tensors(Tq: int, Tk: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(Tq, HQ, D, dtype=dtype), torch.randn(Tk, HKV, D, dtype=dtype), torch.randn(Tk, HKV, DV, dtype=dtype)


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[list[int], list[int]], causal: bool, window: Window, scale: float, softcap: float | None
) -> Tensor:
    """The definition: sequence by sequence, the last query at the last key."""
    o = q.new_zeros(len(q), HQ, DV, dtype=torch.float64)
    at_q = at_k = 0
    for n, m in zip(*lengths, strict=True):
        a, b, c = (x.double().transpose(0, 1) for x in (q[at_q : at_q + n], k[at_k : at_k + m], v[at_k : at_k + m]))
        s = a @ b.repeat_interleave(HQ // HKV, 0).mT * scale
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        distance = torch.arange(m)[None, :] - torch.arange(n)[:, None] - (m - n)
        seen = torch.ones(n, m, dtype=torch.bool)
        seen &= distance <= 0 if causal else seen
        seen &= distance >= -window[0] if window[0] is not None else seen
        seen &= distance <= window[1] if window[1] is not None else seen
        p = torch.softmax(s.masked_fill(~seen, -torch.inf), -1).nan_to_num(0.0)
        o[at_q : at_q + n] = (p @ c.repeat_interleave(HQ // HKV, 0)).transpose(0, 1)
        at_q, at_k = at_q + n, at_k + m
    return o


@pytest.mark.parametrize("backend", ["reference", "sdpa", "by-blocks"])
@pytest.mark.parametrize(
    ("causal", "window"),
    [(False, (None, None)), (True, (None, None)), (True, (3, None)), (False, (2, 4)), (True, (4, 1))],
    ids=["full", "causal", "causal-window", "window", "causal-window-right"],
)
@pytest.mark.parametrize("lengths", [([7, 11, 3], [7, 11, 3]), RAGGED, ([0], [0]), ([6], [0])], ids=["alike", "ragged", "nothing", "no-keys"])
def test_against_single_sequences(lengths: tuple[list[int], list[int]], causal: bool, window: Window, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "by-blocks":
        install(monkeypatch)
    Tq, Tk = (sum(x) for x in lengths)
    q, k, v = tensors(Tq, Tk)
    packing = varlen.pack(cumulated(lengths[0]), cumulated(lengths[1]), queries=Tq, keys=Tk, causal=causal, window=window)
    if backend == "by-blocks" and Tk == 0:
        return  # the operator's own kernels return before they look at a map
    o = varlen.attention(q, k, v, packing, backend=backend)
    assert o.shape == (Tq, HQ, DV) and o.is_contiguous()
    torch.testing.assert_close(o.double(), one_by_one(q, k, v, lengths, causal, window, D**-0.5, None), atol=1e-5, rtol=1e-5)


def test_scale_and_softcap() -> None:
    lengths = ([7, 11], [7, 11])
    q, k, v = tensors(18, 18)
    packing = varlen.pack(cumulated(lengths[0]), queries=18, causal=True)
    o = varlen.attention(q, k, v, packing, scale=0.5, softcap=3.0)
    torch.testing.assert_close(o.double(), one_by_one(q, k, v, lengths, True, (None, None), 0.5, 3.0), atol=1e-5, rtol=1e-5)


def test_rows_behind_the_last_sequence_are_zero_and_are_not_seen() -> None:
    lengths = ([7, 11], [7, 11])
    q, k, v = tensors(21, 21)
    k[18:] = torch.nan
    o = varlen.attention(q, k, v, varlen.pack(cumulated(lengths[0]), queries=21, causal=True), backend="reference")
    assert not o[18:].any()
    torch.testing.assert_close(o[:18].double(), one_by_one(q[:18], k[:18], v[:18], lengths, True, (None, None), D**-0.5, None), atol=1e-5, rtol=1e-5)


def test_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(sum(RAGGED[0]), sum(RAGGED[1]), torch.float64))
    packing = varlen.pack(cumulated(RAGGED[0]), cumulated(RAGGED[1]), queries=len(q), keys=len(k), causal=True)
    got = torch.autograd.grad(varlen.attention(q, k, v, packing).square().sum(), (q, k, v))
    want = torch.autograd.grad(one_by_one(q, k, v, RAGGED, True, (None, None), D**-0.5, None).square().sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_one_map_serves_all_layers_and_visits_only_its_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(varlen, "block_map", lambda *a: (made.append(a), block_map(*a))[1])
    kernel = install(monkeypatch)
    q, k, v = tensors(40, 40)
    packing = varlen.pack(cumulated([8] * 5), queries=40)
    for _ in range(3):
        varlen.attention(q, k, v, packing, backend="by-blocks")
    assert len(made) == 1 and len(kernel.calls) == 3
    # blocks of 4 queries and 2 keys: each block of queries sees the 4 blocks of its sequence, whole
    counts = kernel.calls[0].counts
    assert counts.shape == (1, 1, 10, 3)
    assert (counts[..., :2] == torch.tensor([0, 4])).all()


def test_what_does_not_fit_is_named() -> None:
    q, k, v = tensors(18, 18)
    packing = varlen.pack(cumulated([7, 11]), queries=18)
    with pytest.raises(AttnoptError, match="18 queries and 18 keys; q has 17 and k has 18"):
        varlen.attention(q[:17], k, v, packing)
    with pytest.raises(AttnoptError, match=r"they are \(1, 18, 4, 16\)"):
        varlen.attention(q[None], k, v, packing)
    with pytest.raises(AttnoptError, match=r"shapes are \(3,\) and \(2,\)"):
        varlen.pack(cumulated([7, 11]), cumulated([18]), queries=18, keys=18)
    with pytest.raises(AttnoptError, match="without the number of packed keys"):
        varlen.pack(cumulated([7, 11]), cumulated([7, 11]), queries=18)
