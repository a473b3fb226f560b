"""The attentions that ``kernels.py`` times: what each computes as a spec and in float64, and how the peers are asked for it.

A variant changes the scaled scores or hides keys; ``causal`` comes on top and belongs to the cell. In all functions below
``i`` [n, 1] and ``j`` [1, S] are query and key indices, ``s`` are scaled scores, and ``L`` are the tensors that the variant reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Dims

WINDOW = 1024
"""Keys that a query sees, its own included."""
SOFTCAP = 50.0
BUCKETS, FURTHEST = 32, 128
"""T5's defaults (Raffel et al., arXiv:1910.10683)."""


@dataclass(frozen=True)
class FlashWay:
    """How the flash-attn packages are asked: their arguments, beside scale and causal."""

    window: int | None = None
    softcap: float = 0.0
    slopes: Tensor | None = None
    """ALiBi, float32 [Hq]."""
    score_mod: str | None = None
    """A function of ``cute_mods.py``, for flash-attn-4, which reads ``tensors``."""
    tensors: tuple[Tensor, ...] = ()
    lengths: Tensor | None = None
    """Keys and queries in use, int32 [B]."""
    cu_seqlens: Tensor | None = None
    """Documents of the one batch, int32 [n + 1]."""


@dataclass(frozen=True)
class Variant:
    name: str
    loads: Callable[[int, int, int, torch.device, torch.dtype], list[Tensor]] = lambda B, H, S, device, dtype: []
    """From B, Hq, S, device and dtype."""
    kinds: tuple[E.Kind, ...] = ()
    score: Callable[[Dims, Expr], Expr] = lambda d, s: s
    mask: Callable[[Dims], Expr] = lambda d: E.TRUE
    score64: Callable[[Tensor, int, int, Tensor, Tensor, list[Tensor]], Tensor] = lambda s, b, h, i, j, L: s
    """From s [n, S], batch and head."""
    visible: Callable[[int, Tensor, Tensor, list[Tensor]], Tensor | bool] = lambda b, i, j, L: True
    used_rows: Callable[[int, list[Tensor]], int | None] = lambda b, L: None
    """How many rows of batch b are no padding; None for all. The others are not compared."""
    sdpa_bias: Callable[[Tensor, Tensor, list[Tensor], torch.dtype], Tensor] | None = None
    """What SDPA needs as a dense mask: bool or additive, [B or 1, H or 1, n, S]."""
    sdpa_cannot: str | None = None
    flex_score: Callable[[list[Tensor], int], Callable[..., Tensor]] | None = None
    """From L and S, the score_mod of FlexAttention."""
    flex_mask: Callable[[list[Tensor]], Callable[..., Tensor]] | None = None
    flash: Callable[[list[Tensor], int], FlashWay] = field(default=lambda L, S: FlashWay())
    """From L and S."""


def slopes(B: int, H: int, S: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The published ALiBi slopes for a power of two of heads."""
    return [2.0 ** (-8.0 / H * torch.arange(1, H + 1, device=device, dtype=torch.float32))]


# ------------------------------------------------------------------------------------------------ T5


def bucket(distance: Expr) -> Expr:
    """T5's bidirectional bucket of k - q."""
    exact = BUCKETS // 4
    n = E.absolute(distance)
    factor = exact / math.log(FURTHEST / exact)
    far = E.add(E.const(exact), E.as_int(E.mul(E.const(factor), E.function("log", E.div(n, E.const(float(exact)))))))
    near = E.where(E.lt(n, E.const(exact)), n, E.minimum(far, E.const(2 * exact - 1)))
    return E.add(E.where(E.gt(distance, E.ZERO), E.const(2 * exact), E.ZERO), near)


def buckets(distance: Tensor) -> Tensor:
    """The same for a tensor, with the logarithm in float32 as T5 computes it."""
    exact = BUCKETS // 4
    n = distance.abs()
    far = exact + (torch.log(n.float() / exact) * (exact / math.log(FURTHEST / exact))).clamp(min=-100).to(torch.int64)
    near = torch.where(n < exact, n, far.clamp(max=2 * exact - 1))
    return torch.where(distance > 0, 2 * exact, 0) + near


def by_distance(table: Tensor, S: int) -> Tensor:
    """The table [buckets, H] laid out by k - q + S - 1, as float32 [H, 2 * S - 1]: how a person helps a kernel that cannot have logarithms."""
    distance = torch.arange(-(S - 1), S, device=table.device)
    return table[buckets(distance)].T.float().contiguous()


# ------------------------------------------------------------------------------------------------ for FlexAttention

FlexMod = Callable[..., Tensor]
"""(score, b, h, q, k) -> score, or (b, h, q, k) -> bool. Tensors stand in its closure, where FlexAttention looks for them."""


def _flex_alibi(slope: Tensor) -> FlexMod:
    return lambda score, b, h, q, k: score + slope[h] * (k - q)


def _flex_by_distance(table: Tensor, S: int) -> FlexMod:
    return lambda score, b, h, q, k: score + table[h, k - q + S - 1]


def _flex_dense(bias: Tensor) -> FlexMod:
    return lambda score, b, h, q, k: score + bias[0, h, q, k]


def _flex_padding(keep: Tensor) -> FlexMod:
    return lambda b, h, q, k: keep[b, k]


def _flex_documents(ids: Tensor) -> FlexMod:
    return lambda b, h, q, k: ids[b, q] == ids[b, k]


# ------------------------------------------------------------------------------------------------ padding and documents


def lengths(B: int, H: int, S: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Right padding: which keys are none [B, S], with uneven lengths from an eighth of S to all of it."""
    g = torch.Generator().manual_seed(1)
    n = torch.randint(S // 8, S + 1, (B,), generator=g)
    n[0] = S
    return [(torch.arange(S) < n[:, None]).to(device)]


def documents(B: int, H: int, S: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Document ids [B, S]: uneven documents, from one of half the length down to many short ones."""
    sizes, left = [], S
    for part in (2, 8, 8, 8, 16, 16, 32, 32, 32, 64, 64, 64):
        sizes.append(max(1, S // part - len(sizes)))
        left -= sizes[-1]
    if left > 0:
        sizes.append(left)
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[:S]
    return [ids.to(device).expand(B, S).contiguous()]


def cumulative(ids: Tensor) -> Tensor:
    """cu_seqlens int32 [n + 1] of document ids [S]."""
    counts = torch.unique_consecutive(ids, return_counts=True)[1]
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)


def _document_mask(d: Dims) -> Expr:
    return E.eq(E.load(0, (d.b, d.q), "int"), E.load(0, (d.b, d.k), "int"))


# ------------------------------------------------------------------------------------------------ the list

PLAIN = Variant("plain")

VARIANTS = [
    PLAIN,
    Variant(
        f"window {WINDOW}",
        mask=lambda d: E.le(E.sub(d.q, d.k), E.const(WINDOW - 1)),
        visible=lambda b, i, j, L: i - j < WINDOW,
        sdpa_bias=lambda i, j, L, dtype: (i - j < WINDOW)[None, None],
        flex_mask=lambda L: lambda b, h, q, k: q - k < WINDOW,
        flash=lambda L, S: FlashWay(window=WINDOW),
    ),
    Variant(
        f"softcap {SOFTCAP:g}",
        score=lambda d, s: E.mul(E.const(SOFTCAP), E.function("tanh", E.mul(E.const(1 / SOFTCAP), s))),
        score64=lambda s, b, h, i, j, L: SOFTCAP * torch.tanh(s / SOFTCAP),
        sdpa_cannot="SDPA has no softcap",
        flex_score=lambda L, S: lambda score, b, h, q, k: SOFTCAP * torch.tanh(score / SOFTCAP),
        flash=lambda L, S: FlashWay(softcap=SOFTCAP),
    ),
    Variant(
        "ALiBi",
        loads=slopes,
        kinds=("float",),
        score=lambda d, s: E.add(s, E.mul(E.load(0, (d.h,), "float"), E.as_float(E.sub(d.k, d.q)))),
        score64=lambda s, b, h, i, j, L: s + L[0][h].double() * (j - i),
        sdpa_bias=lambda i, j, L, dtype: (L[0][:, None, None] * (j - i)).to(dtype)[None],
        flex_score=lambda L, S: _flex_alibi(L[0]),
        flash=lambda L, S: FlashWay(slopes=L[0], score_mod="alibi"),
    ),
    Variant(
        "T5 table",
        loads=lambda B, H, S, device, dtype: [torch.randn(BUCKETS, H, generator=torch.Generator().manual_seed(2)).to(device, dtype)],
        kinds=("float",),
        score=lambda d, s: E.add(s, E.load(0, (bucket(E.sub(d.k, d.q)), d.h), "float")),
        score64=lambda s, b, h, i, j, L: s + L[0][buckets(j - i), h].double(),
        sdpa_bias=lambda i, j, L, dtype: L[0][buckets(j - i)].permute(2, 0, 1).to(dtype)[None].contiguous(),
        flex_score=lambda L, S: _flex_by_distance(by_distance(L[0], S), S),
        flash=lambda L, S: FlashWay(score_mod="by_distance", tensors=(by_distance(L[0], S),)),
    ),
    Variant(
        "dense bias",
        loads=lambda B, H, S, device, dtype: [torch.randn(1, H, S, S, device=device, dtype=dtype)],
        kinds=("float",),
        score=lambda d, s: E.add(s, E.load(0, (E.ZERO, d.h, d.q, d.k), "float")),
        score64=lambda s, b, h, i, j, L: s + L[0][0, h, i.flatten()][:, j.flatten()].double(),
        sdpa_bias=lambda i, j, L, dtype: L[0],
        flex_score=lambda L, S: _flex_dense(L[0]),
        flash=lambda L, S: FlashWay(score_mod="dense", tensors=(L[0][0],)),
    ),
    Variant(
        "ragged padding",
        loads=lengths,
        kinds=("bool",),
        mask=lambda d: E.load(0, (d.b, d.k), "bool"),
        visible=lambda b, i, j, L: L[0][b][None],
        used_rows=lambda b, L: int(L[0][b].sum()),
        sdpa_bias=lambda i, j, L, dtype: L[0][:, None, None].expand(-1, 1, i.shape[0], -1),
        flex_mask=lambda L: _flex_padding(L[0]),
        flash=lambda L, S: FlashWay(lengths=L[0].sum(-1).to(torch.int32)),
    ),
    Variant(
        "documents",
        loads=documents,
        kinds=("int",),
        mask=_document_mask,
        visible=lambda b, i, j, L: L[0][b][i] == L[0][b][j],
        sdpa_bias=lambda i, j, L, dtype: (L[0][:, i.flatten(), None] == L[0][:, None])[:, None],
        flex_mask=lambda L: _flex_documents(L[0]),
        flash=lambda L, S: FlashWay(cu_seqlens=cumulative(L[0][0])),
    ),
]

BY_NAME = {v.name: v for v in VARIANTS}
