"""Running the generated kernels of attention over a paged cache: what they refuse, block sizes, the number of splits, the launch.

Everything here follows from shapes, so nothing waits for the device, and a CUDA graph can hold the launch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import AttnoptError
from attnopt.ir.expr import Expr
from attnopt.ir.mask import chunk
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.codegen import unsupported
from attnopt.kernels.device import capability, processors
from attnopt.kernels.materialise import load_tensors
from attnopt.kernels.paged_choice import CacheSetting
from attnopt.kernels.paged_reference import request_sizes
from attnopt.kernels.programs import programs_of
from attnopt.kernels.tiling import Bounds, bounds, cached_key_range
from attnopt.kernels.triton.flash_forward import Source
from attnopt.kernels.triton.launch import DTYPES, SHARED_MEMORY_SM90, available, import_source, interpreted, power_of_two, shared_memory
from attnopt.kernels.triton.paged import CONSTEXPRS, generate, lengths_of, request_spec

MAX_HEAD_DIM = 576
MAX_VALUE_DIM = 512
LEAST_PAGE = 16
PROGRAMS_EACH = 2
"""Programs that a multiprocessor holds at a time, as the block sizes below leave room for."""
INTERPRETED_PROCESSORS = 4
"""Under the interpreter there are none to count: as many as make small tests split."""


def refusal(spec: AttentionSpec, setting: CacheSetting) -> str | None:
    """Why the kernels cannot compute ``spec`` over that cache, as a phrase; None when they can."""
    reason = available()
    if reason is not None:
        return reason
    if setting.device == "cpu" and not interpreted():
        return "its kernels run on a GPU, and the tensors are on the CPU"
    if setting.device not in ("cpu", "cuda"):
        return f"its kernels run on cuda, and the tensors are on {setting.device}"
    if setting.dtype not in DTYPES:
        return f"it computes float16, bfloat16 and float32, and the query is {str(setting.dtype).removeprefix('torch.')}"
    if setting.D > MAX_HEAD_DIM or setting.Dv > MAX_VALUE_DIM:
        return f"it has D up to {MAX_HEAD_DIM} and Dv up to {MAX_VALUE_DIM}, and they are {setting.D} and {setting.Dv}"
    if not setting.contiguous and (setting.page_size < LEAST_PAGE or setting.page_size & (setting.page_size - 1)):
        return f"its pages hold a power of two of keys from {LEAST_PAGE} on, and page_size is {setting.page_size}"
    if setting.cache_dtype == torch.float8_e4m3fn and setting.device == "cuda" and capability() < (8, 9):
        major, minor = capability()
        return f"float8_e4m3fn needs compute capability 8.9, and this device has {major}.{minor}"
    return program_refusal(request_spec(spec))


@lru_cache(maxsize=1024)
def program_refusal(spec: AttentionSpec) -> str | None:
    """Why the programs of a spec cannot be computed over pages, as a phrase; None when they can."""
    programs = programs_of(spec)
    if programs.retries:
        return "rows without a visible key average all keys, of which there are more at each step"
    lengths = lengths_of(spec)
    for part in programs.parts:
        if "q" in part.axes and "k" in part.axes:
            return "a part of its program would be a table of all queries times all keys"
        if _reads(part.expr, lengths):
            return "a table that its program reads depends on the length of each request"
    limits = cached_key_range(programs.mask)
    if any(_reads(x, lengths) for x in (*limits.left, *limits.right)):
        return "how far a query sees depends on the length of each request"
    return unsupported(programs.roots)


def _reads(e: Expr, names: frozenset[str]) -> bool:
    return any(x.op == "sym" and x.value[0] in names for x in e.leaves)


# ------------------------------------------------------------------------------------------------ kernels


@dataclass(frozen=True)
class Kernel:
    source: Source
    module: ModuleType
    """With ``paged_forward`` and ``paged_reduce``."""
    folded: bool


@lru_cache(maxsize=1024)
def kernel_for(spec: AttentionSpec, quantized: bool) -> Kernel:
    source = generate(spec, quantized)
    return Kernel(source, import_source(source.text), programs_of(request_spec(spec)).folded)


@dataclass(frozen=True)
class Config:
    """Block sizes, and Triton's launch options. A tile is HEADS heads times BLOCK_M // HEADS queries."""

    BLOCK_M: int
    BLOCK_N: int
    HEADS: int
    num_warps: int
    num_stages: int


@lru_cache(maxsize=1024)
def config(D: int, Dv: int, groups: int, queries: int, dtype: torch.dtype, memory: int, one_load: bool = False) -> Config:
    """Block sizes for about ``queries`` queries a request, on a device with ``memory`` bytes of shared memory per block of threads.

    ``one_load`` where the values are read with the keys (``shares``).

    No choice spills on sm_80 and sm_90 (``tests/kernels/test_compile.py``).
    """
    width = max(D, power_of_two(Dv))
    large = memory >= 200 * 1024
    if dtype == torch.float32:
        # no tensor cores at full precision: products are unrolled FMAs, and small tiles keep them in registers
        tallest, BLOCK_N, stages = (32, 32, 2) if width <= 64 else (16, 32, 2) if width <= 128 else (16, 16, 1)
    elif width <= 128:
        tallest, BLOCK_N, stages = 128 if large else 64, 64, 3
    elif width <= 256:
        tallest, BLOCK_N, stages = 64, 64 if large else 32, 2
    else:
        tallest, BLOCK_N, stages = 64 if large else 16, 32, 3 if one_load else 2
    BLOCK_M = min(tallest, power_of_two(groups * queries))
    warps = 8 if BLOCK_M * width >= 64 * 128 or width > (64 if dtype == torch.float32 else 128) else 4
    return Config(BLOCK_M, BLOCK_N, min(groups, BLOCK_M), warps, stages)


def head_parts(D: int) -> tuple[int, int]:
    """Two block sizes that make up D, powers of two, the second 0 where the first is enough: 576 is 512 and 64."""
    first = power_of_two(D)
    if first == D or D < 16:
        return first, 0
    return first // 2, power_of_two(D - first // 2)


@lru_cache(maxsize=4096)
def splits(programs: int, blocks: int, processors: int) -> int:
    """How many programs share the keys of a tile, where there are ``programs`` tiles of at most ``blocks`` blocks of keys.

    The least number that fills the multiprocessors about as well as any: whole rounds of them, without a nearly empty last one.
    """
    room = processors * PROGRAMS_EACH
    most = max(1, min(blocks // 2, room))

    def filled(n: int) -> float:
        rounds = programs * n / room
        return rounds / math.ceil(rounds)

    if programs >= 4 * room:
        return 1
    best = max(filled(n) for n in range(1, most + 1))
    return next(n for n in range(1, most + 1) if filled(n) >= 0.95 * best)


# ------------------------------------------------------------------------------------------------ the call


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
    chosen: Config | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """``attnopt::paged_attention`` by the generated kernels. ``chosen`` and ``num_splits`` replace what ``config`` and ``splits`` say."""
    T, Hq, D = q.shape
    _, page_size, Hkv, Dv = v_cache.shape
    R, columns = block_table.shape
    o = torch.empty((T, Hq, Dv), dtype=q.dtype, device=q.device)
    if o.numel() == 0 or R == 0 or columns == 0 or k_cache.shape[0] == 0:
        return o.zero_()
    capacity, groups = columns * page_size, Hq // Hkv
    on_gpu = q.device.type == "cuda"
    index = q.device.index or 0
    spec = request_spec(spec)
    values = request_sizes(spec, sizes, q, k_cache, v_cache, R, capacity)
    limits = bounds(spec, values)
    memory = shared_memory(index) if on_gpu else SHARED_MEMORY_SM90
    one_load = shares(k_cache, v_cache)
    c = chosen or config(D, Dv, groups, -(-T // R), q.dtype, memory, one_load)
    kernel = kernel_for(spec, k_scale is not None)
    BLOCK_Q, lanes = c.BLOCK_M // c.HEADS, Hkv * -(-groups // c.HEADS)
    if num_splits is None:
        likely = R + (T - R) // BLOCK_Q if T > R else R
        num_splits = splits(likely * lanes, -(-reach(limits, chunk(spec.mask), BLOCK_Q, capacity) // c.BLOCK_N), processors(index) if on_gpu else INTERPRETED_PROCESSORS)
    split = num_splits > 1
    part = torch.empty((T, Hq, num_splits, Dv), dtype=torch.float32, device=q.device) if split else o
    lse = torch.empty((T, Hq, num_splits), dtype=torch.float32, device=q.device) if split else o
    tensors = {"Q": q, "K": k_cache, "V": v_cache, "O": o, "TABLE": block_table}
    if k_scale is not None and v_scale is not None:
        tensors |= {"K_SCALE": k_scale, "V_SCALE": v_scale}
    arguments = bind(kernel.source, spec, tensors, loads, values, capacity)
    arguments |= {"PART": part, "LSE": lse, "STARTS": cu_seqlens_q.contiguous(), "LENGTHS": seqlens_k.contiguous()}
    arguments |= {"T": T, "R": R, "Hkv": Hkv, "SPLITS": num_splits, "LEFT": limits.left, "RIGHT": limits.right}
    grid = ((T // BLOCK_Q + R + 1) * lanes, num_splits)
    fixed = constants(D, Dv, groups, R, 0 if columns == 1 else page_size, split, one_load, c, q.dtype)
    with torch.cuda.device(q.device) if on_gpu else contextlib.nullcontext():
        kernel.module.paged_forward[grid](*(arguments[n] for n in kernel.source.arguments), **fixed, num_warps=c.num_warps, num_stages=c.num_stages)
        if split:
            width = power_of_two(Dv)
            kernel.module.paged_reduce[(T * Hq,)](
                part, lse, o, *o.stride(), Hq, num_splits, DV=Dv, BLOCK_DV=width, BLOCK_S=max(1, 2048 // width), FOLDED=kernel.folded, num_warps=4
            )
    return o


def reach(limits: Bounds, of_chunk: int | None, queries: int, capacity: int) -> int:
    """The most keys that a tile of ``queries`` queries walks over."""
    found = capacity
    if limits.right is not None:
        if limits.left is not None:
            found = min(found, limits.left + limits.right + queries)
        if of_chunk is not None:
            found = min(found, of_chunk + limits.right + queries)
    return max(1, found)


def shares(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the values are the first features of the keys, as in a cache of latents, so that a block of keys holds its values already."""
    Dv = v_cache.shape[3]
    same = k_cache.data_ptr() == v_cache.data_ptr() and k_cache.stride() == v_cache.stride() and k_cache.dtype == v_cache.dtype
    return same and Dv == head_parts(k_cache.shape[3])[0] == power_of_two(Dv)


def constants(
    D: int, Dv: int, groups: int, R: int, page: int, split: bool, shared: bool, c: Config, dtype: torch.dtype
) -> dict[str, Any]:
    """The values of the kernel's ``CONSTEXPRS``. ``page`` is 0 where each request has one."""
    BLOCK_R = max(128, power_of_two(R + 1))
    parts = head_parts(D)
    precision = "ieee" if dtype == torch.float32 else "tf32"
    values = (D, Dv, groups, c.HEADS, *parts, power_of_two(Dv), c.BLOCK_M, c.BLOCK_N, BLOCK_R, page, split, shared, precision)
    return dict(zip(CONSTEXPRS, values, strict=True))


def bind(
    source: Source, spec: AttentionSpec, tensors: dict[str, Tensor], loads: Sequence[Tensor], sizes: dict[str, int], capacity: int
) -> dict[str, Any]:
    """Tensors, loads and sizes by the names of the kernel's arguments, each with its strides and extents."""
    shape = {"b": tensors["TABLE"].shape[0], "h": tensors["Q"].shape[1], "q": capacity, "k": capacity}
    read = load_tensors(source.parts, shape, loads, sizes, tensors["Q"].device)
    for i, x in enumerate(read):
        if x.numel() == 0:
            raise AttnoptError(f"{spec.loads[i].name if i < len(loads) else 'A table'} {tuple(x.shape)} is empty, and this attention reads it.")
    named = tensors | {f"L{i}": x for i, x in enumerate(read)}
    values: dict[str, Any] = dict(named)
    for name, x in named.items():
        values.update({f"{name}_s{d}": n for d, n in enumerate(x.stride())})
        values.update({f"{name}_n{d}": n for d, n in enumerate(x.shape)})
    values.update({f"size{i}": sizes[name] for i, name in enumerate(source.sizes)})
    return values | {"POSITIONS": capacity}
