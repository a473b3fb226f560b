"""The reference of attention over a paged cache: request by request, by the reference for one sequence. It reads lengths back from the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attnopt.errors import AttnoptError
from attnopt.ir import expr as E
from attnopt.ir.mask import chunk
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import reference
from attnopt.kernels.tiling import bounds, may_be_empty


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: AttentionSpec,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """``attnopt::paged_attention`` for any spec, page size and dtype: o [T, Hq, Dv]; zero for tokens of no request and requests without keys."""
    o = q.new_zeros((*q.shape[:2], v_cache.shape[3]))
    starts, lengths = cu_seqlens_q.tolist(), seqlens_k.tolist()
    check_positions(spec, loads, lengths)
    for r, n in enumerate(lengths):
        mine = slice(starts[r], starts[r + 1])
        if mine.start < mine.stop and n:
            o[mine] = one_request(reference.attention_at, q[mine], k_cache, v_cache, block_table[r], len(lengths), n, loads, sizes, spec, r, k_scale, v_scale)
    return o


def check_positions(spec: AttentionSpec, loads: Sequence[Tensor], lengths: Sequence[int]) -> None:
    """Raises where a request has more keys than a tensor that is read by position has positions."""
    longest = max(lengths, default=0)
    for slot, axis in axes_by(spec, "qk"):
        if loads[slot].shape[axis] < longest:
            name, shape = spec.loads[slot].name, tuple(loads[slot].shape)
            raise AttnoptError(f"A request has {longest} keys, and {name} {shape}, which is read by position, has {shape[axis]} positions.")


def one_request(
    through: Callable[..., Tensor],
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pages: Tensor,
    requests: int,
    length: int,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: AttentionSpec,
    row: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """o [m, Hq, Dv] of the last m queries q [m, Hq, D] of request ``row`` of ``requests``, by ``through`` (``reference.attention_at`` and its like)."""
    first = length - q.shape[0]
    values = request_sizes(spec, sizes, q, k_cache, v_cache, requests, length)
    seen = first_key(spec, values, first, length)
    k, v = (gathered(x, scale, pages, seen, length, q.dtype) for x, scale in ((k_cache, k_scale), (v_cache, v_scale)))
    o = through(q.transpose(0, 1).unsqueeze(0).to(k.dtype), k, v, loads, values, spec, row, first)
    return o[0].transpose(0, 1).to(q.dtype)


def first_key(spec: AttentionSpec, sizes: Mapping[str, int], first: int, length: int) -> int:
    """The first key that counts for the queries from ``first`` on of a request of ``length`` keys: those before it may not be there any more."""
    if may_be_empty(spec) and spec.empty_rows in ("uniform", "program"):
        return 0
    return max(bounds(spec, sizes).keys(first, length, length)[0], chunk_start(spec, first))


cached_chunk = lru_cache(maxsize=1024)(chunk)


def chunk_start(spec: AttentionSpec, first: int) -> int:
    """The first key that the query at ``first`` and those after it can see, as far as chunks say."""
    n = cached_chunk(spec.mask)
    return 0 if n is None else max(first, 0) // n * n


@lru_cache(maxsize=1024)
def axes_by(spec: AttentionSpec, variables: str) -> tuple[tuple[int, int], ...]:
    """(load, axis) where the index is one of these variables itself."""
    nodes = (e for e in E.postorder(*spec.programs) if e.op == "load")
    return tuple(sorted({(e.value, axis) for e in nodes for axis, a in enumerate(e.args) if a.op == "var" and a.value in variables}))


def request_sizes(
    spec: AttentionSpec, sizes: Sequence[int], q: Tensor, k_cache: Tensor, v_cache: Tensor, requests: int, length: int
) -> dict[str, int]:
    """Every symbolic size by name for one request: its sequence, of queries and of keys, is ``length`` long."""
    d = spec.dims
    found = dict(zip(spec.sizes, sizes, strict=True))
    shape = (requests, q.shape[1], k_cache.shape[2], length, length, q.shape[2], v_cache.shape[3])
    return found | {x.value[0]: n for x, n in zip(d.all, shape, strict=True) if x.op == "sym"}


def gathered(cache: Tensor, scale: Tensor | None, pages: Tensor, first: int, n: int, dtype: torch.dtype) -> Tensor:
    """The slots [first, n) of a request, [1, Hkv, n, D], zero before ``first``. Pages before that one may be anything, and are not looked at."""
    page_size = cache.shape[1]
    place = torch.arange(first, n, device=cache.device)
    at = pages[place // page_size].long(), place % page_size
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = cache[at].to(wide)
    if scale is not None:
        x = x * scale[at].to(wide).unsqueeze(-1)
    return torch.nn.functional.pad(x, (0, 0, 0, 0, first, 0)).transpose(0, 1).unsqueeze(0)


# ------------------------------------------------------------------------------------------------ writing

GREATEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The greatest number of each dtype of a quantized cache."""


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [T, Hkv, D] in ``dtype``, and the float32 scale [T, Hkv] of each token and head: its greatest magnitude becomes the dtype's."""
    x = x.float()
    scale = x.abs().amax(-1) / GREATEST[dtype]
    small = x / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
    return (small.round() if dtype == torch.int8 else small).to(dtype), scale


def cache_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """``attnopt::cache_write``: tokens with a negative slot are left out; on a GPU this waits for the device to count them."""
    page_size = k_cache.shape[1]
    if slots.numel() and int(slots.min()) < 0:
        kept = slots >= 0
        k, v, slots = k[kept], v[kept], slots[kept]
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if x.shape[2] == 0:  # values that are features of the keys
            continue
        if scale is None and cache.stride(0) == page_size * cache.stride(1):  # slots are one axis, and one call writes along it
            cache.flatten(0, 1).index_copy_(0, slots, x.to(cache.dtype))
            continue
        at = slots // page_size, slots % page_size
        if scale is None:
            cache[at] = x.to(cache.dtype)
        else:
            cache[at], scale[at] = quantized(x, cache.dtype)
