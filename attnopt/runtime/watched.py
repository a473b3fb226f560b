"""The tensors of a module, asked for at each step: whether a graph that holds their addresses may still be replayed."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

_KINDS = ("_parameters", "_buffers", "_modules")
_shape, _dtype = attrgetter("shape"), attrgetter("dtype")


class ModuleTensors:
    """Parameters and buffers of a module and those below it, as they are now. The modules are walked once, and again where one of their dictionaries holds something else.

    A tensor that is shared may come twice.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._tensors: list[Tensor] = []
        self._places: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._held: list[Any] = [None]  # nothing is in its place yet

    def __call__(self) -> list[Tensor]:
        if len(self._held) != len(self._places) or not all(map(is_, map(dict.get, self._places, self._names), self._held)):
            self._walk()
        return self._tensors

    def _walk(self) -> None:
        self._tensors, self._places, self._names, self._held = [], [], [], []
        left, seen = [self._root], {self._root}
        while left:
            module = left.pop()
            for kind in _KINDS:
                self._hold(module.__dict__, kind)
                for x in self._hold(module.__dict__[kind], *module.__dict__[kind]):
                    if isinstance(x, Tensor):
                        self._tensors.append(x)
                    elif x is not None and x not in seen:
                        seen.add(x)
                        left.append(x)

    def _hold(self, place: dict[str, Any], *names: str) -> list[Any]:
        found = [place[name] for name in names]
        self._places += [place] * len(found)
        self._names += names
        self._held += found
        return found


State = tuple[list[int], list[torch.Size], list[tuple[int, ...]], list[torch.dtype]]


def state_of(tensors: Iterable[Tensor]) -> State:
    """Address, shape, strides and dtype of each tensor."""
    held = list(tensors)
    return list(map(Tensor.data_ptr, held)), list(map(_shape, held)), list(map(Tensor.stride, held)), list(map(_dtype, held))
