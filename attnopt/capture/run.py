"""Running a model only to look at what it gives: nothing of the model, of the random state or of the mode may change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnopt.capture.call import Args, Kwargs
from attnopt.capture.clone import clone_tree, tensors_of

SEED = 0


@contextlib.contextmanager
def undisturbed(device: torch.device | None = None) -> Iterator[None]:
    """Restores grad mode and random state: an exception inside a captured no_grad region leaves gradients off for all."""
    grad = torch.is_grad_enabled()
    devices = [device] if device is not None and device.type not in ("cpu", "meta") else []
    try:
        with torch.random.fork_rng(devices=devices, device_type=device.type) if device is not None and devices else torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            yield
    finally:
        torch.set_grad_enabled(grad)


def device_of(model: nn.Module) -> torch.device | None:
    """The device of the first parameter or buffer, None when there is none."""
    first = next(tensors_of(model), None)
    return None if first is None else first.device


def tensors_from(model: nn.Module, args: Args, kwargs: Kwargs) -> list[torch.Tensor]:
    """The tensors that ``model(*args, **kwargs)`` returns; buffers that it writes are those of a copy of its tree."""
    return flat_tensors(clone_tree(model), args, kwargs, device_of(model))


def flat_tensors(function: Callable[..., Any], args: Args, kwargs: Kwargs, device: torch.device | None) -> list[torch.Tensor]:
    """The tensors that ``function(*args, **kwargs)`` returns, without gradients and from a fixed seed."""
    with undisturbed(device), torch.no_grad():
        result = function(*args, **kwargs)
    return [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


def difference(expected: list[torch.Tensor], got: list[torch.Tensor]) -> str:
    """What differs between two runs of the same function, in words; empty when nothing does.

    Two executions of the same operations may differ by rounding (another kernel for another stride), so floating-point
    tensors are compared by norm to the square root of their precision: a size that was baked in shows at once.
    """
    if len(expected) != len(got):
        return f"{len(got)} tensors returned instead of {len(expected)}"
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {i} is {b.dtype} {tuple(b.shape)} instead of {a.dtype} {tuple(a.shape)}"
        if a.device.type == "meta" or a.numel() == 0:
            continue
        if not (a.is_floating_point() or a.is_complex()):
            if not torch.equal(a, b):
                return f"result {i} has other values"
            continue
        limit = torch.finfo(a.dtype).eps ** 0.5
        finite = torch.isfinite(a)
        same_elsewhere = torch.equal(torch.nan_to_num(a[~finite], nan=1.0), torch.nan_to_num(b[~finite], nan=1.0))
        wide = torch.complex128 if a.is_complex() else torch.float64
        x, y = a[finite].to(wide), b[finite].to(wide)
        error = float((x - y).norm() / x.norm().clamp_min(1e-30))
        if not same_elsewhere or not error <= limit:
            return f"result {i} differs by {error:.1e} (norm-relative)"
    return ""
