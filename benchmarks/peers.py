"""Everybody else's attention, each asked in its own best way for what a cell computes.

A peer is a function from inputs to a ``Ready``; it raises ``Cannot`` with a reason where the package has no way. What can be
made once per batch of data (masks, tables, block masks, lengths) is made there, outside of the timing.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cells import Inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v as [B, H, S, D] -> o [B, Hq, S, Dv]."""


class Cannot(Exception):
    """The package has no way to compute this; the message says why."""


@dataclass
class Ready:
    function: Function
    mask_ms: float | None = None
    """What building the block mask took, the second time."""
    note: str = ""


# ------------------------------------------------------------------------------------------------ PyTorch


def _sdpa(backend: SDPBackend) -> Callable[[Inputs], Ready]:
    def prepare(inputs: Inputs) -> Ready:
        cell, variant = inputs.cell, inputs.cell.variant
        if variant.sdpa_cannot:
            raise Cannot(variant.sdpa_cannot)
        mask: Tensor | None = None
        if variant.sdpa_bias is not None:
            if backend is SDPBackend.FLASH_ATTENTION:
                raise Cannot("its flash kernel takes no mask")
            mask = _dense_mask(inputs)
        elif backend is SDPBackend.EFFICIENT_ATTENTION:
            raise Cannot("timed only with a mask, where flash cannot be")
        options: dict[str, Any] = {"attn_mask": mask, "is_causal": cell.causal and mask is None, "scale": cell.scale, "enable_gqa": cell.Hq != cell.Hkv}

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **options)

        if inputs.device.type == "cpu":
            return Ready(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options))
        return Ready(run, note="" if mask is None else f"dense mask {str(mask.dtype).removeprefix('torch.')}{list(mask.shape)}, made before")

    return prepare


def _dense_mask(inputs: Inputs) -> Tensor:
    """The whole mask [1 or B, 1 or H, S, S], bool or in the dtype of q."""
    cell, variant = inputs.cell, inputs.cell.variant
    i, j = torch.arange(cell.S, device=inputs.device)[:, None], torch.arange(cell.S, device=inputs.device)[None]
    assert variant.sdpa_bias is not None
    mask = variant.sdpa_bias(i, j, inputs.loads, inputs.sets[0][0].dtype)
    if not cell.causal:
        return mask
    return mask & (j <= i) if mask.dtype == torch.bool else mask.masked_fill(j > i, -torch.inf)


def _flex(inputs: Inputs) -> Ready:
    from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention

    cell, variant = inputs.cell, inputs.cell.variant
    mods = [_causal] if cell.causal else []
    if variant.flex_mask is not None:
        mods.append(variant.flex_mask(inputs.loads))
    block_mask, took = None, None
    if mods:
        per_batch = variant.name in ("ragged padding", "documents")
        for _ in range(2):
            start = now(inputs.device)
            block_mask = create_block_mask(and_masks(*mods), cell.B if per_batch else None, None, cell.S, cell.S, device=str(inputs.device))
            took = (now(inputs.device) - start) * 1e3
    score_mod = None if variant.flex_score is None else variant.flex_score(inputs.loads, cell.S)
    # On a CPU, where only the script itself is tried, it is not compiled. fullgraph: rather an error than an eager fallback.
    call = flex_attention if inputs.device.type == "cpu" else torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=cell.scale, enable_gqa=cell.Hq != cell.Hkv)  # type: ignore[no-any-return]

    return Ready(run, mask_ms=took)


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ------------------------------------------------------------------------------------------------ flash-attn


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise Cannot(f"not installed: {e}") from e


def _swap(x: Tensor) -> Tensor:
    """[B, H, S, D] to [B, S, H, D] and back; a view."""
    return x.transpose(1, 2)


def _first(x: Any) -> Tensor:
    return x[0] if isinstance(x, tuple) else x  # type: ignore[no-any-return]


def _packed(function: Callable[..., Any], cu_seqlens: Tensor, options: dict[str, Any]) -> Function:
    """A function over [tokens, H, D] with cu_seqlens, on the one batch of packed documents."""
    most = int(cu_seqlens.diff().max())

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (_swap(x)[0] for x in (q, k, v))
        o = _first(function(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=most, max_seqlen_k=most, **options))
        return _swap(o[None])

    return run


def _flash_4(inputs: Inputs) -> Ready:
    interface = _import("flash_attn.cute.interface")
    cell, way = inputs.cell, inputs.cell.variant.flash(inputs.loads, inputs.cell.S)
    options: dict[str, Any] = {"softmax_scale": cell.scale, "causal": cell.causal, "softcap": way.softcap}
    if way.window is not None:
        # keys to the left beside the query's own
        options["window_size"] = (way.window - 1, 0 if cell.causal else None)
    if way.score_mod is not None:
        mods = _import("cute_mods")
        options.update(score_mod=getattr(mods, way.score_mod)(cell), aux_tensors=list(way.tensors) or None)
    if way.cu_seqlens is not None:
        return Ready(_packed(interface.flash_attn_varlen_func, way.cu_seqlens, options))
    if way.lengths is not None:
        options.update(seqused_q=way.lengths, seqused_k=way.lengths)
        function, note = interface.flash_attn_varlen_func, "lengths made before; computes no padded rows"
    else:
        function, note = interface.flash_attn_func, "" if way.score_mod is None else "score_mod in CuTe"
    return Ready(lambda q, k, v: _swap(_first(function(_swap(q), _swap(k), _swap(v), **options))), note=note)


def _flash_3(inputs: Inputs) -> Ready:
    interface = _import("flash_attn_interface")
    cell, way = inputs.cell, inputs.cell.variant.flash(inputs.loads, inputs.cell.S)
    if way.slopes is not None or way.score_mod is not None:
        raise Cannot("it has no ALiBi and no score_mod")
    window = (-1, -1) if way.window is None else (way.window - 1, 0 if cell.causal else -1)
    options: dict[str, Any] = {"softmax_scale": cell.scale, "causal": cell.causal, "window_size": window, "softcap": way.softcap}
    if way.cu_seqlens is not None:
        return Ready(_packed(interface.flash_attn_varlen_func, way.cu_seqlens, options))
    if way.lengths is not None:
        return _unpadded(interface.flash_attn_varlen_func, way.lengths, options)
    return Ready(lambda q, k, v: _swap(_first(interface.flash_attn_func(_swap(q), _swap(k), _swap(v), **options))))


def _flash_2(inputs: Inputs) -> Ready:
    package = _import("flash_attn")
    if not hasattr(package, "flash_attn_func"):
        raise Cannot("not installed: the folder flash_attn holds no flash_attn_func")
    cell, way = inputs.cell, inputs.cell.variant.flash(inputs.loads, inputs.cell.S)
    if way.score_mod is not None and way.slopes is None:
        raise Cannot("it has no bias and no score_mod")
    window = (-1, -1) if way.window is None else (way.window - 1, 0 if cell.causal else -1)
    options: dict[str, Any] = {"softmax_scale": cell.scale, "causal": cell.causal, "window_size": window, "softcap": way.softcap, "alibi_slopes": way.slopes}
    if way.cu_seqlens is not None:
        return Ready(_packed(package.flash_attn_varlen_func, way.cu_seqlens, options))
    if way.lengths is not None:
        return _unpadded(package.flash_attn_varlen_func, way.lengths, options)
    return Ready(lambda q, k, v: _swap(package.flash_attn_func(_swap(q), _swap(k), _swap(v), **options)))


def _unpadded(function: Callable[..., Any], lengths: Tensor, options: dict[str, Any]) -> Ready:
    """Gather the tokens in use, compute, and scatter back: what a padded model has to do in each layer."""
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0).to(torch.int32)])

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, S, _ = q.shape
        used = torch.arange(S, device=q.device)[None] < lengths[:, None]
        where = indices if (indices := cache.get(S)) is not None else cache.setdefault(S, used.flatten().nonzero().squeeze(1))
        q, k, v = (_swap(x).flatten(0, 1).index_select(0, where) for x in (q, k, v))
        o = _first(function(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=S, max_seqlen_k=S, **options))
        out = o.new_zeros(B * S, *o.shape[1:]).index_copy_(0, where, o)
        return _swap(out.view(B, S, H, -1))

    cache: dict[int, Tensor] = {}
    return Ready(run, note="indices made before; tokens gathered and scattered in the timing")


PEERS: dict[str, Callable[[Inputs], Ready]] = {
    "cuDNN SDPA": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash SDPA": _sdpa(SDPBackend.FLASH_ATTENTION),
    "efficient SDPA": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "FlexAttention": _flex,
    "flash-attn-4": _flash_4,
    "flash-attn-3": _flash_3,
    "flash-attn-2": _flash_2,
}
