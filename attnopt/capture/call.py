"""One canonical form of a call, however the arguments were written, and what is known of each of its leaves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class CallForm:
    """Brings calls of one function to one form, so that ``f(x)``, ``f(x=x)`` and ``f(x, mask=None)`` are the same call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.signature = inspect.signature(function)
        parameters = self.signature.parameters.values()
        kinds = [p.kind for p in parameters]
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        # With positional-only or starred parameters, a positional argument has to stay where it is.
        self.keeps_positions = inspect.Parameter.POSITIONAL_ONLY in kinds or inspect.Parameter.VAR_POSITIONAL in kinds
        self.positional = tuple(p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.declared = tuple(p.name for p in parameters if p.kind in named)
        self.defaults = {p.name: p.default for p in parameters if p.kind in named}

    def normalise(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Positional arguments under their names, in declared order, without those that repeat a default.

        Raises TypeError, with Python's own message, when the arguments do not fit the signature.
        """
        if self.keeps_positions:
            taken: Kwargs = kwargs
        else:
            names = self.positional
            if len(args) > len(names) or (args and kwargs and not kwargs.keys().isdisjoint(names[: len(args)])):
                self.signature.bind(*args, **kwargs)  # raises
            taken = dict(zip(names, args, strict=False))
            taken.update(kwargs)
            args = ()
        defaults = self.defaults
        ordered = {n: taken[n] for n in self.declared if n in taken and taken[n] is not defaults[n]}
        for name in sorted(n for n in taken if n not in defaults):
            ordered[name] = taken[name]
        return args, ordered


    def spread(self, args: Args, kwargs: Kwargs, positional: int) -> tuple[Args, Kwargs]:
        """The inverse of ``normalise``: the first ``positional`` parameters by position again."""
        if self.keeps_positions:
            return args, kwargs
        first = self.positional[:positional]
        return tuple(kwargs.get(n, self.defaults[n]) for n in first), {n: v for n, v in kwargs.items() if n not in first}


@dataclass(frozen=True)
class Leaf:
    """One leaf of a call: a tensor's dtype, device and sizes (an int, or the name of a symbol), or another value."""

    name: str
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    sizes: tuple[int | str, ...] = ()
    value: Any = None

    @property
    def is_tensor(self) -> bool:
        return self.dtype is not None


def leaves_of(args: Args, kwargs: Kwargs) -> list[tuple[str, Any]]:
    """(readable name, value) of each leaf, in the order of torch.utils._pytree."""
    pairs, _ = pytree.tree_flatten_with_path((args, kwargs))
    return [(_name(path), value) for path, value in pairs]


def _name(path: Sequence[Any]) -> str:
    root, first, *rest = path
    head = str(getattr(first, "key", "")) if getattr(root, "idx", 0) == 1 else f"args{pytree.keystr((first,))}"
    return head + pytree.keystr(tuple(rest))
