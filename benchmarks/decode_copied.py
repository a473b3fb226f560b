"""Attention of one token over a contiguous cache whose blocks come by Hopper's copy engine (tensor descriptors), for trials beside the generated kernel.

The generated kernel reads keys by addresses (``cp.async``), so that one source serves all page sizes. This one shows what the copy engine would gain where blocks lie
in one piece: one instruction a block instead of some hundred. Plain attention, whole blocks of keys, D a power of two.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from decode_cells import Inputs, Layout
from decode_ways import Way
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit(do_not_specialize=["SPLITS"])
def copied_forward(
    Q, K, V, O, PART, LSE, LENGTHS, SPLITS, scale, CTX: tl.constexpr, HKV: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr
):
    """K and V are [B * CTX, HKV * D]; Q and O [B, HKV * HEADS, D]; PART [B, HKV * HEADS, SPLITS, D]; scale to base 2."""
    h = tl.program_id(0) % HKV
    split = tl.program_id(0) // HKV % SPLITS
    b = tl.program_id(0) // HKV // SPLITS
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    length = tl.load(LENGTHS + b)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    rows = offs_m < HEADS
    row = b * HKV * HEADS + h * HEADS + offs_m
    q = tl.load(Q + row[:, None] * D + offs_d[None, :], mask=rows[:, None], other=0.0)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for start in tl.range(split * BLOCK_N, length, BLOCK_N * SPLITS):
        k = K.load([b * CTX + start, h * D])
        s = tl.dot(q, tl.trans(k)) * scale
        m_new = tl.maximum(m_i, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new
        v = V.load([b * CTX + start, h * D])
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    acc = acc / l_i[:, None]
    if SPLIT:
        at = row.to(tl.int64) * SPLITS + split
        tl.store(LSE + at, m_i + tl.log2(l_i), mask=rows)
        tl.store(PART + at[:, None] * D + offs_d[None, :], acc, mask=rows[:, None])
    else:
        tl.store(O + row[:, None] * D + offs_d[None, :], acc.to(O.dtype.element_ty), mask=rows[:, None])


@triton.jit(do_not_specialize=["SPLITS"])
def copied_reduce(PART, LSE, O, SPLITS, D: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, D)
    inside = offs_s < SPLITS
    lse = tl.load(LSE + row * SPLITS + offs_s, mask=inside, other=float("-inf"))
    part = tl.load(PART + (row * SPLITS + offs_s)[:, None] * D + offs_d[None, :], mask=inside[:, None], other=0.0)
    p = tl.exp2(lse - tl.max(lse, 0))
    tl.store(O + row * D + offs_d, (tl.sum(part * p[:, None], 0) / tl.sum(p, 0)).to(O.dtype.element_ty))


def copied(inputs: Inputs, layout: Layout, BLOCK_N: int, warps: int, stages: int, splits: int) -> Way:
    """Raises ValueError where a request's keys do not lie in one piece, or are no whole blocks of at least one for each split."""
    s = inputs.shape
    if layout.name != "contiguous" or s.ctx % BLOCK_N or s.ctx < BLOCK_N * splits or s.D & (s.D - 1):
        raise ValueError(f"It reads whole blocks of a contiguous cache, at least one for each split; the cache is {layout.name}, of {s.ctx} keys, with {splits} splits of blocks of {BLOCK_N}.")
    pdl = inputs.device.type == "cuda"
    early = {"launch_pdl": True} if pdl else {}
    descriptors = [[TensorDescriptor.from_tensor(x.view(s.B * s.ctx, s.Hkv * s.D), [BLOCK_N, s.D]) for x in (p.k, p.v)] for p in inputs.pools]
    scale = 1 / math.sqrt(s.D) / math.log(2)

    def call(n: int) -> Tensor:
        k, v = descriptors[n % inputs.count]
        q = inputs.queries[n % inputs.count]
        o = torch.empty_like(q)
        part = torch.empty((s.B, s.Hq, splits, s.D), dtype=torch.float32, device=q.device) if splits > 1 else o
        lse = torch.empty((s.B, s.Hq, splits), dtype=torch.float32, device=q.device) if splits > 1 else o
        copied_forward[(s.Hkv * splits * s.B,)](
            q, k, v, o, part, lse, inputs.lengths, splits, scale, s.ctx, s.Hkv, s.Hq // s.Hkv, s.D, 16, BLOCK_N, splits > 1, pdl, num_warps=warps, num_stages=stages, **early
        )
        if splits > 1:
            copied_reduce[(s.B * s.Hq,)](part, lse, o, splits, s.D, triton.next_power_of_2(splits), pdl, num_warps=4, **early)
        return o

    return Way("copied", "trial", layout, "plain", call, inputs.count)
