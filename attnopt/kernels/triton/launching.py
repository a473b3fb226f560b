"""One launch of a Triton kernel, prepared for many calls that differ in their tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, as ``TRITON_INTERPRET=1`` makes it."""
    import triton

    return bool(triton.knobs.runtime.interpret)


Form = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device, bool]
"""Of a tensor: shape, strides, dtype, device, and whether it is aligned to 16 bytes, which is all of it that Triton compiles for."""


def form_of(x: Tensor) -> Form:
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0


def is_elsewhere(device: torch.device) -> bool:
    """Whether this is a GPU other than the current one, on which Triton would launch."""
    return device.type == "cuda" and device.index not in (None, torch.cuda.current_device())


@dataclass
class Launch:
    """One kernel with all of its arguments but the tensors."""

    function: Any
    arguments: tuple[str, ...]
    values: dict[str, Any]
    """By name: sizes, strides and bounds. What is not among them is a tensor (or a seed), and comes with the call."""
    fixed: dict[str, Any]
    """Its constexprs, in order."""
    options: dict[str, Any]
    grid: tuple[int]
    launch: Any = None
    """What Triton made of it at the first launch, for this grid. To launch that spares looking at every argument again."""

    def __post_init__(self) -> None:
        self.template = [*(self.values.get(n) for n in self.arguments), *self.fixed.values()]
        self.places = [(i, n) for i, n in enumerate(self.arguments) if n not in self.values]

    def run(self, tensors: Mapping[str, Any]) -> None:
        """Tensors of the same dtypes, and of addresses that are alike multiples of 16, as those of the first call."""
        arguments = self.template.copy()
        for i, name in self.places:
            arguments[i] = tensors[name]
        if self.launch is not None:
            self.launch(*arguments)
            return
        made = self.function[self.grid](*arguments[: len(self.arguments)], **self.fixed, **self.options)
        self.launch = None if interpreted() else made[(*self.grid, 1, 1)]
