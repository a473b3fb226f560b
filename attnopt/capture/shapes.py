"""Which dimensions of the inputs are left open, in the form that torch.export takes it."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnopt.capture.call import Args, CallForm, Kwargs

Plan = list[frozenset[int]]
"""Per leaf, the dimensions that are left open."""


def plans(leaves: list[Any], images: bool = False) -> list[Plan]:
    """Dimensions to leave open, most first: all, those of indices and masks with every batch, the batch, none.

    ``images``: the model has two-dimensional convolutions, and floats of rank 4 that share no size with other inputs are
    images, of which the batch alone is left open. Channels stay closed from the start, and the last dimension that several float inputs of one rank share:
    queries, keys and values have one head size. Other feature sizes are fixed by export itself.
    """
    tensors = [x if isinstance(x, torch.Tensor) else None for x in leaves]
    features = Counter((x.dim(), x.shape[-1]) for x in tensors if x is not None and x.is_floating_point() and x.dim() >= 3)

    def closed(x: torch.Tensor) -> set[int]:
        if not x.is_floating_point():
            return set()
        if images and x.dim() == 4 and not any(set(x.shape[2:]) & set(y.shape) for y in tensors if y is not None and y is not x):
            return {1, 2, 3}
        return ({1} if x.dim() == 4 else set()) | ({x.dim() - 1} if x.dim() >= 3 and features[x.dim(), x.shape[-1]] > 1 else set())

    everything = [frozenset(range(x.dim())) - closed(x) if x is not None else frozenset() for x in tensors]
    indices = [dims if x is not None and not x.is_floating_point() else dims & {0} for x, dims in zip(tensors, everything, strict=True)]
    batch = [dims & {0} for dims in everything]
    nothing = [frozenset[int]() for _ in tensors]
    return [everything, *(p for p in (indices, batch) if p != everything), nothing]


def batch_of_one(leaves: list[Any]) -> list[tuple[int, int]]:
    """(leaf, 0) of all tensors, when every one that has a batch has a batch of one."""
    tensors = [(i, x) for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.dim() > 0]
    batched = [x for _, x in tensors if x.dim() > 1] or [x for _, x in tensors]
    if not batched or any(x.shape[0] != 1 for x in batched):
        return []
    return [(i, 0) for i, x in tensors if x.shape[0] == 1]


def shapes_by_argument(model: nn.Module, specs: list[Any], args: Args, kwargs: Kwargs) -> dict[str, Any]:
    """``specs`` (one per leaf of the call) by the name of the argument, starred ones collected as Python does.

    Containers of a library's own class stand as lists of what they hold: they need not be able to hold anything else.
    """
    remaining = iter(specs)

    def opaque(value: Any) -> bool:
        return type(value) not in pytree.BUILTIN_TYPES

    def arrange(value: Any) -> Any:
        node = pytree.SUPPORTED_NODES.get(type(value))
        if node is None:
            return next(remaining)
        return [pytree.tree_map(arrange, child, is_leaf=opaque) for child in node.flatten_fn(value)[0]]

    a, k = pytree.tree_map(arrange, (args, kwargs), is_leaf=opaque)
    return dict(inspect.signature(model.forward).bind(*a, **k).arguments)


def name_every_argument(model: nn.Module, form: CallForm, kwargs: Kwargs) -> None:
    """Give ``model`` a signature that names what this call puts into ``**kwargs``: export loses count of dynamic shapes there."""
    declared = [p for p in form.signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs if name not in form.signature.parameters]
    if extra:
        forward: Any = functools.partial(model.forward)
        forward.__signature__ = form.signature.replace(parameters=[*declared, *extra])
        model.forward = forward
