"""What the paged operators are given, looked at before any kernel runs. Only shapes, dtypes and devices: values stay on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.errors import AttnoptError
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.paged_reference import GREATEST, axes_by

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def description(sizes: Sequence[int], *tensors: Tensor | None) -> tuple[object, ...]:
    """All that the checks of ``attnopt::paged_attention`` look at and its launch follows from, but for the spec: equal where they come out alike."""
    return tuple(sizes), *[x if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors]


def check_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: AttentionSpec,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Raises where the arguments of ``attnopt::paged_attention`` do not fit together or not the spec."""
    check_caches(k_cache, v_cache, k_scale, v_scale)
    if q.dim() != 3 or q.shape[2] != k_cache.shape[3] or k_cache.shape[2] == 0 or q.shape[1] % k_cache.shape[2]:
        raise AttnoptError(
            f"q {tuple(q.shape)} and k_cache {tuple(k_cache.shape)} do not fit together as [T, Hq, D] and [pages, page_size, Hkv, D], with Hq a multiple of Hkv."
        )
    if q.dtype not in FLOATS:
        raise AttnoptError(f"q is {_name(q.dtype)}; supported are {', '.join(map(_name, FLOATS))}.")
    if k_scale is None and k_cache.dtype != q.dtype:
        raise AttnoptError(f"q is {_name(q.dtype)} and the caches without scales are {_name(k_cache.dtype)}; they must be alike.")
    R = seqlens_k.shape[0] if seqlens_k.dim() == 1 else -1
    if R < 0 or block_table.dim() != 2 or block_table.shape[0] != R or cu_seqlens_q.shape != (R + 1,):
        raise AttnoptError(
            f"block_table {tuple(block_table.shape)}, cu_seqlens_q {tuple(cu_seqlens_q.shape)} and seqlens_k {tuple(seqlens_k.shape)} "
            "do not fit together as [R, max_pages], [R + 1] and [R]."
        )
    for name, x in (("block_table", block_table), ("cu_seqlens_q", cu_seqlens_q), ("seqlens_k", seqlens_k)):
        if x.dtype != torch.int32:
            raise AttnoptError(f"{name} is {_name(x.dtype)}; it must be int32.")
    _same_device(q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table, cu_seqlens_q=cu_seqlens_q, seqlens_k=seqlens_k)
    if len(loads) != len(spec.loads):
        raise AttnoptError(f"This attention reads {len(spec.loads)} tensors beside q, k and v, and was given {len(loads)}.")
    if len(sizes) != len(spec.sizes):
        raise AttnoptError(f"This attention reads {len(spec.sizes)} sizes {spec.sizes} and was given {len(sizes)}.")
    if spec.dropout:
        raise AttnoptError(f"This attention has dropout {spec.dropout:g}; attention over a cache has none.")
    for slot, axis in axes_by(spec, "b"):
        if loads[slot].shape[axis] != R:
            raise AttnoptError(
                f"Axis {axis} of {spec.loads[slot].name} {tuple(loads[slot].shape)} is read by request, of which there are {R}; it must have one entry for each."
            )


def check_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    """Raises where the arguments of ``attnopt::cache_write`` do not fit together."""
    check_caches(k_cache, v_cache, k_scale, v_scale)
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x.dim() != 3 or x.shape[1:] != cache.shape[2:]:
            raise AttnoptError(f"{name} {tuple(x.shape)} and {name}_cache {tuple(cache.shape)} do not fit together as [T, Hkv, D] and [pages, page_size, Hkv, D].")
        if x.dtype not in FLOATS:
            raise AttnoptError(f"{name} is {_name(x.dtype)}; supported are {', '.join(map(_name, FLOATS))}.")
        if k_scale is None and x.dtype != cache.dtype:
            raise AttnoptError(f"{name} is {_name(x.dtype)} and {name}_cache without scales is {_name(cache.dtype)}; they must be alike.")
    if slots.shape != k.shape[:1] or len(v) != len(k):
        raise AttnoptError(f"k and v are of {len(k)} and {len(v)} tokens, and slots is {tuple(slots.shape)}; each token has one slot.")
    if slots.dtype != torch.int64:
        raise AttnoptError(f"slots is {_name(slots.dtype)}; it must be int64.")
    _same_device(k=k, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots)


def check_caches(k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Raises where caches and their scales do not fit together."""
    if k_cache.dim() != 4 or v_cache.dim() != 4 or k_cache.shape[:3] != v_cache.shape[:3] or k_cache.shape[1] == 0:
        raise AttnoptError(
            f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} do not fit together as [pages, page_size, Hkv, D] and [pages, page_size, Hkv, Dv]."
        )
    if k_cache.dtype != v_cache.dtype:
        raise AttnoptError(f"k_cache is {_name(k_cache.dtype)} and v_cache is {_name(v_cache.dtype)}; they must be alike.")
    if (k_scale is None) != (v_scale is None):
        raise AttnoptError("k_scale and v_scale come together: one was given without the other.")
    if k_scale is None or v_scale is None:
        if k_cache.dtype not in FLOATS:
            raise AttnoptError(f"The caches are {_name(k_cache.dtype)} and have no scales; a cache of int8 or float8_e4m3fn needs k_scale and v_scale.")
        return
    if k_cache.dtype not in GREATEST:
        raise AttnoptError(f"The caches are {_name(k_cache.dtype)} and have scales; caches with scales are {' or '.join(map(_name, GREATEST))}.")
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if x.shape != k_cache.shape[:3] or x.dtype != torch.float32:
            raise AttnoptError(f"{name} is {_name(x.dtype)} {tuple(x.shape)}; it must be float32 [pages, page_size, Hkv], here {tuple(k_cache.shape[:3])}.")
    _same_device(k_cache=k_cache, k_scale=k_scale, v_scale=v_scale)


def _same_device(**tensors: Tensor) -> None:
    if len({x.device for x in tensors.values()}) > 1:
        raise AttnoptError(f"All tensors must be on one device; {', '.join(f'{name} is on {x.device}' for name, x in tensors.items())}.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
