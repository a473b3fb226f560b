"""Attention over sequences of different lengths that lie behind one another, without padding (layout THD).

Which keys a query sees is a stretch of the packed keys, so two integers a query say it all, and the map of blocks has the
kernel visit only the blocks that these stretches touch. Both are worked out once for a batch: see ``Packing``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from attnopt.errors import AttnoptError
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec, Dims, Load, Traits, Window
from attnopt.kernels import eager, registry
from attnopt.kernels.block_map import BlockMap, block_map


@dataclass(frozen=True)
class Packing:
    """The keys [first, stop) that each packed query sees. Made by ``pack``, once for all layers of a batch."""

    first: Tensor
    """int32 [T]."""
    stop: Tensor
    """int32 [T]; a query with ``stop <= first`` sees none."""
    keys: int
    _maps: dict[tuple[int, int], BlockMap] = field(default_factory=dict, repr=False, compare=False)

    def blocks(self, BLOCK_M: int, BLOCK_N: int) -> BlockMap:
        """The map of blocks, made once for each pair of block sizes."""
        found = self._maps.get((BLOCK_M, BLOCK_N))
        if found is None:
            mask = _spec(1, 1, 1, 1, 1.0, None).mask
            found = block_map(mask, [self.first, self.stop], {}, (1, 1, len(self.first), self.keys), BLOCK_M, BLOCK_N, self.first.device)
            self._maps[BLOCK_M, BLOCK_N] = found
        return found


def pack(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, *, queries: int, keys: int | None = None, causal: bool = False, window: Window = (None, None)
) -> Packing:
    """Sequence s has the queries [cu_seqlens_q[s], cu_seqlens_q[s + 1]) of ``queries``, and the keys likewise.

    ``cu_seqlens_q`` and ``cu_seqlens_k`` are integers [n + 1], ascending from 0; without the latter, queries and keys are packed alike.
    ``causal`` and ``window`` (keys seen to the left and to the right, inclusive) are aligned to the bottom right of each sequence: its last
    query stands at its last key. Sequences may be empty, and what lies behind the last one sees nothing. Nothing waits for the device.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k, keys = cu_seqlens_q, queries if keys is None else keys
    if keys is None:
        raise AttnoptError("cu_seqlens_k was given without the number of packed keys.")
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape != cu_seqlens_k.shape or len(cu_seqlens_q) == 0:
        raise AttnoptError(
            f"cu_seqlens_q and cu_seqlens_k must both have one entry more than there are sequences; their shapes are {tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}."
        )
    place = torch.arange(queries, dtype=torch.int32, device=cu_seqlens_q.device)
    ends_q, ends_k = cu_seqlens_q[1:].to(torch.int32), cu_seqlens_k.to(torch.int32)
    # empty sequences are passed over; behind the last one stand queries of a sequence of their own without keys
    sequence = torch.searchsorted(ends_q, place, right=True)
    ends_q, ends_k = torch.cat([ends_q, ends_q.new_full((1,), queries)]), torch.cat([ends_k, ends_k[-1:]])
    first, stop = ends_k[sequence], ends_k[sequence + 1]
    left, right = window
    if causal:
        right = 0 if right is None else min(right, 0)
    aligned = place + (stop - ends_q[sequence])  # the key at which the query stands
    if left is not None:
        first = torch.maximum(first, aligned - left)
    if right is not None:
        stop = torch.minimum(stop, aligned + (right + 1))
    # a row without keys begins behind all of them, so that a block of such rows is seen to have none
    empty = stop <= first
    return Packing(first.masked_fill(empty, keys), stop.masked_fill(empty, 0), keys)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """q [T, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv] -> o [T, Hq, Dv], zero where a query sees no key.

    ``scale`` is D^-0.5 unless given; with ``softcap`` c a score s becomes c * tanh(s / c). ``sinks`` [Hq]: the logit of one
    more key, without a value, for each head. Differentiable in q, k, v and sinks.
    """
    if not q.dim() == k.dim() == v.dim() == 3 or len(k) != len(v):
        raise AttnoptError(f"q, k and v must be [T, Hq, D], [Tk, Hkv, D] and [Tk, Hkv, Dv]; they are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}.")
    if len(q) != len(packing.first) or len(k) != packing.keys:
        raise AttnoptError(f"This packing is of {len(packing.first)} queries and {packing.keys} keys; q has {len(q)} and k has {len(k)}.")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise AttnoptError(f"sinks must be [Hq], here [{q.shape[1]}]; they are {tuple(sinks.shape)}.")
    text, spec = _text(q.shape[1], k.shape[1], q.shape[2], v.shape[2], scale, softcap, sinks is not None)
    loads = [packing.first, packing.stop, *([] if sinks is None else [sinks])]
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *loads))
    kernel, sizes = _kernel(spec, q.device, q.dtype, training, backend)
    blocks = None if sizes is None else packing.blocks(*sizes)
    of_map = () if blocks is None else (blocks.counts, blocks.indices, [blocks.BLOCK_M, blocks.BLOCK_N])
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    o = eager.attention(q, k, v, loads, [], text, kernel, *of_map)
    return o.squeeze(0).transpose(0, 1)


@lru_cache(maxsize=256)
def _spec(Hq: int, Hkv: int, D: int, Dv: int, scale: float, softcap: float | None, sinks: bool = False) -> AttentionSpec:
    c = E.const
    d = Dims(c(1), c(Hq), c(Hkv), E.sym("T"), E.sym("Tk"), c(D), c(Dv))
    score = E.mul(c(scale), E.score())
    if softcap is not None:
        score = E.mul(c(softcap), E.function("tanh", E.mul(c(1.0 / softcap), score)))
    mask = E.all_of(E.ge(d.k, E.load(0, (d.q,), "int")), E.lt(d.k, E.load(1, (d.q,), "int")))
    sink = E.load(2, (d.h,), "float") if sinks else None
    loads = (Load("first", "int"), Load("stop", "int"), *([Load("sinks", "float")] if sinks else []))
    return AttentionSpec(d, score, mask, empty_rows="zero", sink=sink, loads=loads, traits=Traits(scale=scale, softcap=softcap, mask_rest=mask))


@lru_cache(maxsize=256)
def _text(Hq: int, Hkv: int, D: int, Dv: int, scale: float, softcap: float | None, sinks: bool) -> tuple[str, AttentionSpec]:
    spec = _spec(Hq, Hkv, D, Dv, scale, softcap, sinks)
    return spec.to_json(), spec


@lru_cache(maxsize=256)
def _kernel(spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool, backend: str) -> tuple[str, tuple[int, int] | None]:
    kernel, _ = registry.choose(spec, device=device, dtype=dtype, training=training, backend=backend)
    return kernel, registry.block_sizes(kernel, spec, device=device, dtype=dtype)
