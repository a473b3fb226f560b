"""A second tree of modules over the same parameters, so that nothing done to one tree is seen in the other."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Memo = dict[int, Any]


def clone_tree(model: nn.Module, *, clone_parameter: Callable[[nn.Parameter], nn.Parameter] | None = None) -> nn.Module:
    """A shallow copy of every module of ``model``: own dicts of parameters, buffers, modules and hooks, shared Parameters.

    Buffers are copied (a batch norm's running statistics must not move the original's), ties among parameters, buffers and
    modules are kept, and attributes that refer to a module of the tree (bound methods, partials, lists) refer to its copy.
    ``clone_parameter`` makes the parameters of the copy; without it they are the same objects.
    """
    memo: Memo = {}
    for module in model.modules():
        memo[id(module)] = object.__new__(type(module))
    tensors: Memo = {}
    with torch.inference_mode(False):  # a buffer copied in inference mode could never meet autograd again
        for module in model.modules():
            _fill(module, memo, tensors, clone_parameter)
    copy: nn.Module = memo[id(model)]
    return copy


def _fill(module: nn.Module, memo: Memo, tensors: Memo, clone_parameter: Callable[[nn.Parameter], nn.Parameter] | None) -> None:
    new = memo[id(module)]
    state = dict(module.__dict__)
    for key, value in state.items():
        if key == "_parameters":
            state[key] = {name: _parameter(p, tensors, clone_parameter) for name, p in value.items()}
        elif key == "_buffers":
            state[key] = {name: _buffer(b, tensors) for name, b in value.items()}
        elif key == "_modules":
            state[key] = {name: memo[id(m)] if m is not None else None for name, m in value.items()}
        elif key == "_non_persistent_buffers_set" or key.endswith("_hooks") or "_hooks_" in key:
            state[key] = _hooks(value, memo)
        else:
            state[key] = _remap(value, memo)
    new.__dict__.update(state)


def _parameter(p: nn.Parameter | None, tensors: Memo, make: Callable[[nn.Parameter], nn.Parameter] | None) -> nn.Parameter | None:
    if p is None or make is None:
        return p
    if id(p) not in tensors:
        tensors[id(p)] = make(p)
    found: nn.Parameter = tensors[id(p)]
    return found


def _buffer(b: torch.Tensor | None, tensors: Memo) -> torch.Tensor | None:
    if b is None:
        return None
    if id(b) not in tensors:
        tensors[id(b)] = b.detach().clone()
    found: torch.Tensor = tensors[id(b)]
    return found


def _hooks(value: Any, memo: Memo) -> Any:
    if isinstance(value, dict):
        return type(value)((k, _remap(v, memo)) for k, v in value.items())
    return value.copy() if isinstance(value, set) else value


def _remap(value: Any, memo: Memo) -> Any:
    """``value`` with the modules of the tree in it replaced by their copies; itself when there are none."""
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if isinstance(value, types.MethodType):
        owner = memo.get(id(value.__self__))
        return value if owner is None else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        func, args, keywords = _remap(value.func, memo), _remap(value.args, memo), _remap(value.keywords, memo)
        if func is value.func and args is value.args and keywords is value.keywords:
            return value
        return functools.partial(func, *args, **keywords)
    if type(value) in (list, tuple, set):
        items = [_remap(x, memo) for x in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
    if type(value) is dict:
        pairs = {k: _remap(v, memo) for k, v in value.items()}
        return value if all(pairs[k] is value[k] for k in pairs) else pairs
    return value


def tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()
