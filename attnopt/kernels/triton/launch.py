"""Running generated kernels: writes their source to the cache, imports it, picks block sizes, launches."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from attnopt.kernels.kept import Kept
from attnopt.kernels.materialise import load_tensors, materialise
from attnopt.kernels.programs import programs_of
from attnopt.kernels.tiling import bind_sizes, bounds, empty_output
from attnopt.kernels.triton import empty_rows
from attnopt.kernels.triton.dropout import seed_words
from attnopt.kernels.triton.flash_forward import CONSTEXPRS, MAP_PLACES, MAP_TENSORS, Source, generate
from attnopt.kernels.triton.launching import Launch, form_of, interpreted, is_elsewhere

MAX_HEAD_DIM = 256
SHARED_MEMORY_SM90 = 227 * 1024
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MANY = 1 << 20
"""More queries than any block has."""


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
    key = (spec, tuple(sizes), form_of(q), form_of(k), form_of(v), *map(form_of, loads))
    call = _CALLS.get(key)
    if call is None:
        call = _CALLS[key] = Call.of(q, k, v, loads, sizes, spec)
    o = torch.empty_strided(call.size, call.strides, dtype=v.dtype, device=v.device)
    lse = torch.empty(call.size[:3], dtype=torch.float32, device=q.device)
    if call.kernel is None:
        return o.zero_(), lse.fill_(-torch.inf)
    c, source = call.own, call.kernel.source
    tensors: dict[str, Any] = {"Q": q, "K": k, "V": v, "O": o, "LSE": lse}
    places: tuple[int, ...] = ()
    if source.mapped:
        if blocks is not None and (blocks.BLOCK_M, blocks.BLOCK_N) == (call.whole.BLOCK_M, call.whole.BLOCK_N):
            c = call.whole
        else:  # none, or one for another device or dtype: the tensors have moved since it was asked for
            blocks = block_map(spec.mask, loads, call.sizes, (*q.shape[:3], k.shape[2]), c.BLOCK_M, c.BLOCK_N, q.device)
        places = (*blocks.places, blocks.counts.data_ptr() % 16, blocks.indices.data_ptr() % 16)
        tensors |= zip(MAP_TENSORS, (blocks.counts, blocks.indices), strict=True)
    read = loads if call.as_they_are else load_tensors(source.parts, call.shape, loads, call.sizes, q.device, tables=tables)
    if spec.dropout:
        tensors |= seed_words(seed)
    forms = (c, places, *map(form_of, read[len(loads) :]))
    launch = call.launches.get(forms)
    if launch is None:
        programs = -(-q.shape[2] // c.BLOCK_M) * q.shape[1] * q.shape[0]
        launch = call.launches[forms] = launch_for(source, call.kernel.function, spec, tensors, read, call.sizes, c, programs, places[: len(MAP_PLACES)])
    tensors.update((f"L{i}", x) for i, x in enumerate(read))
    launch_on(q.device, launch, tensors)
    if call.retries:
        fill_empty_rows(q, k, v, o, lse, loads, call.sizes, spec, seed, tables)
    return o, lse


@dataclass
class Call:
    """What calls with q, k, v and loads of the same forms have in common, worked out at the first."""

    size: tuple[int, ...]
    """Of the output, and its strides: [B, Hq, Sq, Dv], laid out in memory as [B, Sq, Hq, Dv]."""
    strides: tuple[int, ...]
    kernel: Kernel | None
    """None where there is nothing to compute."""
    shape: dict[str, int]
    sizes: dict[str, int]
    own: Config
    whole: Config
    """That of a map of blocks for any number of queries."""
    as_they_are: bool
    """Whether the kernel reads the loads alone, and none of booleans."""
    retries: bool
    launches: dict[Any, Launch] = field(default_factory=dict)
    """By what is made for each call: the sizes of blocks, the places in their map, and the forms of tables."""

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec) -> Call:
        reference.check_shapes(q, k, v, loads, spec)
        D, Dv = q.shape[3], v.shape[3]
        if max(D, Dv) > MAX_HEAD_DIM:
            raise AttnoptError(f"The Triton kernel has head sizes up to {MAX_HEAD_DIM}; D is {D} and Dv is {Dv}.")
        o = empty_output(q, v)
        shape = {"b": q.shape[0], "h": q.shape[1], "q": q.shape[2], "k": k.shape[2]}
        kernel = None if o.numel() == 0 or k.shape[2] == 0 else kernel_for(spec)
        heavy = kernel is not None and kernel.source.heavy
        own, whole = (config(D, Dv, n, q.dtype, memory_of(q.device), heavy) for n in (max(q.shape[2], 1), _MANY))
        as_they_are = kernel is not None and not kernel.source.parts and all(x.dtype != torch.bool for x in loads)
        values = bind_sizes(spec, sizes, q, k, v)
        return Call(tuple(o.shape), o.stride(), kernel, shape, values, own, whole, as_they_are, programs_of(spec).retries)


_CALLS: Kept[Any, Call] = Kept(1024)


def memory_of(device: torch.device) -> int:
    """Bytes of shared memory of a block of threads on this device; on a CPU those of the GPU that the interpreter stands for."""
    return shared_memory(device.index or 0) if device.type == "cuda" else SHARED_MEMORY_SM90


def launch_on(device: torch.device, launch: Launch, tensors: Mapping[str, Any]) -> None:
    """Triton launches on the current device."""
    if is_elsewhere(device):
        with torch.cuda.device(device):
            launch.run(tensors)
    else:
        launch.run(tensors)


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
    shape = {"b": q.shape[0], "h": q.shape[1], "q": q.shape[2], "k": k.shape[2]}
    read = load_tensors(source.parts, shape, loads, sizes, q.device, tables=tables)
    tensors: dict[str, Any] = {"Q": q, "K": k, "V": v, "O": o, "LSE": lse}
    key = (spec, tuple(sizes.items()), *map(form_of, (q, k, v, o, *read)))
    launch = _REFILLS.get(key)
    if launch is None:
        c = config(q.shape[3], v.shape[3], q.shape[2], q.dtype, memory_of(q.device), True)
        programs = -(-q.shape[2] // (c.BLOCK_M * empty_rows.TILES)) * q.shape[1] * q.shape[0]
        launch = _REFILLS[key] = launch_for(source, import_source(source.text).empty_rows, spec, tensors, read, sizes, c, programs)
    tensors.update((f"L{i}", x) for i, x in enumerate(read))
    if spec.dropout:
        tensors |= seed_words(seed)
    launch_on(q.device, launch, tensors)


_REFILLS: Kept[Any, Launch] = Kept(1024)


def launch_for(
    source: Source,
    function: Any,
    spec: AttentionSpec,
    tensors: Mapping[str, Tensor],
    read: Sequence[Tensor],
    sizes: Mapping[str, int],
    c: Config,
    programs: int,
    places: Sequence[int] = (),
) -> Launch:
    """A launch of ``programs`` programs for tensors of the forms of these: everything that comes with a call, a dropout's seed too, left out."""
    q, k, v = tensors["Q"], tensors["K"], tensors["V"]
    values = argument_values(spec, {name: tensors[name] for name in "QKVO"}, read, q, k, sizes)
    values.update(zip(MAP_PLACES, places, strict=False))  # none without a map
    values.update({f"size{i}": sizes[name] for i, name in enumerate(source.sizes)})
    numbers = {name: values[name] for name in source.arguments if name in values and not isinstance(values[name], Tensor)}
    fixed = constants(q.shape[3], v.shape[3], c, q.dtype)
    return Launch(function, source.arguments, numbers, fixed, {"num_warps": c.num_warps, "num_stages": c.num_stages}, (programs,))


def constants(D: int, Dv: int, c: Config, dtype: torch.dtype) -> dict[str, Any]:
    """The values of the kernel's ``CONSTEXPRS``."""
    values = (D, Dv, power_of_two(D), power_of_two(Dv), c.BLOCK_M, c.BLOCK_N, "ieee" if dtype == torch.float32 else "tf32")
    return dict(zip(CONSTEXPRS, values, strict=True))


def argument_values(
    spec: AttentionSpec, given: Mapping[str, Tensor], read: Sequence[Tensor], q: Tensor, k: Tensor, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """What every kernel may be given, by name: the tensors ``given`` and those of the load slots, each with its strides, sizes and bounds."""
    values: dict[str, Any] = dict(given)
    for name, x in given.items():
        values.update({f"{name}_s{d}": n for d, n in enumerate(x.stride())})
    for slot, x in enumerate(read):
        values[f"L{slot}"] = x
        values.update({f"L{slot}_s{d}": n for d, n in enumerate(x.stride())})
        values.update({f"L{slot}_n{d}": n for d, n in enumerate(x.shape)})
    values.update(B=q.shape[0], Hq=q.shape[1], groups=q.shape[1] // k.shape[1], Sq=q.shape[2], Skv=k.shape[2])
    limits = bounds(spec, sizes)
    values.update(LEFT=limits.left, RIGHT=limits.right)
    return values
