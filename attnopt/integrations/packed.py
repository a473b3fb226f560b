"""Attention over packed requests whose keys lie behind one another, causal to the bottom right of each."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor

from attnopt.kernels import varlen
from attnopt.kernels.varlen import Packing, pack

_MOST = 8


@dataclass(frozen=True)
class _Made:
    """A packing, and the tensors that it was made of, as they were."""

    cu_seqlens_q: weakref.ref[Tensor]
    cu_seqlens_k: weakref.ref[Tensor]
    stamps: tuple[int | None, int | None]
    packing: Packing


_last: dict[tuple[int | None, int, int], _Made] = {}
"""By window and numbers of queries and keys, the packing that was made last: all layers of a step share it."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [T, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv] -> o [T, Hq, Dv]. ``window``: keys that a query sees, its own included."""
    packing = _packing(cu_seqlens_q, cu_seqlens_k, len(q), len(k), window)
    return varlen.attention(q, k, v, packing, scale=scale, softcap=softcap, sinks=sinks)


def _packing(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, queries: int, keys: int, window: int | None) -> Packing:
    place = (window, queries, keys)
    stamps = _stamp(cu_seqlens_q), _stamp(cu_seqlens_k)
    found = _last.get(place)
    if found is not None and None not in stamps and found.stamps == stamps and found.cu_seqlens_q() is cu_seqlens_q and found.cu_seqlens_k() is cu_seqlens_k:
        return found.packing
    made = pack(cu_seqlens_q, cu_seqlens_k, queries=queries, keys=keys, causal=True, window=(None if window is None else window - 1, None))
    if len(_last) >= _MOST:
        _last.clear()
    _last[place] = _Made(weakref.ref(cu_seqlens_q), weakref.ref(cu_seqlens_k), stamps, made)
    return made


def _stamp(x: Tensor) -> int | None:
    """How often a tensor was written to; None where nobody counts, so that it may be another one by now."""
    return None if x.is_inference() else x._version
