"""Running generated Gluon kernels: their limits, TMA descriptors, the persistent grid."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import reference
from attnopt.kernels.block_map import BlockMap, block_map
from attnopt.kernels.codegen import unsupported
from attnopt.kernels.device import processors
from attnopt.kernels.evaluate import capturing
from attnopt.kernels.gluon.config import Config, config
from attnopt.kernels.gluon.flash_forward import Source, generate, is_even, reads
from attnopt.kernels.gluon.scores import RUNS
from attnopt.kernels.kept import Kept
from attnopt.kernels.materialise import Part, load_tensors, runs
from attnopt.kernels.programs import programs_of
from attnopt.kernels.tiling import bind_sizes, bounds, empty_output
from attnopt.kernels.triton.flash_forward import MAP_PLACES, MAP_TENSORS
from attnopt.kernels.triton.launch import bounds_words, fill_empty_rows, import_source
from attnopt.kernels.triton.launching import Form, form_of

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


def why(spec: AttentionSpec) -> str:
    """What the generated kernel does with ``spec``, in a few words."""
    limits = bounds_words(spec)
    return "generated Hopper flash forward" + (f", {limits}" if limits else "")


def block_sizes(spec: AttentionSpec, device: str, dtype: torch.dtype) -> tuple[int, int] | None:
    """(BLOCK_M, BLOCK_N) of the map of blocks that the kernel of ``spec`` walks over, the same for all it takes; None where it takes none."""
    D, Dv = spec.dims.D, spec.dims.Dv
    if not (D.is_const and Dv.is_const) or programs_of(spec).rest is E.TRUE:
        return None
    c = kernel_for(spec, int(D.value), int(Dv.value)).config
    return c.BLOCK_M, c.BLOCK_N


def table_margin(spec: AttentionSpec) -> int | None:
    """See ``registry.Backend.table_margin``: these kernels read whole tiles. Which reads a table has one size of them for all lengths."""
    D, Dv = spec.dims.D, spec.dims.Dv
    return kernel_for(spec, int(D.value), int(Dv.value)).source.margin if D.is_const and Dv.is_const else None


@dataclass(frozen=True)
class Kernel:
    source: Source
    config: Config
    function: Any
    """The jitted ``flash_forward``."""


@lru_cache(maxsize=1024)
def kernel_for(spec: AttentionSpec, D: int, Dv: int, Skv: int = 0, chosen: Config | None = None) -> Kernel:
    """The imported kernel of a spec and its head sizes. ``Skv``, which is good to know but need not be exact, helps to choose its configuration."""
    c = chosen or config(D, Dv, reads=reads(spec), even=is_even(spec), Skv=Skv)
    source = generate(spec, D, Dv, c)
    return Kernel(source, c, import_source(source.text).flash_forward)


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
    chosen: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """The spec on q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv]: o [B, Hq, Sq, Dv] and lse [B, Hq, Sq].

    lse is in float32, natural logarithm, -inf on rows without a visible key. Forward only, without dropout (``seed``). See ``refusal``.
    ``blocks`` is the map of the spec's mask for ``block_sizes``; without it, it is worked out here where the mask needs one.
    ``tables`` as in ``materialise.load_tensors``. ``chosen`` replaces the measured configuration.
    """
    key = (spec, chosen, tuple(sizes), form_of(q), form_of(k), form_of(v), *map(form_of, loads))
    call = _CALLS.get(key)
    if call is None:
        call = _CALLS[key] = Call.of(q, k, v, loads, sizes, spec, chosen)
    o = torch.empty_strided(call.size, call.strides, dtype=v.dtype, device=v.device)
    lse = torch.empty(call.size[:3], dtype=torch.float32, device=q.device)
    kernel = call.kernel
    if kernel is None:
        return o.zero_(), lse.fill_(-torch.inf)
    if any(call.copied):
        q, k, v = (x.clone(memory_format=torch.contiguous_format) if copied else x for x, copied in zip((q, k, v), call.copied, strict=True))
    source = kernel.source
    read = loads if call.as_they_are else load_tensors(source.parts, call.shape, loads, call.sizes, q.device, source.margin, tables)
    lists: tuple[Tensor, ...] = ()
    places: tuple[int, ...] = ()
    if source.mapped:
        c = kernel.config
        if blocks is None or (blocks.BLOCK_M, blocks.BLOCK_N) != (c.BLOCK_M, c.BLOCK_N):  # none, or one for another device: the tensors have moved
            blocks = block_map(spec.mask, loads, call.sizes, (*q.shape[:3], k.shape[2]), c.BLOCK_M, c.BLOCK_N, q.device)
        lists, places = (blocks.counts, blocks.indices), blocks.places
    if source.level is not None:
        lists += (call.runs_of(source.level, q.device),)
    forms = (places, *[x.data_ptr() % 16 for x in lists], *map(form_of, read[len(loads) :]))
    plan = call.plans.get(forms)
    if plan is None:
        plan = call.plans[forms] = plan_for(kernel, spec, call.sizes, places, *map(form_of, (q, k, v, o, *read)))
    plan.launch(plan.arguments((q, k, v, o), lse, read, lists), q.device)
    if call.retries:
        fill_empty_rows(q, k, v, o, lse, loads, call.sizes, spec, tables=tables)
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
    copied: tuple[bool, ...]
    """Of q, k and v, those that TMA does not take as they lie."""
    as_they_are: bool
    """Whether the kernel reads the loads alone, and none of booleans."""
    retries: bool
    plans: dict[Any, Plan] = field(default_factory=dict)
    """By the forms of what is made for each call: the places in a map of blocks, and tables."""
    found_runs: Tensor | None = None

    def runs_of(self, level: Part, device: torch.device) -> Tensor:
        """Those of the table that the kernel reads where it changes, which are the same in every call; inside of a CUDA graph's capture made there."""
        if capturing(device):
            return runs(level, self.shape, self.sizes, device)
        if self.found_runs is None:
            self.found_runs = runs(level, self.shape, self.sizes, device)
        return self.found_runs

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec, chosen: Config | None) -> Call:
        reference.check_shapes(q, k, v, loads, spec)
        o = empty_output(q, v)
        shape = {"b": q.shape[0], "h": q.shape[1], "q": q.shape[2], "k": k.shape[2]}
        if o.numel() == 0 or k.shape[2] == 0:
            return Call(tuple(o.shape), o.stride(), None, shape, {}, (), True, False)
        kernel = kernel_for(spec, q.shape[3], v.shape[3], 1 << k.shape[2].bit_length(), chosen)
        as_they_are = not kernel.source.parts and all(x.dtype != torch.bool for x in loads)
        values, copied = bind_sizes(spec, sizes, q, k, v), tuple(not _tma_reads(x) for x in (q, k, v))
        return Call(tuple(o.shape), o.stride(), kernel, shape, values, copied, as_they_are, programs_of(spec).retries)


_CALLS: Kept[Any, Call] = Kept(1024)


@dataclass
class Plan:
    """What calls with tensors of the same forms have in common: all but the tensors. A launch from it costs the host little."""

    kernel: Kernel
    grid: Grid
    boxes: tuple[tuple[int, Any], ...]
    """For each descriptor: which of q, k, v and o it is of, and a descriptor of such a tensor."""
    strides: tuple[int, ...]
    numbers: tuple[int, ...]
    used: tuple[int, ...]
    """The load slots that the kernel reads."""
    compiled: Any = field(default=None, repr=False)

    def arguments(self, operands: Sequence[Tensor], lse: Tensor, read: Sequence[Tensor], lists: Sequence[Tensor]) -> list[Any]:
        """The kernel's arguments, in the order of ``source.arguments``."""
        boxes = [_moved(box, operands[i]) for i, box in self.boxes]
        return [*boxes, lse, *(read[i] for i in self.used), *self.strides, *lists, *self.numbers]

    def launch(self, arguments: list[Any], device: torch.device) -> None:
        knobs, driver = _triton()
        compiled, current = self.compiled, torch.cuda.current_device()
        if device.index not in (None, current):
            with torch.cuda.device(device):
                self.launch(arguments, device)
            return
        if compiled is None or _watched(knobs.launch_enter_hook) or _watched(knobs.launch_exit_hook):
            self.compiled = self.kernel.function[(self.grid.workers,)](*arguments, num_warps=4, maxnreg=self.kernel.config.registers_at_launch)
            return
        # what Triton does behind its own look-up of the compiled kernel, which takes longer than all else here
        stream = driver.active.get_current_stream(current)
        compiled.run(self.grid.workers, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


@lru_cache(maxsize=1)
def _triton() -> tuple[Any, Any]:
    """Its switches at run time, and its driver."""
    from triton import knobs
    from triton.runtime import driver

    return knobs.runtime, driver


def _watched(hook: Any) -> bool:
    """Whether a profiler wants to know of launches."""
    return bool(getattr(hook, "calls", hook))


def plan_for(kernel: Kernel, spec: AttentionSpec, sizes: Mapping[str, int], places: tuple[int, ...], q: Form, k: Form, v: Form, o: Form, *read: Form) -> Plan:
    """The plan of calls with tensors of these forms. ``sizes`` and ``places`` as in ``attention``."""
    source = kernel.source
    (B, Hq, Sq, _), Hkv, Skv = q[0], k[0][1], k[0][2]
    grid = Grid.of(kernel, B * Hq, Sq, processors(q[3].index or 0))
    forms = {"q": q, "k": k, "v": v, "o": o}
    boxes = tuple(("qkvo".index(tensor), descriptor(forms[tensor], rows, columns)) for _, tensor, rows, columns in source.descriptors)
    known: dict[str, int] = {"total": grid.total, "tiles": grid.tiles, "late": grid.late, "Hq": Hq, "groups": Hq // Hkv, "Sq": Sq, "Skv": Skv}
    for slot, (shape, strides, *_) in enumerate(read):
        known.update({f"L{slot}_s{d}": n for d, n in enumerate(strides)})
        known.update({f"L{slot}_n{d}": n for d, n in enumerate(shape)})
    if source.mapped:
        known.update(zip(MAP_PLACES, places, strict=True))
    limits = bounds(spec, sizes)
    known.update({name: n for name, n in (("LEFT", limits.left), ("RIGHT", limits.right)) if n is not None})
    known.update({f"size{i}": sizes[name] for i, name in enumerate(source.sizes)})
    names = source.arguments[len(boxes) + 1 :]
    loads = {f"L{slot}": slot for slot in range(len(read))}
    used = tuple(loads[n] for n in names if n in loads)
    numbers = [known[n] for n in names if n not in (*MAP_TENSORS, RUNS, *loads)]
    strides_of_loads = sum("_s" in n for n in names)
    return Plan(kernel, grid, boxes, tuple(numbers[:strides_of_loads]), tuple(numbers[strides_of_loads:]), used)


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
    def of(kernel: Kernel, heads: int, Sq: int, processors: int) -> Grid:
        tiles = -(-Sq // kernel.config.BLOCK_M)
        # with a multiprocessor for each tile there is nothing to even out
        late = (tiles + 1) // 2 if kernel.source.uneven and heads * tiles > processors else tiles
        return Grid(tiles, late, heads * tiles, min(processors, heads * late))


def _tma_reads(x: Tensor) -> bool:
    """Whether TMA takes the tensor as it lies: rows contiguous, everything aligned to 16 bytes."""
    size = x.element_size()
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(n == 1 or (s > 0 and s * size % 16 == 0) for s, n in zip(x.stride()[:3], x.shape, strict=False))


@lru_cache(maxsize=256)
def layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype])


def descriptor(form: Form, rows: int, columns: int) -> Any:
    """TMA's view of a tensor [B, H, S, D] of this form in boxes of rows x columns of one head, without its memory (see ``_moved``)."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    shape, found, dtype, *_ = form
    # an axis of one element may have any stride; TMA wants one that is a multiple of 16 bytes
    strides = [s if n > 1 else 8 for s, n in zip(found[:3], shape, strict=False)] + [1]
    stand_in = torch.empty(0, dtype=dtype)
    return TensorDescriptor(stand_in, list(shape), strides, [1, 1, rows, columns], layout(rows, columns, dtype))


def _moved(box: Any, x: Tensor) -> Any:
    """A descriptor like ``box`` of the memory of ``x``. Its checks were made when ``box`` was; alignment is part of a form."""
    out = object.__new__(type(box))
    out.__dict__.update(box.__dict__, base=x)
    return out
