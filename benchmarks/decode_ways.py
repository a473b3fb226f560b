"""Who computes the cells of ``decode.py``: attnopt over each layout and with each variant, and every peer that is installed.

A way is prepared once for a batch (tables, plans, views), and then called on a pool by its number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from decode_cells import Inputs, Layout, Pool
from peers import Cannot, _first, _import
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from variants import WINDOW

from attnopt.emit.direct import DIRECT
from attnopt.kernels import paged_op
from attnopt.kernels.triton.launch_paged import Config, attention
from attnopt.runtime.paged_cache import empty_scales

assert paged_op.__doc__  # the operator is registered


@dataclass(frozen=True)
class Way:
    """``call(n)`` -> o [B, Hq, D] from pool n. ``turns`` calls touch as many different keys as the rotation needs."""

    name: str
    by: str
    layout: Layout
    variant: str
    call: Callable[[int], Tensor]
    turns: int
    keys: int | None = None
    """How many of each request's keys count, where not all do."""

    def seen(self, n: int, inputs: Inputs) -> Layout:
        """The layout that call n reads."""
        return self.layout.rolled(_shift(n, inputs, self.layout)) if self.turns > inputs.count else self.layout


def _shift(n: int, inputs: Inputs, layout: Layout) -> int:
    """Pages by which call n rolls the table, so that a window lies on other pages when a pool comes again."""
    return n // inputs.count * (WINDOW // layout.page_size)


def own(
    inputs: Inputs,
    layout: Layout,
    variant: str = "plain",
    keys: int | None = None,
    cache_bytes: int = 0,
    config: Config | None = None,
    splits: int | None = None,
) -> Way:
    """attnopt's operator; with ``config`` or ``splits`` its Triton kernel, launched so. With ``keys`` over the first keys alone."""
    s = inputs.shape
    narrow = variant.startswith("window") or keys is not None
    turns = inputs.count
    if narrow and layout.table.shape[1] > 1 and cache_bytes:
        windows = max(1, s.ctx // WINDOW)
        wanted = 2 + 3 * cache_bytes // s.bytes_read(f"window {WINDOW}", inputs.dtype.itemsize)
        turns = inputs.count * min(windows, -(-wanted // inputs.count))
    tables = [(layout.rolled(_shift(n, inputs, layout)).first(keys or s.ctx)).table for n in range(0, turns, inputs.count)]
    lengths = inputs.lengths if keys is None else torch.full_like(inputs.lengths, keys)
    loads, spec = inputs.loads(variant), s.spec(variant)
    text = spec.to_json()
    caches = [[p.pages(p.k, layout.page_size), p.pages(p.v, layout.page_size), *(_scales(p, x, layout) for x in (p.k_scale, p.v_scale))] for p in inputs.pools_of(variant)]
    op = DIRECT.get(torch.ops.attnopt.paged_attention.default, torch.ops.attnopt.paged_attention)

    def call(n: int) -> Tensor:
        at = n % inputs.count
        k, v, ks, vs = caches[at]
        q, table = inputs.queries[at], tables[n % turns // inputs.count]
        if config is not None or splits is not None:
            return attention(q, k, v, table, inputs.starts, lengths, loads, [], spec, ks, vs, chosen=config, num_splits=splits)
        o: Tensor = op(q, k, v, table, inputs.starts, lengths, loads, [], text, "auto", ks, vs)
        return o

    name = "attnopt" + ("" if variant == "plain" else f" {variant}") + ("" if keys is None else f" over {keys} keys")
    return Way(name, "attnopt", layout, variant, call, turns, keys)


def _scales(pool: Pool, x: Tensor | None, layout: Layout) -> Tensor | None:
    """[pages, page_size, Hkv], in memory as the runtime has them."""
    if x is None:
        return None
    paged = pool.pages(x, layout.page_size)
    return empty_scales(*paged.shape, x.device).copy_(paged)


# ------------------------------------------------------------------------------------------------ peers


def _dense(inputs: Inputs) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q [B, Hq, 1, D] and k, v [B, Hkv, ctx, D], views of a contiguous cache."""
    s = inputs.shape
    return [(q[:, :, None], *(x.view(s.B, s.ctx, s.Hkv, s.D).transpose(1, 2) for x in (p.k, p.v))) for q, p in zip(inputs.queries, inputs.pools, strict=True)]


def _sdpa(backend: SDPBackend) -> Callable[[Inputs, Layout], Callable[[int], Tensor]]:
    def prepare(inputs: Inputs, layout: Layout) -> Callable[[int], Tensor]:
        if layout.name != "contiguous":
            raise Cannot("SDPA has no pages")
        sets = _dense(inputs)

        def call(n: int) -> Tensor:
            q, k, v = sets[n % inputs.count]
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0]

        def on_cpu(n: int) -> Tensor:
            q, k, v = sets[n % inputs.count]
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0]

        return on_cpu if inputs.device.type == "cpu" else call

    return prepare


def _flashinfer(inputs: Inputs, layout: Layout) -> Callable[[int], Tensor]:
    package = _import("flashinfer")
    if layout.name == "contiguous":
        raise Cannot("asked for pages alone")
    s, table = inputs.shape, layout.table
    indptr = torch.arange(s.B + 1, dtype=torch.int32, device=inputs.device) * table.shape[1]
    indices, last = table.flatten().contiguous(), torch.full((s.B,), (s.ctx - 1) % layout.page_size + 1, dtype=torch.int32, device=inputs.device)
    space = torch.empty(256 << 20, dtype=torch.uint8, device=inputs.device)
    # for CUDA graphs, and the tensor cores that a group of heads fills: its own advice for both
    wrapper = package.BatchDecodeWithPagedKVCacheWrapper(
        space,
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=indptr,
        paged_kv_indices_buffer=indices,
        paged_kv_last_page_len_buffer=last,
    )
    wrapper.plan(indptr, indices, last, s.Hq, s.Hkv, s.D, layout.page_size, q_data_type=inputs.dtype, kv_data_type=inputs.dtype)
    caches = [(p.pages(p.k, layout.page_size), p.pages(p.v, layout.page_size)) for p in inputs.pools]
    return lambda n: _first(wrapper.run(inputs.queries[n % inputs.count], caches[n % inputs.count]))


def _flash_2(inputs: Inputs, layout: Layout) -> Callable[[int], Tensor]:
    package = _import("flash_attn")
    if not hasattr(package, "flash_attn_with_kvcache"):
        raise Cannot("not installed: the folder flash_attn holds no flash_attn_with_kvcache")
    options: dict[str, Any] = {"cache_seqlens": inputs.lengths, "causal": True}
    if layout.name != "contiguous":
        options["block_table"] = layout.table
    caches = [(q[:, None], p.pages(p.k, layout.page_size), p.pages(p.v, layout.page_size)) for q, p in zip(inputs.queries, inputs.pools, strict=True)]
    return lambda n: _first(package.flash_attn_with_kvcache(*caches[n % inputs.count], **options))[:, 0]


def _flash_4(inputs: Inputs, layout: Layout) -> Callable[[int], Tensor]:
    interface = _import("flash_attn.cute.interface")
    options: dict[str, Any] = {"causal": True}
    if layout.name == "contiguous":
        s = inputs.shape
        sets = [(q[:, None], *(x.view(s.B, s.ctx, s.Hkv, s.D) for x in (p.k, p.v))) for q, p in zip(inputs.queries, inputs.pools, strict=True)]
        return lambda n: _first(interface.flash_attn_func(*sets[n % inputs.count], **options))[:, 0]
    options |= {"cu_seqlens_q": inputs.starts, "seqused_k": inputs.lengths, "page_table": layout.table, "max_seqlen_q": 1}
    caches = [(q, p.pages(p.k, layout.page_size), p.pages(p.v, layout.page_size)) for q, p in zip(inputs.queries, inputs.pools, strict=True)]
    return lambda n: _first(interface.flash_attn_varlen_func(*caches[n % inputs.count], **options))


PEERS: dict[str, Callable[[Inputs, Layout], Callable[[int], Tensor]]] = {
    "cuDNN SDPA": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash SDPA": _sdpa(SDPBackend.FLASH_ATTENTION),
    "FlashInfer": _flashinfer,
    "flash-attn-2": _flash_2,
    "flash-attn-4": _flash_4,
}
