"""Writing a module's source line by line, with the tensors that it registers and takes.

A program of these tests *is* its source: what is printed for a failing one is what ran. The text is compiled under a file
name of its own that ``linecache`` knows, so that captured nodes point at their lines.
"""

from __future__ import annotations

import linecache
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PREAMBLE = {"torch": torch, "F": F, "nn": nn}
LONGEST = 16
"""Registered buffers reach this far; no run of a program is longer."""


@dataclass(frozen=True)
class Sizes:
    """Batch, queries, keys of one run."""

    B: int
    S: int
    T: int


@dataclass(frozen=True)
class Input:
    """An argument of forward: its axes by name (``B``, ``S``, ``T``, ``P`` = T - S, or a number) and what fills it."""

    name: str
    axes: tuple[str | int, ...]
    fill: str = "normal"

    def make(self, sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        shape = [self.extent(a, sizes) for a in self.axes]
        if self.fill == "normal":
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if self.fill == "bool":
            return torch.rand(shape, generator=generator) < 0.7
        if self.fill == "zero or one":
            return (torch.rand(shape, generator=generator) < 0.7).long()
        if self.fill == "one hidden":  # zeros, and the dtype's smallest number where a key is hidden
            hidden = torch.rand(shape, generator=generator) < 0.3
            return torch.zeros(shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
        if self.fill == "ids":
            return torch.randint(0, 3, shape, generator=generator)
        if self.fill == "lengths":
            return torch.randint(0, sizes.T + 1, shape, generator=generator)
        raise ValueError(self.fill)

    @staticmethod
    def extent(axis: str | int, sizes: Sizes) -> int:
        if isinstance(axis, int):
            return axis
        return {"B": sizes.B, "S": sizes.S, "T": sizes.T, "P": sizes.T - sizes.S}[axis]


@dataclass
class Emitter:
    """Collects the parts of one module's source."""

    inputs: dict[str, Input] = field(default_factory=dict)
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    count: int = 0

    def input(self, name: str, axes: tuple[str | int, ...], fill: str = "normal") -> str:
        self.inputs.setdefault(name, Input(name, axes, fill))
        return name

    def state(self, expression: str, name: str, parameter: bool = False) -> str:
        """Registers a buffer or a parameter and says how to read it."""
        kept = f"self.{name} = nn.Parameter({expression})" if parameter else f'self.register_buffer("{name}", {expression})'
        if kept not in self.init:
            self.init.append(kept)
        return f"self.{name}"

    def line(self, text: str) -> None:
        self.body.append(text)

    def fresh(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def source(self) -> str:
        init = ["super().__init__()", *self.init]
        return "\n".join(
            ["class Program(nn.Module):", "    def __init__(self):", *(f"        {x}" for x in init), "", f"    def forward(self, {', '.join(self.inputs)}):", *(f"        {x}" for x in self.body), ""]
        )


def compiled(source: str) -> type[nn.Module]:
    """The class that ``source`` defines."""
    name = f"<program {abs(hash(source)):x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace = dict(PREAMBLE)
    exec(compile(source, name, "exec"), namespace)
    return namespace["Program"]
