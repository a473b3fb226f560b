"""The call on which a model is captured, from what the user gave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.capture.call import Args, Kwargs
from attnopt.capture.clone import tensors_of
from attnopt.errors import AttnoptError


def given_call(model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None) -> tuple[Args, Kwargs] | None:
    """Positional and keyword arguments from what the user gave; None when that is nothing."""
    if example_inputs is None and kwargs is None:
        return None
    keywords = dict(kwargs or {})
    args: Args = ()
    if isinstance(example_inputs, Mapping):
        twice = sorted(set(example_inputs) & set(keywords))
        if twice:
            raise AttnoptError(f"{', '.join(twice)} is given in example_inputs and in kwargs.")
        keywords = {**example_inputs, **keywords}
    elif isinstance(example_inputs, tuple | list):
        args = tuple(example_inputs)
    elif isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif example_inputs is not None:
        raise AttnoptError(f"example_inputs has to be a tuple, a tensor or a mapping of keyword arguments, got {type(example_inputs).__name__}.")
    tensors = list(tensors_of(model))
    if tensors and all(t.is_meta for t in tensors):
        args, keywords = pytree.tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, keywords))
    return args, keywords
