"""The original's rounding error where its output has too few numbers to show it.

The error of an output of one number is one draw: it may happen to be none at all, and where the number cancels there is nothing beside it to be measured against. Draws of the same
distribution are had by moving the weights by a little, which turns every rounding another way and leaves the function's condition as it is: the original at its own dtype against
the original in float64, both with the same moved weights. (Estimating rounding errors by perturbed runs: Vignes, A stochastic arithmetic for
reliable scientific computation, Mathematics and Computers in Simulation 35, 1993.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.verify.compare import Distance, distance

ENOUGH = 16
"""Numbers from which the mean of their errors is known within a fifth. An output of fewer gets as many draws as bring it there."""
_MOVED = 2.0**-12
"""Relative change of a weight: thousands of roundings of float32."""

Draw = Callable[[int], tuple[Sequence[Any], Sequence[Any]]]
"""The original's results with weights that are moved for the n-th time, at its own dtype and in float64."""


def moved(weights: Iterable[Tensor], n: int) -> list[Tensor]:
    """Floating ``weights``, each element times 1 + d with a |d| of at most ``_MOVED``, or some of its dtype's own roundings where that is more; others as they are."""
    generator = torch.Generator().manual_seed(n)
    found = []
    for w in weights:
        if not w.is_floating_point():
            found.append(w)
            continue
        size = max(_MOVED, 4 * torch.finfo(w.dtype).eps)
        d = size * (2 * torch.rand(w.shape, generator=generator, dtype=torch.float64) - 1)
        found.append((w.detach().double().cpu() * (1 + d)).to(w.dtype).to(w.device))
    return found


class OwnErrors:
    """The original's own error on one set of inputs, from further draws where it is asked for."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self._known: list[tuple[Sequence[Any], Sequence[Any]]] = []

    def of(self, output: int, first: Distance, numbers: int) -> tuple[Distance, int]:
        """The root mean square of ``first``, the error that was seen, and of those of further draws of the same output of so many ``numbers``; how many draws that are."""
        count = math.ceil(ENOUGH / numbers)
        while len(self._known) < count - 1:
            self._known.append(self._draw(len(self._known)))
        seen = [first, *(distance(r[output], t[output]) for r, t in self._known[: count - 1])]
        return Distance(_rms([d.norm for d in seen]), _rms([d.row for d in seen])), count


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(x * x for x in values) / len(values))
