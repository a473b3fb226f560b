"""Who computes attention over a paged cache, and why: the generated kernels where they can, PyTorch's on the CPU, otherwise the reference."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.config import disabled_backends
from attnopt.errors import BackendError
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import paged_batched
from attnopt.kernels.registry import BackendRefusal

ORDER = ("triton", "batched", "reference")
"""The order in which ``auto`` asks. The reference takes everything, on every device, slowly."""


@dataclass(frozen=True)
class CacheSetting:
    """Where an attention over a paged cache runs, and how its cache is laid out."""

    device: str
    """A device type: ``cpu``, ``cuda``."""
    dtype: torch.dtype
    """Of the queries."""
    page_size: int
    D: int
    Dv: int
    contiguous: bool = False
    """Whether each request has one page: ``block_table`` has one column."""
    cache_dtype: torch.dtype | None = None
    """Of a quantized cache; None where the cache is of ``dtype``."""


def choose(spec: AttentionSpec, setting: CacheSetting, backend: str = "auto") -> tuple[str, str]:
    """The backend, and why, as one phrase: ``("reference", "interprets the spec request by request (not triton: ...)")``.

    A backend that is named is taken or refused, never replaced: ``BackendError`` where it is unknown or not usable here, ``BackendRefusal`` where it
    cannot compute this attention.
    """
    if backend == "auto":
        passed: list[str] = []
        for name in ORDER:
            reason = refusal(name, spec, setting)
            if reason is None:
                return name, f"{_WHY[name]} ({'; '.join(passed)})" if passed else _WHY[name]
            passed.append(f"not {name}: {reason}")
        raise BackendError(f"No backend can compute this attention over a cache on {setting.device}: {'; '.join(passed)}.")
    known(backend)
    reason = refusal(backend, spec, setting)
    if reason is not None:
        raise BackendRefusal(backend, reason)
    return backend, _WHY[backend]


def known(backend: str) -> None:
    """Raises BackendError for a name that no backend for a paged cache has."""
    if backend not in (*ORDER, "auto"):
        raise BackendError(f"There is no backend {backend!r} for a paged cache; the backends are {', '.join(ORDER)}, and 'auto'.")


_WHY = {
    "triton": "generated paged attention, the keys of few queries split over many programs",
    "batched": "requests with one query each in one product, the others one by one through PyTorch's attention",
    "reference": "interprets the spec request by request",
}


def refusal(name: str, spec: AttentionSpec, setting: CacheSetting) -> str | None:
    """Why backend ``name`` cannot compute ``spec`` there, as a phrase; None when it can."""
    if name in disabled_backends():
        return "switched off by ATTNOPT_DISABLE"
    if name == "batched":
        return paged_batched.refusal(spec, setting.device)
    return _triton_refusal(spec, setting) if name == "triton" else None


def _triton_refusal(spec: AttentionSpec, setting: CacheSetting) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    from attnopt.kernels.triton import launch_paged

    return launch_paged.refusal(spec, setting)


def writer(k: Tensor, k_cache: Tensor) -> str:
    """Who writes keys and values to a cache: the Triton kernel on a GPU where it can, otherwise PyTorch, whose indexing waits for the device."""
    if not k.is_cuda or "triton" in disabled_backends() or importlib.util.find_spec("triton") is None:
        return "reference"
    from attnopt.kernels.triton import cache_write

    return "reference" if cache_write.refusal(k, k_cache) else "triton"
