"""Runs generated Gluon kernels on the CPU: every block of threads in turn, its warpgroups and its producer as threads that meet at barriers.

Triton's interpreter does not know Gluon. This one knows as much of it as ``attnopt.kernels.gluon`` writes: barriers with phases, copies that
complete on them, matrix products in float32, and element-wise arithmetic by PyTorch. It finds wrong arithmetic, wrong phases and deadlocks;
it knows nothing of layouts and asynchrony within a warpgroup.
"""

from __future__ import annotations

import builtins
import re
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

WAIT_SECONDS = 60.0
_local = threading.local()


class Deadlock(AssertionError):
    """A barrier was waited for in vain."""


class Barrier:
    """An mbarrier: a phase completes when all arrivals and all bytes that it expects have come."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.count = self.pending = self.bytes = self.phase = 0
        self.broken = False

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int = 1) -> None:
        with self.condition:
            self.pending -= count
            assert self.pending >= 0, "a barrier was arrived at more often than it expects"
            self._complete()

    def expect(self, size: int) -> None:
        with self.condition:
            self.bytes += size
            self.pending -= 1
            assert self.pending >= 0, "a barrier was arrived at more often than it expects"

    def landed(self, size: int) -> None:
        with self.condition:
            self.bytes -= size
            self._complete()

    def _complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            self.condition.notify_all()

    def wait(self, parity: int) -> None:
        with self.condition:
            # passes when the phase of this parity is over: the one under way has the other parity
            if not self.condition.wait_for(lambda: self.broken or self.phase % 2 != parity, WAIT_SECONDS) or self.broken:
                raise Deadlock(f"a barrier in phase {self.phase} was waited for with parity {parity}")


class Shared:
    """Shared memory: a tensor, or a view of one."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < self.data.shape[0], f"buffer {int(i)} of {self.data.shape[0]}"
        return Shared(self.data[int(i)])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(list(shape)))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def load(self, layout: Any) -> Any:
        return _value(self.data.clone())

    def store(self, x: Tensor) -> None:
        self.data.copy_(x)


class Barriers:
    def __init__(self, n: int) -> None:
        self.all = [Barrier() for _ in range(n)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


class Descriptor:
    """What TMA sees of a tensor [B, H, S, D]: boxes of it, zero outside."""

    def __init__(self, base: Tensor, block: Sequence[int]) -> None:
        self.base, self.dtype, self.layout = base, base.dtype, None
        self.block_type = SimpleNamespace(shape=list(block), nbytes=torch.Size(block).numel() * base.element_size())

    def box(self, at: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        low = [int(x) for x in at]
        high = [min(a + n, size) for a, n, size in zip(low, self.block_type.shape, self.base.shape, strict=True)]
        there = tuple(slice(a, max(a, b)) for a, b in zip(low, high, strict=True))
        return there, tuple(slice(0, max(0, b - a)) for a, b in zip(low, high, strict=True))


class Pointer:
    """An address, or a tensor of addresses, in one tensor's storage."""

    def __init__(self, base: Tensor, offset: Any = 0) -> None:
        self.base, self.offset = base, offset

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.base, self.offset + other)

    __radd__ = __add__

    def flat(self) -> Tensor:
        return self.base.as_strided((self.base.untyped_storage().nbytes() // self.base.element_size(),), (1,), 0)

    def where(self) -> Tensor:
        return torch.as_tensor(self.offset, dtype=torch.int64) + self.base.storage_offset()


class Value(Tensor):
    """A tensor with the methods by which Triton's values are used."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(layout=None)

    def to(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        return super().to(dtype, *args, **kwargs)

    def reshape(self, shape: Any, *more: Any) -> Any:
        return super().reshape(shape, *more)

    def split(self, *args: Any) -> Any:  # type: ignore[override]
        return super().unbind(-1) if not args else super().split(*args)


def _value(x: Any) -> Any:
    return x.as_subclass(Value) if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.int32 if isinstance(x, int) else torch.float32).as_subclass(Value)


def _load(p: Pointer, mask: Any = None, other: Any = 0) -> Any:
    at = p.where()
    if mask is None:
        return _value(p.flat()[at])
    mask = torch.as_tensor(mask)
    at, mask = torch.broadcast_tensors(at, mask)
    return _value(torch.where(mask, p.flat()[torch.where(mask, at, 0)], other).to(p.base.dtype))


def _store(p: Pointer, x: Any, mask: Any = None) -> None:
    at, mask = torch.broadcast_tensors(p.where(), torch.as_tensor(True if mask is None else mask))
    p.flat()[at[mask]] = torch.as_tensor(x).expand(at.shape)[mask].to(p.base.dtype)


def _where(c: Any, a: Any, b: Any) -> Any:
    return _value(torch.where(torch.as_tensor(c), torch.as_tensor(a), torch.as_tensor(b)))


def _pair(f: Any) -> Any:
    return lambda a, b: _value(f(torch.as_tensor(a), torch.as_tensor(b)))


def _single(f: Any) -> Any:
    return lambda x: _value(f(torch.as_tensor(x)))


def _copy_in(desc: Descriptor, at: Sequence[Any], barrier: Barrier, target: Shared) -> None:
    there, here = desc.box(at)
    target.data.zero_()
    target.data[here] = desc.base[there]
    barrier.landed(desc.block_type.nbytes)


def _copy_out(desc: Descriptor, at: Sequence[Any], source: Shared) -> None:
    there, here = desc.box(at)
    desc.base[there] = source.data[here]


def _mma(a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
    x = (a.data if isinstance(a, Shared) else a).float() @ b.data.float()
    return _value(x + acc if use_acc else x)


def _wait(n: int, deps: Sequence[Tensor]) -> Any:
    return deps[0] if len(deps) == 1 else tuple(deps)


def _specialize(functions: Sequence[tuple[Any, Sequence[Any]]], warps: Sequence[int], registers: Sequence[int]) -> None:
    failures: list[BaseException] = []
    me = _local.program

    def work(function: Any, args: Sequence[Any]) -> None:
        _local.program = me
        try:
            function(*args)
        except BaseException as e:  # noqa: BLE001  (handed to the thread that started this one)
            failures.append(e)
            for x in args:
                for barrier in x.all if isinstance(x, Barriers) else ():
                    with barrier.condition:
                        barrier.broken = True
                        barrier.condition.notify_all()

    threads = [threading.Thread(target=work, args=f) for f in functions]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failures:
        raise next((f for f in failures if not isinstance(f, Deadlock)), failures[0])


def _loads(text: str, p: Pointer) -> Any:
    """Loads and copies for the 4 elements of each of a thread's groups of 8 columns: 2 of a row, and 2 of the row 8 below it. Addresses are the first element's and what stands in the text."""
    offsets: list[int] = []
    for line in text.split(";")[:-1]:
        copied = re.fullmatch(r" ?mov\.b32 \$\d+, \$(\d+)", line)
        loaded = re.fullmatch(r" ?ld\.global\.nc\.b32 \$\d+, \[\$\d+\+(-?\d+)\]", line)
        assert copied or loaded, line
        offsets.append(offsets[int(copied[1])] if copied else int(loaded[1]) // 4)  # type: ignore[index]
    at = p.where()
    rows, columns = torch.arange(at.shape[0])[:, None], torch.arange(at.shape[1])[None, :]
    element = columns % 2 + 2 * (rows // 8 % 2) + 4 * (columns // 8)
    return _value(p.flat()[at[rows - rows // 8 % 2 * 8, columns % 8 // 2 * 2] + torch.tensor(offsets)[element]])


def _asm(text: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    if text.startswith("tanh.approx"):
        return _value(torch.tanh(args[0]))
    if "vote" in text:
        return _value(args[0] * args[1])
    if text.startswith("ld.global"):
        return _loads(text, args[0])
    if "setp.eq" in text:
        return _value(torch.where(args[1] == args[2], args[0], -torch.inf))
    if "setp" in text:
        s, k, bound = args
        return _value(torch.where(k <= bound if "setp.le" in text else k >= bound, s, -torch.inf))
    assert text.startswith("cvt.rn"), text
    return _value(args[0].to(dtype))


def _language() -> Any:
    reduce = lambda f: lambda x, axis: _value(f(x, axis))  # noqa: E731
    return SimpleNamespace(
        constexpr=lambda x: x,
        static_range=range,
        int32=torch.int32, int64=torch.int64, float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16,
        NVMMADistributedLayout=lambda *a: None, DotOperandLayout=lambda *a: None, SliceLayout=lambda *a: None, BlockedLayout=lambda *a: None,
        arange=lambda a, b, layout=None: _value(torch.arange(a, b, dtype=torch.int32)),
        zeros=lambda shape, dtype, layout=None: _value(torch.zeros(shape, dtype=dtype)),
        full=lambda shape, x, dtype, layout=None: _value(torch.full(shape, float(x), dtype=dtype)),
        to_tensor=_value,
        convert_layout=lambda x, layout: x,
        program_id=lambda axis: _local.program[0],
        num_programs=lambda axis: _local.program[1],
        cdiv=lambda a, b: -(-a // b),
        minimum=_pair(torch.minimum), maximum=_pair(torch.maximum), where=_where, load=_load, store=_store,
        max=reduce(torch.amax), sum=reduce(torch.sum),
        abs=_single(torch.abs),
        **{name: _single(getattr(torch, name)) for name in ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "floor", "ceil", "erf")},
        inline_asm_elementwise=_asm,
        warp_specialize=_specialize,
        allocate_shared_memory=lambda dtype, shape, layout: Barriers(shape[0]) if dtype is torch.int64 else Shared(torch.full(shape, torch.nan, dtype=dtype)),
    )


def _barriers() -> Any:
    return SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda b, count: b.init(count),
        wait=lambda b, phase, pred=True: b.wait(int(phase)) if bool(pred) else None,
        arrive=lambda b, count=1, pred=True: b.arrive(count) if bool(pred) else None,
        expect=lambda b, size: b.expect(size),
    )


def _range(*args: Any) -> Any:
    return (_value(i) for i in builtins.range(*(int(a) for a in args)))


def run(text: str, arguments: Sequence[Any], grid: int) -> None:
    """Runs ``flash_forward`` of a generated module for each of ``grid`` blocks of threads."""
    body = "\n".join(line for line in text.splitlines() if not line.startswith(("import ", "from ")))
    jit = lambda f=None, **options: f if f is not None else lambda g: g  # noqa: E731
    names: dict[str, Any] = {
        "gl": _language(),
        "gluon": SimpleNamespace(jit=jit),
        "mbarrier": _barriers(),
        "tma": SimpleNamespace(async_copy_global_to_shared=_copy_in, async_copy_shared_to_global=_copy_out, store_wait=lambda n: None),
        "fence_async_shared": lambda: None,
        "warpgroup_mma": _mma,
        "warpgroup_mma_wait": _wait,
        "range": _range,
    }
    exec(compile(body, "generated", "exec"), names)
    for i in builtins.range(grid):
        _local.program = (_value(i), _value(grid))
        names["flash_forward"](*arguments)


def argument(x: Any) -> Any:
    """A kernel's argument as its code receives it."""
    return Pointer(x) if isinstance(x, Tensor) else _value(x) if isinstance(x, int) else x
