"""The operators of attention over a cache: ``attnopt::paged_attention`` reads one, ``attnopt::cache_write`` writes to it.

Importing this module registers them. A cache is pages of ``page_size`` slots; ``block_table`` says which pages hold the keys of a request, in
order. The tokens of all requests of a call lie behind one another (THD), so that requests that read their prompt and requests that generate
mix in one call. See docs/decisions/0014.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnopt.config import disabled_backends
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import paged_batched, paged_reference
from attnopt.kernels.kept import Kept
from attnopt.kernels.paged_checks import check_attention, check_write, description
from attnopt.kernels.paged_choice import CacheSetting, choose, writer

_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor cu_seqlens_q, Tensor seqlens_k, Tensor[] loads, "
    'SymInt[] sizes, str spec, str backend="auto", Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor',
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "cache_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def run(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    backend: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """q [T, Hq, D]; k_cache [pages, page_size, Hkv, D]; v_cache [pages, page_size, Hkv, Dv]; block_table int32 [R, max_pages]; cu_seqlens_q
    int32 [R + 1], from 0; seqlens_k int32 [R]; loads, sizes and spec as in ``attnopt::attention`` -> o [T, Hq, Dv].

    ``seqlens_k[r]`` keys of request r count, those of this call among them: they have been written before. Its queries stand at its last
    keys: query i of m has the position ``seqlens_k[r] - m + i``, and key j has the position j. In the spec's programs b is the request, q
    and k are these positions, and the sizes Sq and Skv are both ``seqlens_k[r]``. Tokens from ``cu_seqlens_q[R]`` on belong to no request:
    they, and requests without keys, get zeros. Whatever lies in other slots is never read, and unused entries of ``block_table`` may be anything.
    ``k_scale`` and ``v_scale``, float32 [pages, page_size, Hkv], come with caches of int8 or float8_e4m3fn: a number is cache * scale.
    """
    if torch.is_grad_enabled():
        with torch.no_grad():
            return run(q, k_cache, v_cache, block_table, cu_seqlens_q, seqlens_k, loads, sizes, spec, backend, k_scale, v_scale)
    key = (spec, backend, disabled_backends(), *description(sizes, q, k_cache, v_cache, block_table, cu_seqlens_q, seqlens_k, k_scale, v_scale, *loads))
    known = _KNOWN.get(key)
    if known is None:
        known = _looked_at(q, k_cache, v_cache, block_table, cu_seqlens_q, seqlens_k, loads, sizes, spec, backend, k_scale, v_scale)
        _KNOWN[key] = known
    if known.launch is not None:
        return known.launch(q, k_cache, v_cache, block_table, cu_seqlens_q, seqlens_k, loads, sizes, known.spec, k_scale, v_scale, plans=known.plans)
    if known.kernel == "batched":
        return paged_batched.attention(q, k_cache, v_cache, block_table, cu_seqlens_q, seqlens_k, loads, sizes, known.spec, k_scale, v_scale, known.memo)
    return paged_reference.attention(q, k_cache, v_cache, block_table, cu_seqlens_q, seqlens_k, loads, sizes, known.spec, k_scale, v_scale)


@dataclass
class _Known:
    """A call that was looked at. A generated token is one call a layer, and looking takes longer than launching."""

    spec: AttentionSpec
    kernel: str
    launch: Callable[..., Tensor] | None
    """``launch_paged.attention`` where the kernels are generated."""
    memo: paged_batched.Memo = field(default_factory=paged_batched.Memo)
    """What ``batched`` keeps for the step's next layer."""
    plans: dict[Any, Any] = field(default_factory=dict)
    """What ``launch`` keeps for further calls."""


_KNOWN: Kept[object, _Known] = Kept(4096)
"""By their descriptions."""


def _looked_at(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    backend: str,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> _Known:
    parsed = AttentionSpec.from_json(spec)
    check_attention(q, k_cache, v_cache, block_table, cu_seqlens_q, seqlens_k, loads, sizes, parsed, k_scale, v_scale)
    setting = CacheSetting(
        device=q.device.type,
        dtype=q.dtype,
        page_size=k_cache.shape[1],
        D=q.shape[-1],
        Dv=v_cache.shape[-1],
        contiguous=block_table.shape[-1] == 1,
        cache_dtype=None if k_scale is None else k_cache.dtype,
    )
    kernel = choose(parsed, setting, backend)[0]
    launch = importlib.import_module("attnopt.kernels.triton.launch_paged").attention if kernel == "triton" else None
    return _Known(parsed, kernel, launch)


def _cache_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> None:
    """Writes k [T, Hkv, D] and v [T, Hkv, Dv] to the slots int64 [T] of the caches; ``slot = page * page_size + offset``, a negative one: not written.

    Two tokens never have the same slot, and slots lie within the caches. Where the caches have scales, numbers are quantized, each token and head by its greatest magnitude.
    """
    with torch.no_grad():
        check_write(k, v, k_cache, v_cache, slots, k_scale, v_scale)
        if writer(k, k_cache) == "triton":
            from attnopt.kernels.triton import cache_write

            cache_write.write(k, v, k_cache, v_cache, slots, k_scale, v_scale)
        else:
            paged_reference.cache_write(k, v, k_cache, v_cache, slots, k_scale, v_scale)


_LIBRARY.impl("paged_attention", run, "CompositeExplicitAutograd")
_LIBRARY.impl("cache_write", _cache_write, "CompositeExplicitAutograd")


# ------------------------------------------------------------------------------------------------ shapes only


def _fake_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    backend: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    torch._check(q.dim() == 3 and v_cache.dim() == 4, lambda: "q must have 3 axes [T, Hq, D], and v_cache 4 axes [pages, page_size, Hkv, Dv]")
    return q.new_empty((*q.shape[:2], v_cache.shape[3]))


def _fake_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> None:
    torch._check(k.dim() == 3 and k_cache.dim() == 4, lambda: "k must have 3 axes [T, Hkv, D], and k_cache 4 axes [pages, page_size, Hkv, D]")


torch.library.register_fake("attnopt::paged_attention", _fake_attention, lib=_LIBRARY)
torch.library.register_fake("attnopt::cache_write", _fake_write, lib=_LIBRARY)
