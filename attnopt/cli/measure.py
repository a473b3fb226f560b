"""Time and peak memory of the original against the optimized model, measured in turn in one process.

On CUDA, time is taken with events and peak memory from the caching allocator. On the CPU, peak memory is the operating
system's: how far the resident set rose above what the process held before the run (``/proc/self``, Linux only), which
counts everything a kernel touches, scratch memory of libraries too.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): reset the peak resident set size to the current one
WARM_RUNS = 2
MOST_RUNS = 20


@dataclass(frozen=True)
class Measured:
    """One model: the median time of a run in seconds, its peak memory above what was held before it, in bytes."""

    seconds: float
    peak_bytes: int | None
    """None where it cannot be measured (CPU on a system without ``/proc``)."""


@dataclass(frozen=True)
class Comparison:
    """Original against optimized on the same inputs. ``what`` is ``forward`` or ``forward + backward``."""

    what: str
    runs: int
    original: Measured
    optimized: Measured

    @property
    def speedup(self) -> float:
        return self.original.seconds / self.optimized.seconds

    @property
    def memory_ratio(self) -> float | None:
        """How many times less peak memory the optimized model needs; None where unknown, or where one of them needs none that can be seen."""
        before, after = self.original.peak_bytes, self.optimized.peak_bytes
        return before / after if before and after else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup, "memory_ratio": self.memory_ratio}


def compare(
    original: nn.Module,
    optimized: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    train: bool = False,
    seconds: float = 6.0,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Run both in turn for about ``seconds`` (at least 3 runs each, after ``WARM_RUNS``) and take medians.

    ``train`` runs forward and backward. Gradients of both are freed afterwards. ``progress`` receives (done, total) runs.
    """
    import torch

    device = _device(original, args, kwargs)
    calls = [_call(model, args, kwargs, train) for model in (original, optimized)]
    took = 0.0
    for _ in range(WARM_RUNS):
        took = sum(_timed(call, device) for call in calls)
    runs = max(3, min(MOST_RUNS, int(seconds / max(took, 1e-9))))
    times: list[list[float]] = [[], []]
    for i in range(runs):
        for call, taken in zip(calls, times, strict=True):
            taken.append(_timed(call, device))
        if progress is not None:
            progress(i + 1, runs)
    peaks = [peak_memory(call, device) for call in calls]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    before, after = (Measured(statistics.median(t), p) for t, p in zip(times, peaks, strict=True))
    return Comparison("forward + backward" if train else "forward", runs, before, after)


def _device(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    import torch

    tensors = [*model.parameters(), *(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))]
    return next((t.device for t in tensors), torch.device("cpu"))


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], train: bool) -> Callable[[], None]:
    import torch
    from torch.utils._pytree import tree_leaves

    def forward() -> None:
        with torch.no_grad():
            model(*args, **kwargs)

    def forward_backward() -> None:
        outputs = [x for x in tree_leaves(model(*args, **kwargs)) if isinstance(x, torch.Tensor) and x.requires_grad]
        torch.autograd.backward([x.float().mean() for x in outputs])
        model.zero_grad(set_to_none=True)

    return forward_backward if train else forward


def _timed(call: Callable[[], None], device: torch.device) -> float:
    import torch

    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def peak_memory(call: Callable[[], None], device: torch.device) -> int | None:
    """Bytes by which memory rose, at most, while ``call`` ran once; None where that cannot be known."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    if device.type != "cpu" or not _CLEAR.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but not yet given back would hide what the run needs
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return None
    held = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - held)


def _status(key: str) -> int:
    """A size of this process in bytes, as the kernel counts it (it prints kibibytes)."""
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
