"""The operators of attention over caches of a fixed length: ``attnopt::cache_update`` writes to one, ``attnopt::static_attention`` reads it.

Importing this module registers them. Both are functions: a cache is an operand and a result, as runtimes keep it that own the caches outside of the model. On a
GPU they wait for the device; they are what a file is translated from and compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.errors import AttnoptError
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import paged_reference

_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define("cache_update(Tensor cache, Tensor update, Tensor write_indices) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define("static_attention(Tensor q, Tensor k, Tensor v, Tensor write_indices, Tensor[] loads, str spec) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _cache_update(cache: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    """``cache`` [B, H, M, D] with ``update`` [B, H, S, D] at the slots from ``write_indices`` int64 [B] on. Raises AttnoptError where they are not slots of the cache."""
    M, S = cache.shape[2], update.shape[2]
    if write_indices.numel() and (int(write_indices.min()) < 0 or int(write_indices.max()) + S > M):
        raise AttnoptError(f"A cache of {M} slots does not hold {S} tokens from {write_indices.tolist()} on.")
    at = write_indices[:, None] + torch.arange(S, device=cache.device)
    return cache.scatter(2, at[:, None, :, None].expand(update.shape), update)


def _static_attention(q: Tensor, k: Tensor, v: Tensor, write_indices: Tensor, loads: Sequence[Tensor], spec: str) -> Tensor:
    """q [B, Hq, S, D]; caches k [B, Hkv, M, D] and v [B, Hkv, M, Dv]; write_indices int64 [B]; loads and spec as in ``attnopt::attention`` -> o [B, Hq, S, Dv].

    The spec holds at absolute positions, as in ``attnopt::paged_attention``: query i of row b is at ``write_indices[b] + i`` and key j at j, and of the
    keys those count that were written before, ``write_indices[b] + S`` of them.
    """
    B, Hq, S, D = q.shape
    requests = torch.arange(B + 1, dtype=torch.int32, device=q.device)
    packed = q.transpose(1, 2).reshape(B * S, Hq, D)
    lengths = (write_indices + S).to(torch.int32)
    caches = k.transpose(1, 2), v.transpose(1, 2)
    o = paged_reference.attention(packed, *caches, requests[:B, None], requests * S, lengths, loads, (), AttentionSpec.from_json(spec))
    return o.view(B, S, Hq, v.shape[3]).transpose(1, 2).contiguous()


_LIBRARY.impl("cache_update", _cache_update, "CompositeExplicitAutograd")
_LIBRARY.impl("static_attention", _static_attention, "CompositeExplicitAutograd")


# ------------------------------------------------------------------------------------------------ shapes only


def _fake_update(cache: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    torch._check(cache.shape[0] == update.shape[0] == write_indices.shape[0], lambda: "cache, update and write_indices must have one batch size")
    return torch.empty_like(cache)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, write_indices: Tensor, loads: Sequence[Tensor], spec: str) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


torch.library.register_fake("attnopt::cache_update", _fake_update, lib=_LIBRARY)
torch.library.register_fake("attnopt::static_attention", _fake_attention, lib=_LIBRARY)
