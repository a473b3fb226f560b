"""Running generated Gluon kernels: their limits, TMA descriptors, the persistent grid."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import reference
from attnopt.kernels.codegen import unsupported
from attnopt.kernels.gluon.config import Config, config, parts_of
from attnopt.kernels.gluon.flash_forward import Source, generate
from attnopt.kernels.materialise import load_tensors
from attnopt.kernels.programs import programs_of
from attnopt.kernels.tiling import bind_sizes, bounds, empty_output
from attnopt.kernels.triton.launch import import_source

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16)


@lru_cache(maxsize=1)
def available() -> str | None:
    """None, or why these kernels cannot run on this machine."""
    if importlib.util.find_spec("triton.experimental.gluon.language.nvidia.hopper") is None:
        return "the installed Triton has no Gluon for Hopper (3.6 and newer have)"
    if not torch.cuda.is_available():
        return "it needs a Hopper GPU (compute capability 9.0), and there is no CUDA GPU"
    found = torch.cuda.get_device_capability()
    if found[0] != 9:
        return f"it needs a Hopper GPU (compute capability 9.0), and this one has {found[0]}.{found[1]}"
    return None


def refusal(spec: AttentionSpec, device: str, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot compute ``spec`` there, as a phrase; None when it can."""
    if device != "cuda":
        return f"its kernels run on cuda, and the tensors are on {device}"
    if dtype not in DTYPES:
        return f"it computes float16 and bfloat16, and the query is {str(dtype).removeprefix('torch.')}"
    if spec.dropout:
        return f"it has no dropout, and this attention has dropout {spec.dropout:g}"
    for name, n in (("D", spec.dims.D), ("Dv", spec.dims.Dv)):
        if n.is_const and (n.value > MAX_HEAD_DIM or n.value % 8):
            return f"it has head sizes up to {MAX_HEAD_DIM} in steps of 8, and {name} is {n.value}"
    return unsupported(programs_of(spec).roots)


@dataclass(frozen=True)
class Kernel:
    source: Source
    config: Config
    function: Any
    """The jitted ``flash_forward``."""


@lru_cache(maxsize=1024)
def kernel_for(spec: AttentionSpec, D: int, Dv: int, chosen: Config | None = None) -> Kernel:
    """The imported kernel of a spec and its head sizes."""
    c = chosen or config(D, Dv)
    source = generate(spec, D, Dv, c)
    return Kernel(source, c, import_source(source.text).flash_forward)


def attention(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec, chosen: Config | None = None) -> tuple[Tensor, Tensor]:
    """The spec on q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv]: o [B, Hq, Sq, Dv] and lse [B, Hq, Sq].

    lse is in float32, natural logarithm, -inf on rows without a visible key. Forward only. See ``refusal``.
    ``chosen`` replaces the measured configuration.
    """
    reference.check_shapes(q, k, v, loads, spec)
    o = empty_output(q, v)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if o.numel() == 0 or k.shape[2] == 0:
        return o.zero_(), lse.fill_(-torch.inf)
    values = bind_sizes(spec, sizes, q, k, v)
    kernel = kernel_for(spec, q.shape[3], v.shape[3], chosen)
    q, k, v = (x if _tma_reads(x) else x.contiguous() for x in (q, k, v))
    grid = Grid.of(kernel, q, processors(q.device.index or 0))
    with torch.cuda.device(q.device):
        kernel.function[(grid.workers,)](*bind(kernel, grid, spec, q, k, v, o, lse, loads, values), num_warps=4, maxnreg=kernel.config.registers_at_launch)
    return o, lse


@dataclass(frozen=True)
class Grid:
    """The tiles of queries of one call, and the blocks of threads that share them."""

    tiles: int
    """Per head."""
    late: int
    """How many of a head's tiles count as late ones, which alternate with the others."""
    total: int
    workers: int

    @staticmethod
    def of(kernel: Kernel, q: Tensor, processors: int) -> Grid:
        heads, tiles = q.shape[0] * q.shape[1], -(-q.shape[2] // kernel.config.BLOCK_M)
        # with a multiprocessor for each tile there is nothing to even out
        late = (tiles + 1) // 2 if kernel.source.uneven and heads * tiles > processors else tiles
        return Grid(tiles, late, heads * tiles, min(processors, heads * late))


def _tma_reads(x: Tensor) -> bool:
    """Whether TMA takes the tensor as it lies: rows contiguous, everything aligned to 16 bytes."""
    size = x.element_size()
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(n == 1 or (s > 0 and s * size % 16 == 0) for s, n in zip(x.stride()[:3], x.shape, strict=False))


@lru_cache(maxsize=64)
def processors(index: int) -> int:
    """Multiprocessors of CUDA device ``index``."""
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@lru_cache(maxsize=256)
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype])


def descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """TMA's view of x [B, H, S, D] in boxes of rows x columns of one head."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # an axis of one element may have any stride; TMA wants one that is a multiple of 16 bytes
    strides = [s if n > 1 else 8 for s, n in zip(x.stride()[:3], x.shape, strict=False)] + [1]
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, columns], _layout(rows, columns, x.dtype))


def bind(
    kernel: Kernel, grid: Grid, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, loads: Sequence[Tensor], sizes: Mapping[str, int]
) -> list[Any]:
    """The kernel's arguments, in the order of ``source.arguments``."""
    source = kernel.source
    B, Hq, Sq, _ = q.shape
    Skv = k.shape[2]
    of = {"q": q, "k": k, "v": v, "o": o}
    values: dict[str, Any] = {name: descriptor(of[tensor], rows, columns) for name, tensor, rows, columns in source.descriptors}
    values.update(LSE=lse, total=grid.total, tiles=grid.tiles, late=grid.late, Hq=Hq, groups=Hq // k.shape[1], Sq=Sq, Skv=Skv)
    for slot, x in enumerate(load_tensors(source.parts, {"b": B, "h": Hq, "q": Sq, "k": Skv}, loads, sizes, q.device)):
        values[f"L{slot}"] = x
        values.update({f"L{slot}_s{d}": n for d, n in enumerate(x.stride())})
        values.update({f"L{slot}_n{d}": n for d, n in enumerate(x.shape)})
    if not source.mapped:
        limits = bounds(spec, sizes)
        values.update(LEFT=limits.left, RIGHT=limits.right)
    values.update({f"size{i}": sizes[name] for i, name in enumerate(source.sizes)})
    return [values[name] for name in source.arguments]


__all__ = ["attention", "available", "kernel_for", "parts_of", "refusal"]
