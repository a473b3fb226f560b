"""Running the generated kernels of attention over a paged cache: what they refuse, block sizes, the number of splits, the launch.

Everything here follows from shapes, so nothing waits for the device, and a CUDA graph can hold the launch. What follows from them is worked out once, as a
``Plan``: a call of a shape that was seen before only puts its tensors in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from attnopt.kernels.kept import Kept
from attnopt.kernels.materialise import load_tensors
from attnopt.kernels.paged_checks import description
from attnopt.kernels.paged_choice import CacheSetting
from attnopt.kernels.paged_reference import request_sizes
from attnopt.kernels.programs import programs_of
from attnopt.kernels.tiling import Bounds, bounds, cached_key_range
from attnopt.kernels.triton.flash_forward import Source
from attnopt.kernels.triton.halves import PACKED
from attnopt.kernels.triton.launch import DTYPES, SHARED_MEMORY_SM90, available, import_source, power_of_two, shared_memory
from attnopt.kernels.triton.launching import Launch, interpreted, is_elsewhere
from attnopt.kernels.triton.paged import CONSTEXPRS, generate, lengths_of, request_spec

MAX_HEAD_DIM = 576
MAX_VALUE_DIM = 512
LEAST_PAGE = 16
MOST_PROGRAMS_EACH = 3
"""Programs of four warps that a multiprocessor holds at a time, where shared memory has room: at the 168 registers that heads of 128 take there are no more."""
INTERPRETED_PROCESSORS = 4
"""Under the interpreter there are none to count: as many as make small tests split."""
LEAST_BLOCKS = 2
"""Blocks of keys that are worth a program of their own: the first waits for the page table."""
FEW_BLOCKS = 8
"""With no more of them for one program on each multiprocessor, more programs gain nothing, as there is more to join. At 8192 keys for 8 heads on an H100 (benchmarks/decode.py) 16
splits of 8 blocks take 18.8 us, 43 of 3 took 20.4. Not so with 8-bit caches, whose programs compute more for each key: 20.4 us against 17.1."""
NEARLY_ALL = 0.75
"""Of the multiprocessors, so many are enough where each reads a contiguous cache in one program (``splits``): of 132, 104 take 147.8 us and three programs for each tile 154.8, but 72
take 4% more than two rounds do (benchmarks/decode_sweep.py, 13 and 9 requests of 8192 keys)."""
LONG = 2048
"""Keys from which on ``for_many_tiles`` counts: before, a program's first keys, for which nothing else on its multiprocessor computes, are too large a part of its time."""


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
def kernel_for(spec: AttentionSpec, cache: str = "") -> Kernel:
    """``cache`` as in ``paged.generate``."""
    source = generate(spec, cache)
    return Kernel(source, import_source(source.text), programs_of(request_spec(spec)).folded)


@dataclass(frozen=True)
class Config:
    """Block sizes, and Triton's launch options. A tile is HEADS heads times BLOCK_Q queries, in BLOCK_M rows."""

    BLOCK_M: int
    BLOCK_N: int
    HEADS: int
    num_warps: int
    num_stages: int
    one_query: bool = False
    """A tile is of one token, though more of them had room: then tokens and tiles are one, where every request has one token."""

    @property
    def BLOCK_Q(self) -> int:
        return 1 if self.one_query else self.BLOCK_M // self.HEADS


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
    return Config(BLOCK_M, BLOCK_N, min(groups, BLOCK_M), warps, stages, queries == 1)


def for_many_tiles(c: Config, D: int, Dv: int, element: int, keys: int, memory: int) -> Config:
    """``c``, for tiles of ``keys`` keys of a contiguous cache, of which each multiprocessor has at least two to compute: larger blocks, of which only one program has room on it.

    Programs of one multiprocessor then read one stretch of memory instead of three. 64 x 8192 keys on an H100 (benchmarks/decode_sweep.py): 695.6 us against 720.5, cuDNN 697.4.
    For what was measured alone: heads of 128 in half precision, one query.
    """
    measured = c.one_query and c.BLOCK_M == 16 and D == Dv == 128 and element == 2 and memory >= 200 * 1024
    return replace(c, BLOCK_N=128) if measured and keys >= LONG else c


def for_bytes(c: Config, D: int, Dv: int, tiles: float, memory: int) -> Config:
    """``c``, for 8-bit caches that are read as words, ``tiles`` of them for each multiprocessor: a block of twice the keys has as many bytes as one in half precision. 16 x 8192 keys
    on an H100 (benchmarks/decode_sweep.py): 105.0 us against 112.0, 64 x 8192: 398 against 415, 1 x 8192: 14.4 against 16.6. For what was measured alone: heads of 128, one query, and
    fewer tiles than are not split any more.
    """
    measured = c.one_query and c.BLOCK_M == 16 and D == Dv == 128 and memory >= 200 * 1024
    return replace(c, BLOCK_N=128) if measured and tiles < 4 else c


def head_parts(D: int) -> tuple[int, int]:
    """Two block sizes that make up D, powers of two, the second 0 where the first is enough: 576 is 512 and 64."""
    first = power_of_two(D)
    if first == D or D < 16:
        return first, 0
    return first // 2, power_of_two(D - first // 2)


def programs_each(c: Config, D: int, Dv: int, element: int, memory: int) -> int:
    """How many programs a multiprocessor with ``memory`` bytes of shared memory holds. Each keeps blocks of keys and values of ``element`` bytes in flight there, and queries and
    weights; tall tiles, whose products are asynchronous, one block more. Blocks of 128 keys in bytes take some 200 registers, which is one program less.
    """
    blocks = c.num_stages if c.BLOCK_M >= 64 else max(1, c.num_stages - 1)
    taken = blocks * c.BLOCK_N * (D + Dv) * element + c.BLOCK_M * (D + c.BLOCK_N) * 2 + 1024
    most = MOST_PROGRAMS_EACH - (element == 1 and c.BLOCK_N >= 128)
    return max(1, min(most * 4 // c.num_warps, memory // taken))


@lru_cache(maxsize=4096)
def splits(programs: int, blocks: int, room: int, processors: int, contiguous: bool = False, least: int = 1) -> int:
    """How many programs share the keys of a tile, where there are ``programs`` tiles of at most ``blocks`` blocks of keys, and the device holds ``room`` programs on its
    ``processors`` (0: one program on each is never enough).

    The least number that fills the device about as well as any: whole rounds of programs, without a nearly empty last one, in which few programs would have to ask for all
    that memory can give. From two rounds on that hardly matters, and none are split. Never a split that gets no block.

    One program on each multiprocessor is enough for few blocks (``FEW_BLOCKS``), and over a contiguous cache, whose next keys do not wait for a page, for any number, where nearly all
    multiprocessors get one: of 8 tiles of 131072 keys on an H100 16 splits take 178.9 us and 47 took 184.9, of 128 of 8192 one takes 173.7 us and 3 took 186.7. In pages of 16 it is
    not: 197 us, and 190 with 3 (benchmarks/decode_sweep.py).

    ``least``: no fewer, where there are less than two rounds of tiles.
    """

    def whole(n: int) -> int:
        return -(-blocks // -(-blocks // n))

    def filled(n: int) -> float:
        rounds = programs * n / room
        return rounds / math.ceil(rounds)

    if programs >= 2 * room:
        return 1
    each = processors // programs
    enough = blocks <= FEW_BLOCKS * each or (contiguous and programs * each >= NEARLY_ALL * processors)
    most = each if each and enough else room
    most = max(1, min(blocks // LEAST_BLOCKS, most))
    tried = sorted({whole(n) for n in range(min(least, most), most + 1)})
    best = max(map(filled, tried))
    return next(n for n in tried if filled(n) >= 0.95 * best)


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
    plans: dict[Any, Plan] | None = None,
) -> Tensor:
    """``attnopt::paged_attention`` by the generated kernels. ``chosen`` and ``num_splits`` replace what ``config`` and ``splits`` say.

    ``plans``: those of earlier calls of the same spec and ``paged_checks.description``, where the caller keeps them.
    """
    if plans is None:
        described = (spec, description(sizes, q, k_cache, v_cache, block_table, cu_seqlens_q, seqlens_k, k_scale, v_scale, *loads))
        plans = _PLANS.get(described)
        if plans is None:
            plans = _PLANS[described] = {}
    # what Triton compiles for depends on whether addresses are multiples of 16
    k_at, v_at = k_cache.data_ptr(), v_cache.data_ptr()
    key = (k_at % 16, v_at % 16, k_at == v_at, chosen, num_splits, *[x.data_ptr() % 16 for x in (q, block_table, cu_seqlens_q, seqlens_k, *loads)])
    tensors = {"Q": q, "K": k_cache, "V": v_cache, "TABLE": block_table, "STARTS": cu_seqlens_q.contiguous(), "LENGTHS": seqlens_k.contiguous()}
    if k_scale is not None and v_scale is not None:
        tensors |= {"K_SCALE": k_scale, "V_SCALE": v_scale}
        key += (k_scale.data_ptr() % 16, v_scale.data_ptr() % 16)
    plan = plans.get(key)
    if plan is None:
        if 0 in (*q.shape[:2], v_cache.shape[3], k_cache.shape[0], block_table.numel()):
            return torch.zeros((*q.shape[:2], v_cache.shape[3]), dtype=q.dtype, device=q.device)
        plan = plans[key] = Plan.of(tensors, loads, sizes, spec, chosen, num_splits)
    return plan.run(tensors, loads)


_PLANS: Kept[Any, dict[Any, Plan]] = Kept(4096)


@dataclass
class Plan:
    """The launches for calls of one shape."""

    source: Source
    device: torch.device
    shape: dict[str, int]
    sizes: dict[str, int]
    words: bool
    """Whether the caches are read as words of two numbers."""
    size: tuple[int, int, int]
    """Of the output."""
    dtype: torch.dtype
    part: tuple[int, int] | None
    """How many numbers the splits leave: sums, and their weights' logarithms; None where there are none."""
    forward: Launch
    reduction: Launch | None

    @staticmethod
    def of(
        tensors: dict[str, Tensor], loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec, chosen: Config | None, num_splits: int | None
    ) -> Plan:
        q, k_cache, v_cache, table = (tensors[x] for x in ("Q", "K", "V", "TABLE"))
        T, Hq, D = q.shape
        _, page_size, Hkv, Dv = v_cache.shape
        R, columns = table.shape
        capacity, groups = columns * page_size, Hq // Hkv
        on_gpu, index = q.device.type == "cuda", q.device.index or 0
        quantized = "K_SCALE" in tensors
        spec = request_spec(spec)
        values = request_sizes(spec, sizes, q, k_cache, v_cache, R, capacity)
        limits = bounds(spec, values)
        memory = shared_memory(index) if on_gpu else SHARED_MEMORY_SM90
        one_load = shares(k_cache, v_cache)
        c = chosen or config(D, Dv, groups, -(-T // R), q.dtype, memory, one_load)
        cache = packing(q.dtype, k_cache, v_cache, one_load) if quantized else ""
        words = as_words(k_cache, v_cache) if cache in PACKED else {}
        kernel = kernel_for(spec, cache)
        BLOCK_Q, lanes = c.BLOCK_Q, Hkv * -(-groups // c.HEADS)
        tiles = T if BLOCK_Q == 1 else T // BLOCK_Q + R + 1
        likely = (R + (T - R) // BLOCK_Q if T > R else T) * lanes
        many = processors(index) if on_gpu else INTERPRETED_PROCESSORS
        walked = reach(limits, chunk(spec.mask), BLOCK_Q, capacity)
        contiguous = columns == 1 and not quantized
        if chosen is None and contiguous and likely >= 2 * many:
            c = for_many_tiles(c, D, Dv, q.element_size(), walked, memory)
        if chosen is None and words:
            c = for_bytes(c, D, Dv, likely / many, memory)
        if num_splits is None:
            each = programs_each(c, D, 0 if one_load else Dv, k_cache.element_size(), memory)
            # tiles of bytes that do not all run at once: a second round of long programs would end one by one (64 x 8192 keys: 467 us, halves of them 398)
            least = 2 if words and likely > each * many else 1
            num_splits = splits(likely, -(-walked // c.BLOCK_N), each * many, 0 if quantized else many, contiguous, least)
        split = num_splits > 1
        pdl = on_gpu and capability() >= (9, 0)
        early = {"launch_pdl": True} if pdl else {}
        shape = {"b": R, "h": Hq, "q": capacity, "k": capacity}
        arguments = bind(kernel.source, spec, tensors | words, load_tensors(kernel.source.parts, shape, loads, values, q.device), len(loads))
        arguments |= {f"size{i}": values[name] for i, name in enumerate(kernel.source.sizes)}
        arguments |= {"T": T, "R": R, "Hkv": Hkv, "SPLITS": num_splits, "STEP": num_splits * c.BLOCK_N, "LEFT": limits.left, "RIGHT": limits.right, "POSITIONS": capacity}
        arguments |= {"O_s0": Hq * Dv, "O_s1": Dv, "O_s2": 1}
        fixed = constants(D, Dv, groups, R, 0 if columns == 1 else page_size, split, one_load, c, q.dtype, pdl, pdl)
        options = {"num_warps": c.num_warps, "num_stages": c.num_stages, **early}
        forward = Launch(kernel.module.paged_forward, kernel.source.arguments, arguments, fixed, options, (tiles * lanes * num_splits,))
        reduction = None
        if split:
            names = ("PART", "LSE", "O", "O_s0", "O_s1", "O_s2", "Hq", "SPLITS")
            fixed = reduction_constants(Dv, num_splits, kernel.folded, pdl)
            reduction = Launch(kernel.module.paged_reduce, names, {**arguments, "Hq": Hq}, fixed, {"num_warps": 4, **early}, (T * Hq,))
        weights = T * Hq * num_splits
        part = (weights * Dv, weights) if split else None
        return Plan(kernel.source, q.device, shape, values, bool(words), (T, Hq, Dv), q.dtype, part, forward, reduction)

    def run(self, tensors: dict[str, Tensor], loads: Sequence[Tensor]) -> Tensor:
        """The output. ``tensors`` by the kernel's names are completed in place."""
        o = tensors["O"] = torch.empty(self.size, dtype=self.dtype, device=self.device)
        if loads or self.source.parts:
            tensors.update((f"L{i}", x) for i, x in enumerate(load_tensors(self.source.parts, self.shape, loads, self.sizes, self.device)))
        if self.words:
            tensors |= as_words(tensors["K"], tensors["V"])
        if self.part is None:
            tensors["PART"] = tensors["LSE"] = o
        else:  # one piece of memory, and one call for it
            tensors["PART"], tensors["LSE"] = torch.empty(self.part[0] + self.part[1], dtype=torch.float32, device=self.device).split_with_sizes(self.part)
        if is_elsewhere(self.device):
            with torch.cuda.device(self.device):
                self._launch(tensors)
        else:
            self._launch(tensors)
        return o

    def _launch(self, tensors: dict[str, Tensor]) -> None:
        self.forward.run(tensors)
        if self.reduction is not None:
            self.reduction.run(tensors)


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


def packing(dtype: torch.dtype, k_cache: Tensor, v_cache: Tensor, one_load: bool) -> str:
    """How a quantized cache is read for queries of ``dtype``: as words of two numbers, of the ``PACKED`` kind of its dtype, where two blocks of halves can be made of
    its heads, and otherwise number by number (``scaled``)."""
    whole = all(
        x.shape[3] % 2 == 0 and power_of_two(x.shape[3]) >= 32 and x.stride(3) == 1 and not any(n % 2 for n in (x.data_ptr(), *x.stride()[:3]))
        for x in (k_cache, v_cache)
    )
    if one_load or not whole or head_parts(k_cache.shape[3])[1] or dtype not in (torch.float16, torch.bfloat16):
        return "scaled"
    return "int8" if k_cache.dtype == torch.int8 else "fp8"


def as_words(k_cache: Tensor, v_cache: Tensor) -> dict[str, Tensor]:
    return {"K": k_cache.view(torch.int16), "V": v_cache.view(torch.int16)}


def constants(
    D: int, Dv: int, groups: int, R: int, page: int, split: bool, shared: bool, c: Config, dtype: torch.dtype, pdl: bool = False, asm: bool = False
) -> dict[str, Any]:
    """The values of the kernel's ``CONSTEXPRS``. ``page`` is 0 where each request has one; with ``pdl`` (programmatic dependent launch, sm_90) it is launched before the kernel
    in front of it ends, and waits for that; with ``asm`` words of two numbers are taken apart in PTX."""
    BLOCK_R = max(128, power_of_two(R + 1))
    parts = head_parts(D)
    precision = "ieee" if dtype == torch.float32 else "tf32"
    values = (D, Dv, groups, c.HEADS, *parts, power_of_two(Dv), c.BLOCK_M, c.BLOCK_N, c.BLOCK_Q, BLOCK_R, page, split, shared, pdl, asm, precision)
    return dict(zip(CONSTEXPRS, values, strict=True))


def reduction_constants(Dv: int, num_splits: int, folded: bool, pdl: bool) -> dict[str, Any]:
    """Of ``paged_reduce``. As many splits at once as there are, up to what the registers of four warps hold."""
    BLOCK_DV = power_of_two(Dv)
    return {"DV": Dv, "BLOCK_DV": BLOCK_DV, "BLOCK_S": max(1, min(power_of_two(num_splits), 4096 // BLOCK_DV)), "FOLDED": folded, "PDL": pdl}


def bind(source: Source, spec: AttentionSpec, tensors: dict[str, Tensor], read: Sequence[Tensor], given: int) -> dict[str, Any]:
    """The strides and extents of tensors and loads by the names of the kernel's arguments. ``given`` of the loads are the spec's, the others tables."""
    for i, x in enumerate(read):
        if x.numel() == 0:
            raise AttnoptError(f"{spec.loads[i].name if i < given else 'A table'} {tuple(x.shape)} is empty, and this attention reads it.")
    values: dict[str, Any] = {}
    for name, x in (*tensors.items(), *((f"L{i}", x) for i, x in enumerate(read))):
        values.update({f"{name}_s{d}": n for d, n in enumerate(x.stride())})
        values.update({f"{name}_n{d}": n for d, n in enumerate(x.shape)})
    return values
