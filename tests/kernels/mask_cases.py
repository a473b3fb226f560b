"""Masks that read tensors, as models have them: each with the same mask written out by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Dims
from attnopt.kernels.varlen import pack
from tests.kernels.cases import SMALL, Case, Shape, causal, documents, padding, some_padding

LONG: Shape = (2, 2, 1, 100, 100, 16, 16)


def _at(t: Tensor, i: Tensor) -> Tensor:
    """[B, S] at query or key indices, [B, 1, Sq, 1] or [B, 1, 1, Skv]."""
    return t[:, i.flatten()].view(-1, 1, *i.shape)


def lengths(shape: Shape) -> list[Tensor]:
    return [torch.randint(1, shape[4], (shape[0],))]


def positions(shape: Shape) -> list[Tensor]:
    """Positions that start again with each packed sequence."""
    cut = shape[4] // 3
    return [torch.cat([torch.arange(cut), torch.arange(shape[4] - cut)]).expand(shape[0], -1)]


def tiles(shape: Shape) -> list[Tensor]:
    """A table of blocks of 16, by head."""
    n = -(-max(shape[3], shape[4]) // 16)
    return [torch.rand(shape[1], n, n) < 0.4]


def sentences(shape: Shape) -> list[Tensor]:
    """Ids of documents, -1 on padding."""
    (ids,) = documents(shape)
    return [torch.where(torch.arange(shape[4]) < shape[4] - 9, ids, -1)]


def packed(shape: Shape) -> list[Tensor]:
    """Which keys each packed query sees: sequences of 9, 0, 30 and 50 queries, the window 20 keys to the left; the rest is unused."""
    packing = pack(torch.tensor([0, 9, 9, 39, 89]), queries=shape[3], causal=True, window=(20, None))
    return [packing.first, packing.stop]


def same_document(d: Dims) -> Expr:
    return E.eq(E.load(0, (d.b, d.q), "int"), E.load(0, (d.b, d.k), "int"))


MASK_CASES = [
    Case("padding-long", shape=LONG, mask=padding, naive_mask=lambda i, j, L: L[0][:, None, None, :], loads=some_padding, empty_rows="zero"),
    Case(
        "padding-by-lengths",
        shape=(3, 4, 2, 37, 110, 16, 16),
        mask=lambda d: E.lt(d.k, E.load(0, (d.b,), "int")),
        naive_mask=lambda i, j, L: j < L[0][:, None, None, None],
        loads=lengths,
    ),
    Case(
        "padding-of-queries-and-keys",
        shape=LONG,
        mask=lambda d: E.all_of(E.load(0, (d.b, d.q), "bool"), padding(d)),
        naive_mask=lambda i, j, L: L[0][:, None, :, None] & L[0][:, None, None, :],
        loads=some_padding,
        empty_rows="uniform",
    ),
    Case(
        "documents",
        shape=LONG,
        mask=same_document,
        naive_mask=lambda i, j, L: _at(L[0], i) == _at(L[0], j),
        loads=documents,
    ),
    Case(
        "documents-causal-padded-window",
        shape=LONG,
        mask=lambda d: E.all_of(causal(d), same_document(d), E.lt(E.sub(d.q, d.k), E.const(40)), E.ge(E.load(0, (d.b, d.k), "int"), E.ZERO)),
        naive_mask=lambda i, j, L: (j <= i) & (i - j < 40) & (_at(L[0], i) == _at(L[0], j)) & (_at(L[0], j) >= 0),
        loads=sentences,
        empty_rows="zero",
    ),
    Case(
        "packed",
        shape=(1, *LONG[1:]),
        mask=lambda d: E.all_of(E.ge(d.k, E.load(0, (d.q,), "int")), E.lt(d.k, E.load(1, (d.q,), "int"))),
        naive_mask=lambda i, j, L: (j >= L[0][:, None]) & (j < L[1][:, None]),
        loads=packed,
        empty_rows="zero",
    ),
    Case(
        "chunks-by-position",
        shape=LONG,
        mask=lambda d: E.all_of(causal(d), E.eq(*(E.floordiv(E.load(0, (d.b, x), "int"), E.const(16)) for x in (d.q, d.k)))),
        naive_mask=lambda i, j, L: (j <= i) & (_at(L[0], i) // 16 == _at(L[0], j) // 16),
        loads=positions,
    ),
    Case(
        "prefix-by-lengths",
        shape=LONG,
        mask=lambda d: E.any_of(causal(d), E.lt(d.k, E.load(0, (d.b,), "int"))),
        naive_mask=lambda i, j, L: (j <= i) | (j < L[0][:, None, None, None]),
        loads=lengths,
    ),
    Case(
        "block-table",
        shape=LONG,
        mask=lambda d: E.load(0, (d.h, E.floordiv(d.q, E.const(16)), E.floordiv(d.k, E.const(16))), "bool"),
        naive_mask=lambda i, j, L: L[0][:, i // 16, j // 16],
        loads=tiles,
        empty_rows="zero",
    ),
    Case(
        "dense-mask",
        shape=(2, 2, 1, 70, 85, 16, 16),
        mask=lambda d: E.load(0, (d.b, d.h, d.q, d.k), "bool"),
        naive_mask=lambda i, j, L: L[0],
        loads=lambda sh: [((torch.arange(sh[4]) // 20) == (torch.arange(sh[3])[:, None] // 20)).expand(sh[0], sh[1], -1, -1)],
        empty_rows="uniform",
    ),
    Case(
        "dense-mask-shifted",
        shape=(2, 2, 1, 21, 85, 16, 16),
        mask=lambda d: E.load(0, (E.add(d.q, E.sub(d.Skv, d.Sq)), d.k), "bool"),
        naive_mask=lambda i, j, L: L[0][i + 64, j],
        loads=lambda sh: [torch.ones(sh[4] + 5, sh[4], dtype=torch.bool).tril()],
    ),
    Case(
        "per-head-window",
        shape=LONG,
        mask=lambda d: E.all_of(causal(d), E.lt(E.sub(d.q, d.k), E.load(0, (d.h,), "int"))),
        naive_mask=lambda i, j, L: (j <= i) & (i - j < L[0][:, None, None]),
        loads=lambda sh: [torch.tensor([7, 64])],
    ),
    Case(
        "distance-table",
        shape=LONG,
        mask=lambda d: E.all_of(causal(d), E.load(0, (E.sub(d.q, d.k),), "bool")),
        naive_mask=lambda i, j, L: (j <= i) & L[0][(i - j).clamp(min=0)],
        loads=lambda sh: [(torch.arange(sh[4]) < 20) | (torch.arange(sh[4]) >= 70)],
    ),
    Case(
        "threshold-of-a-float",
        shape=SMALL,
        mask=lambda d: E.all_of(causal(d), E.gt(E.load(0, (d.b, d.k), "float"), E.const(0.5))),
        naive_mask=lambda i, j, L: (j <= i) & (L[0][:, None, None, :] > 0.5),
        loads=lambda sh: [some_padding(sh)[0].float()],
        empty_rows="uniform",
    ),
]

MASKS = {c.name: c for c in MASK_CASES}
