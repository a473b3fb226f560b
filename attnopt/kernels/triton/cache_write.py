"""Writing keys and values to the slots of a cache, quantized where the cache is. Nothing waits for the device."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels.paged_reference import GREATEST
from attnopt.kernels.triton.launching import interpreted


@triton.jit
def _put(
    X, CACHE, SCALE, tokens, heads, inside, page, offset,
    X_s0, X_s1, X_s2, CACHE_s0, CACHE_s1, CACHE_s2, CACHE_s3, SCALE_s0, SCALE_s1, SCALE_s2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GREATEST: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    m_x = inside[:, None] & (offs_d[None, :] < D)
    # [ROWS, BLOCK_D]
    x = tl.load(X + (tokens.to(tl.int64) * X_s0 + heads * X_s1)[:, None] + offs_d[None, :] * X_s2, mask=m_x, other=0.0)
    if GREATEST > 0:
        x = x.to(tl.float32)
        scale = tl.max(tl.abs(x), 1) / GREATEST
        scale = tl.where(tl.sum(x != x, 1) > 0, float("nan"), scale)
        x = x / tl.where(scale == 0.0, 1.0, scale)[:, None]
        tl.store(SCALE + page * SCALE_s0 + offset * SCALE_s1 + heads * SCALE_s2, scale, mask=inside)
        if ROUND:  # half to even
            low = tl.floor(x)
            odd = low - 2.0 * tl.floor(low * 0.5)
            x = tl.where((x - low > 0.5) | ((x - low == 0.5) & (odd == 1.0)), low + 1.0, low)
    p_cache = CACHE + (page * CACHE_s0 + offset * CACHE_s1 + heads * CACHE_s2)[:, None] + offs_d[None, :] * CACHE_s3
    tl.store(p_cache, x.to(CACHE.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["T", "slots", "page_size"])
def cache_write(
    K, V, K_CACHE, V_CACHE, K_SCALE, V_SCALE, SLOTS,
    K_s0, K_s1, K_s2, V_s0, V_s1, V_s2, KC_s0, KC_s1, KC_s2, KC_s3, VC_s0, VC_s1, VC_s2, VC_s3, KS_s0, KS_s1, KS_s2, VS_s0, VS_s1, VS_s2,
    T, slots, page_size,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    GREATEST: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One program writes ROWS rows, each of one head of one token."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = row // HKV
    heads = row % HKV
    slot = tl.load(SLOTS + tokens, mask=tokens < T, other=-1)
    inside = (slot >= 0) & (slot < slots)
    page = slot // page_size
    offset = slot % page_size
    _put(
        K, K_CACHE, K_SCALE, tokens, heads, inside, page, offset, K_s0, K_s1, K_s2, KC_s0, KC_s1, KC_s2, KC_s3, KS_s0, KS_s1, KS_s2,
        D, BLOCK_D, GREATEST, ROUND,
    )  # fmt: skip
    if DV > 0:
        _put(
            V, V_CACHE, V_SCALE, tokens, heads, inside, page, offset, V_s0, V_s1, V_s2, VC_s0, VC_s1, VC_s2, VC_s3, VS_s0, VS_s1, VS_s2,
            DV, BLOCK_DV, GREATEST, ROUND,
        )  # fmt: skip


def refusal(k: Tensor, k_cache: Tensor) -> str | None:
    """Why the kernel cannot write there, as a phrase; None when it can."""
    if not k.is_cuda and not interpreted():
        return f"its kernels run on a GPU, and the tensors are on {k.device.type}"
    if k_cache.dtype == torch.float8_e4m3fn and k.is_cuda and torch.cuda.get_device_capability(k.device) < (8, 9):
        return "float8_e4m3fn needs compute capability 8.9"
    return None


def write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: Tensor | None = None, v_scale: Tensor | None = None
) -> None:
    """``attnopt::cache_write``. A slot behind the last page is not written either: on a device there is nobody to tell."""
    T, Hkv, D = k.shape
    Dv = v.shape[2]
    if T == 0:
        return
    ks, vs = (k, v) if k_scale is None or v_scale is None else (k_scale, v_scale)
    strides = [*k.stride(), *v.stride(), *k_cache.stride(), *v_cache.stride(), *ks.stride()[:3], *vs.stride()[:3]]
    # few rows each while there are few, so that all multiprocessors have some
    rows = min(16, triton.next_power_of_2(max(1, T * Hkv // 512)))
    greatest = 0.0 if k_scale is None else GREATEST[k_cache.dtype]
    with torch.cuda.device(k.device) if k.is_cuda else contextlib.nullcontext():
        cache_write[(triton.cdiv(T * Hkv, rows),)](
            k, v, k_cache, v_cache, ks, vs, slots.contiguous(), *strides, T, k_cache.shape[0] * k_cache.shape[1], k_cache.shape[1],
            HKV=Hkv, D=D, DV=Dv, BLOCK_D=triton.next_power_of_2(D), BLOCK_DV=triton.next_power_of_2(max(Dv, 1)), ROWS=rows,
            GREATEST=greatest, ROUND=k_cache.dtype == torch.int8, num_warps=4 if rows * D >= 512 else 1,
        )  # fmt: skip
