"""Running generated kernels: writes their source to the cache, imports it, picks block sizes, launches."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import AttnoptError, BackendError
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import reference
from attnopt.kernels.block_map import BlockMap, block_map
from attnopt.kernels.codegen import unsupported
from attnopt.kernels.device import cache_folder, write
from attnopt.kernels.materialise import Part, load_tensors, materialise
from attnopt.kernels.programs import programs_of
from attnopt.kernels.tiling import bind_sizes, bounds, empty_output
from attnopt.kernels.triton import empty_rows
from attnopt.kernels.triton.dropout import seed_words
from attnopt.kernels.triton.flash_forward import CONSTEXPRS, MAP_PLACES, MAP_TENSORS, Source, generate

MAX_HEAD_DIM = 256
SHARED_MEMORY_SM90 = 227 * 1024
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MANY = 1 << 20
"""More queries than any block has."""


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, as ``TRITON_INTERPRET=1`` makes it."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def available() -> str | None:
    """None, or why Triton kernels cannot run on this machine."""
    if torch.cuda.is_available() or interpreted():
        return None
    return "Triton needs a CUDA GPU, and there is none (TRITON_INTERPRET=1 runs its kernels on the CPU, slowly)"


def refusal(spec: AttentionSpec, device: str, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot compute ``spec`` there, as a phrase; None when it can."""
    if device == "cpu" and not interpreted():
        return "its kernels run on a GPU, and the tensors are on the CPU"
    if device not in ("cpu", "cuda"):
        return f"its kernels run on cuda, and the tensors are on {device}"
    if dtype not in DTYPES:
        return f"it computes float16, bfloat16 and float32, and the query is {str(dtype).removeprefix('torch.')}"
    if spec.dropout >= 1.0:
        return f"it keeps some of the weights, and this attention has dropout {spec.dropout:g}"
    for name, n in (("D", spec.dims.D), ("Dv", spec.dims.Dv)):
        if n.is_const and n.value > MAX_HEAD_DIM:
            return f"it has head sizes up to {MAX_HEAD_DIM}, and {name} is {n.value}"
    return unsupported(materialise(spec.programs, len(spec.loads))[0])


def why(spec: AttentionSpec) -> str:
    """What the generated kernel does with ``spec``, in a few words."""
    limits = bounds_words(spec)
    return "generated flash forward" + (f", {limits}" if limits else "")


def bounds_words(spec: AttentionSpec) -> str:
    t = spec.traits
    if programs_of(spec).rest is not E.TRUE:
        return "skips the blocks that the mask hides"
    return "skips blocks outside of the window" if t.window != (None, None) else "skips blocks above the diagonal" if t.causal else ""


# ------------------------------------------------------------------------------------------------ modules


def import_source(text: str) -> ModuleType:
    """The module of this text. Triton reads a kernel's source from its file, so it is written to one, named by its content."""
    name = f"attnopt_generated_{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    if name in sys.modules:
        return sys.modules[name]
    path = cache_folder() / "triton" / f"{name}.py"
    try:
        if not path.is_file() or path.read_text() != text:
            write(path, text)
    except OSError as e:
        raise BackendError(
            f"The generated Triton kernel cannot be written to {path.parent}: {e.strerror}.", hint="ATTNOPT_CACHE_DIR names another folder"
        ) from e
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Kernel:
    source: Source
    function: Any
    """The jitted ``flash_forward``."""


@lru_cache(maxsize=1024)
def kernel_for(spec: AttentionSpec) -> Kernel:
    """The imported kernel of a spec. Specs that differ only in names or fixed sizes that no program reads share a file."""
    source = generate(spec)
    return Kernel(source, import_source(source.text).flash_forward)


# ------------------------------------------------------------------------------------------------ block sizes


@dataclass(frozen=True)
class Config:
    """Block sizes, and Triton's launch options."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n`` and 16, the least size of a matrix product in Triton."""
    return max(16, 1 << (n - 1).bit_length())


def config(D: int, Dv: int, Sq: int, dtype: torch.dtype, shared_memory: int, heavy: bool) -> Config:
    """Block sizes for heads of D and Dv on a device with ``shared_memory`` bytes per block of threads.

    ``heavy`` where the kernel needs registers beyond the plain ones (``Source.heavy``). No choice spills on sm_80 and sm_90
    (``tests/kernels/test_compile.py``).
    """
    width = max(power_of_two(D), power_of_two(Dv))
    large = shared_memory >= 200 * 1024  # sm_90 has 227 KiB, sm_80 163 KiB
    if dtype == torch.float32:
        # no tensor cores at full precision: products are unrolled FMAs, and small tiles keep them in registers
        wide = Config(16, 32, 8, 1) if heavy else Config(32, 16, 8, 1)
        c = Config(32, 32, 4, 2) if width <= 64 else Config(32, 16, 8, 2) if width <= 128 else wide
    elif width <= 64:
        c = Config(128, 64, 8 if heavy else 4, 3) if large else Config(64, 64, 4, 3)
    elif width <= 128:
        c = Config(128, 64, 8, 3) if large else Config(128, 32, 8, 3)
    elif large:
        c = Config(64, 32, 8, 2) if heavy else Config(128 if width in (D, Dv) else 64, 64, 8, 2)
    else:
        c = Config(64, 32, 8, 2)
    BLOCK_M = min(c.BLOCK_M, power_of_two(Sq))
    return Config(BLOCK_M, c.BLOCK_N, min(c.num_warps, max(4, BLOCK_M * 8 // c.BLOCK_M)), c.num_stages)


def block_sizes(spec: AttentionSpec, device: str, dtype: torch.dtype) -> tuple[int, int] | None:
    """(BLOCK_M, BLOCK_N) of the map of blocks that the kernel of ``spec`` walks over; None where it takes none."""
    source = kernel_for(spec).source
    d = spec.dims
    if not source.mapped or not (d.D.is_const and d.Dv.is_const):
        return None
    memory = shared_memory(torch.cuda.current_device()) if device == "cuda" else SHARED_MEMORY_SM90
    c = config(int(d.D.value), int(d.Dv.value), _MANY, dtype, memory, source.heavy)
    return c.BLOCK_M, c.BLOCK_N


def table_margin(spec: AttentionSpec) -> int:
    """See ``registry.Backend.table_margin``: these kernels read no further than there are distances."""
    return 0


@lru_cache(maxsize=64)
def shared_memory(index: int) -> int:
    """Bytes of shared memory that a block of threads may ask for on CUDA device ``index``."""
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


# ------------------------------------------------------------------------------------------------ the call


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: AttentionSpec,
    seed: int = 0,
    blocks: BlockMap | None = None,
    tables: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """The spec on q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv]: o [B, Hq, Sq, Dv] and lse [B, Hq, Sq].

    lse is in float32, natural logarithm, -inf on rows without a visible key. With ``spec.dropout``, ``seed`` in [0, 2**62) decides
    what is dropped. See ``refusal``; ``launch_backward`` has the gradients. ``blocks`` is the map of the spec's mask for the sizes
    that ``block_sizes`` gives; without it, it is worked out here where the mask needs one. ``tables`` as in ``materialise.load_tensors``.
    """
    reference.check_shapes(q, k, v, loads, spec)
    D, Dv = q.shape[3], v.shape[3]
    if max(D, Dv) > MAX_HEAD_DIM:
        raise AttnoptError(f"The Triton kernel has head sizes up to {MAX_HEAD_DIM}; D is {D} and Dv is {Dv}.")
    o = empty_output(q, v)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if o.numel() == 0 or k.shape[2] == 0:
        return o.zero_(), lse.fill_(-torch.inf)
    values = bind_sizes(spec, sizes, q, k, v)
    kernel = kernel_for(spec)
    on_gpu = q.device.type == "cuda"
    memory = shared_memory(q.device.index or 0) if on_gpu else SHARED_MEMORY_SM90
    c = config(D, Dv, q.shape[2], q.dtype, memory, kernel.source.heavy)
    if kernel.source.mapped:
        whole = config(D, Dv, _MANY, q.dtype, memory, kernel.source.heavy)
        if blocks is not None and (blocks.BLOCK_M, blocks.BLOCK_N) == (whole.BLOCK_M, whole.BLOCK_N):
            c = whole
        else:  # none, or one for another device or dtype: the tensors have moved since it was asked for
            blocks = block_map(spec.mask, loads, values, (*q.shape[:3], k.shape[2]), c.BLOCK_M, c.BLOCK_N, q.device)
    arguments = bind(kernel.source, spec, q, k, v, o, lse, loads, values, blocks, seed, tables)
    programs = -(-q.shape[2] // c.BLOCK_M) * q.shape[1] * q.shape[0]
    with torch.cuda.device(q.device) if on_gpu else contextlib.nullcontext():
        kernel.function[(programs,)](*arguments, **constants(D, Dv, c, q.dtype), num_warps=c.num_warps, num_stages=c.num_stages)
    if programs_of(spec).retries:
        fill_empty_rows(q, k, v, o, lse, loads, values, spec, seed, tables)
    return o, lse


def fill_empty_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    loads: Sequence[Tensor],
    sizes: Mapping[str, int],
    spec: AttentionSpec,
    seed: int = 0,
    tables: Sequence[Tensor] = (),
) -> None:
    """Writes the rows of o that a forward of any backend left without weights (lse -inf) where the spec has a score for them."""
    source = empty_rows.generate(spec)
    function = import_source(source.text).empty_rows
    on_gpu = q.device.type == "cuda"
    c = config(q.shape[3], v.shape[3], q.shape[2], q.dtype, shared_memory(q.device.index or 0) if on_gpu else SHARED_MEMORY_SM90, True)
    programs = -(-q.shape[2] // (c.BLOCK_M * empty_rows.TILES)) * q.shape[1] * q.shape[0]
    arguments = bind(source, spec, q, k, v, o, lse, loads, sizes, seed=seed, tables=tables)
    with torch.cuda.device(q.device) if on_gpu else contextlib.nullcontext():
        function[(programs,)](*arguments, **constants(q.shape[3], v.shape[3], c, q.dtype), num_warps=c.num_warps, num_stages=c.num_stages)


def constants(D: int, Dv: int, c: Config, dtype: torch.dtype) -> dict[str, Any]:
    """The values of the kernel's ``CONSTEXPRS``."""
    values = (D, Dv, power_of_two(D), power_of_two(Dv), c.BLOCK_M, c.BLOCK_N, "ieee" if dtype == torch.float32 else "tf32")
    return dict(zip(CONSTEXPRS, values, strict=True))


def bind(
    source: Source,
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    loads: Sequence[Tensor],
    sizes: Mapping[str, int],
    blocks: BlockMap | None = None,
    seed: int = 0,
    tables: Sequence[Tensor] = (),
) -> list[Any]:
    """The kernel's arguments, in the order of ``source.arguments``."""
    values = argument_values(spec, source.parts, {"Q": q, "K": k, "V": v, "O": o}, q, k, loads, sizes, tables)
    values.update(seed_words(seed), LSE=lse)
    if blocks is not None:
        values.update(zip((*MAP_TENSORS, *MAP_PLACES), (blocks.counts, blocks.indices, *blocks.places), strict=True))
    values.update({f"size{i}": sizes[name] for i, name in enumerate(source.sizes)})
    return [values[name] for name in source.arguments]


def argument_values(
    spec: AttentionSpec,
    parts: Sequence[Part],
    given: Mapping[str, Tensor],
    q: Tensor,
    k: Tensor,
    loads: Sequence[Tensor],
    sizes: Mapping[str, int],
    tables: Sequence[Tensor] = (),
) -> dict[str, Any]:
    """What every kernel may be given, by name: the tensors ``given`` and the loads, each with its strides, sizes and bounds."""
    shape = {"b": q.shape[0], "h": q.shape[1], "q": q.shape[2], "k": k.shape[2]}
    tensors = load_tensors(parts, shape, loads, sizes, q.device, tables=tables)
    values: dict[str, Any] = dict(given)
    for name, x in given.items():
        values.update({f"{name}_s{d}": n for d, n in enumerate(x.stride())})
    for slot, x in enumerate(tensors):
        values[f"L{slot}"] = x
        values.update({f"L{slot}_s{d}": n for d, n in enumerate(x.stride())})
        values.update({f"L{slot}_n{d}": n for d, n in enumerate(x.shape)})
    values.update(B=q.shape[0], Hq=q.shape[1], groups=q.shape[1] // k.shape[1], Sq=q.shape[2], Skv=k.shape[2])
    limits = bounds(spec, sizes)
    values.update(LEFT=limits.left, RIGHT=limits.right)
    return values
