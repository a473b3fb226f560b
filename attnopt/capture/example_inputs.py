"""Inputs to run a model on: from a user's ``example_inputs``, or made from descriptions such as ``input_ids=int64[2,128]``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnopt.errors import LoadError

if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bool")
_FORM = "name=dtype[sizes], such as input_ids=int64[2,128] or float32[2,3,32,32]"
_PATTERN = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)\s*=\s*)?(?P<dtype>[a-z]\w*)\s*\[(?P<sizes>[^\]]*)\]")
_SMALLEST_VOCABULARY = 16
"""An embedding with fewer rows holds token types and the like, not tokens."""


@dataclass(frozen=True)
class InputDescription:
    """One input: a dtype's name, the sizes, and the name of the argument (None: the next positional one)."""

    name: str | None
    dtype: str
    sizes: tuple[int, ...]


def parse_input(text: str) -> InputDescription:
    """Read ``name=dtype[sizes]``. Raises LoadError with the form that was expected."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise LoadError(f"--input {text!r} cannot be read: expected {_FORM}.")
    name, dtype, sizes = match["name"], match["dtype"], match["sizes"]
    if dtype not in DTYPES:
        raise LoadError(f"--input {text!r}: there is no dtype {dtype!r}; supported are {', '.join(DTYPES)}.")
    parts = [x.strip() for x in sizes.split(",")] if sizes.strip() else []
    if not all(x.isascii() and x.isdigit() and int(x) > 0 for x in parts):
        raise LoadError(f"--input {text!r}: sizes are positive whole numbers, got [{sizes}].")
    return InputDescription(name, dtype, tuple(int(x) for x in parts))


def make_inputs(model: nn.Module, texts: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random positional and keyword inputs of the described shapes for ``model``, the same in every process.

    Integers lie within the model's embeddings, arguments whose name contains ``mask`` are all ones (everything visible),
    and ``position_ids`` count up. Raises LoadError for a bad description or one given twice.
    """
    import torch

    descriptions = [parse_input(text) for text in texts]
    names = [d.name for d in descriptions if d.name]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LoadError(f"--input gives {', '.join(twice)} more than once.")
    rows = [m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    generator = torch.Generator().manual_seed(0)
    values = [(d.name, _value(d, rows, generator)) for d in descriptions]
    return tuple(v for name, v in values if name is None), {name: v for name, v in values if name is not None}


def _value(d: InputDescription, embedding_rows: list[int], generator: torch.Generator) -> torch.Tensor:
    import torch

    dtype: torch.dtype = getattr(torch, d.dtype)
    name = d.name or ""
    if "mask" in name or d.dtype == "bool":
        return torch.ones(d.sizes, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(d.sizes, generator=generator).to(dtype)
    if "position" in name and d.sizes:
        return torch.arange(d.sizes[-1]).to(dtype).expand(d.sizes).contiguous()
    if "type" in name or "segment" in name:
        high = min(embedding_rows, default=2)
    else:
        vocabularies = [n for n in embedding_rows if n >= _SMALLEST_VOCABULARY]
        high = min(vocabularies or embedding_rows, default=_SMALLEST_VOCABULARY)
    high = min(high, torch.iinfo(dtype).max)
    return torch.randint(0, high, d.sizes, generator=generator).to(dtype)


def split_inputs(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A user's ``example_inputs`` as positional and keyword inputs.

    A dict holds keyword inputs, a pair of a tuple and a dict both kinds, a tuple or list positional ones, and anything
    else is one positional input.
    """
    if isinstance(value, dict):
        return (), dict(value)
    if isinstance(value, (tuple, list)):
        if len(value) == 2 and isinstance(value[0], (tuple, list)) and isinstance(value[1], dict):
            return tuple(value[0]), dict(value[1])
        return tuple(value), {}
    return (value,), {}


def check_signature(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    """Raise LoadError when the inputs do not fit the parameters of the model's ``forward``."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        takes = ", ".join(str(p) if p.kind is p.VAR_POSITIONAL or p.kind is p.VAR_KEYWORD else p.name for p in signature.parameters.values())
        raise LoadError(f"The inputs do not fit {name}: {error}; forward takes ({takes}).") from error


def describe_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The inputs in the words of ``--input``: ``int64[2,128], attention_mask=int64[2,128]``."""
    return ", ".join([_describe(x) for x in args] + [f"{name}={_describe(x)}" for name, x in kwargs.items()])


def _describe(value: Any) -> str:
    import torch

    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{','.join(str(n) for n in value.shape)}]"
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__
